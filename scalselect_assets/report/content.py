"""The content of the report as plain values; `render` turns them into a page.

Counts are of rows, shares lie in [0, 1]. Texts are as the pool has them: whoever shows them escapes them.
"""

from dataclasses import dataclass

from scalselect_assets.charts.chart_data import Churn, EnergyCurve, LeverageProfile


@dataclass(frozen=True, slots=True)
class Fact:
    """One named value, shown as it is."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Counts:
    """The rows of the pool by outcome; ``rows`` is ``embedded + rejected``."""

    rows: int
    embedded: int
    rejected: int
    selected: int


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Rows with one source label: in the pool, embedded, and selected."""

    source: str
    pool: int
    embedded: int
    selected: int


@dataclass(frozen=True, slots=True)
class Measure:
    """A column of the comparison: its name and what it means."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class ComparedStrategy:
    """A row of the comparison.

    Attributes:
        name: Name of the strategy.
        seeds: With which it was run, in words; empty where it takes none.
        values: For each measure of the comparison, in its order; None where it does not apply.
        is_selection: Whether it made the selection that the report is about.
    """

    name: str
    seeds: str
    values: tuple[float | None, ...]
    is_selection: bool = False


@dataclass(frozen=True, slots=True)
class StrategyTable:
    """The selection beside what other strategies would have selected."""

    measures: tuple[Measure, ...]
    strategies: tuple[ComparedStrategy, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class RejectedReason:
    """The number of rows that were rejected for one typed reason, and the reason's meaning."""

    reason: str
    rows: int
    meaning: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A thumbnail, or why there is none: exactly one of ``data`` and ``problem`` is given.

    Attributes:
        alt: Its content in words.
        data: JPEG bytes.
        width: Width of the thumbnail in pixels; 0 without one.
        height: Height of the thumbnail in pixels; 0 without one.
        problem: Why there is no picture.
    """

    alt: str
    data: bytes | None = None
    width: int = 0
    height: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """One sample.

    Attributes:
        sample_key: Its content hash.
        place: ``shard#row``.
        source_id: The row's own id, where it has one.
        source: Its source label.
        question: The question, without image marks.
        answer: The answer of the row.
        leverage: Rank-k leverage score.
        normalised_leverage: n·leverage/k.
        rank: By normalised leverage over the pool, from 1.
        percentile: Per cent of the pool's other samples that rank below it.
        is_selected: Whether it is in the selection.
        pictures: Its images, as many as are shown.
        overlay: The picture of the instruction's attention, if that is known.
        note: A further remark, such as the parts that were left out.
    """

    sample_key: str
    place: str
    source_id: str | None
    source: str
    question: str
    answer: str
    leverage: float
    normalised_leverage: float
    rank: int
    percentile: float
    is_selected: bool
    pictures: tuple[Picture, ...] = ()
    overlay: Picture | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Samples of one kind, highest leverage first."""

    name: str
    description: str
    items: tuple[GalleryItem, ...]


@dataclass(frozen=True, slots=True)
class ReportContent:
    """Everything that the page says; equal contents give equal bytes.

    Attributes:
        title: Title of the page.
        made_from: Versions of what the report was made from; never a time.
        settings: The declared settings.
        counts: The rows of the pool by outcome.
        energy: The spectrum and where it is cut.
        leverage: The distribution of leverage.
        composition: By source label, largest in the pool first.
        comparison: Other strategies, where they were run.
        churn: Against the selection before, where there was one.
        rejected: By reason.
        galleries: Samples to look at.
        manifest: The training dataset's manifest as indented JSON, cut to what a page can hold.
        manifest_note: The parts that were cut, and the place of the whole manifest.
    """

    title: str
    made_from: tuple[Fact, ...]
    settings: tuple[Fact, ...]
    counts: Counts
    energy: EnergyCurve
    leverage: LeverageProfile
    composition: tuple[SourceCounts, ...]
    comparison: StrategyTable | None
    churn: Churn | None
    rejected: tuple[RejectedReason, ...]
    galleries: tuple[Gallery, ...]
    manifest: str
    manifest_note: str = ""
