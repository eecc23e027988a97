"""Why a sample was selected, or not: where its leverage comes from, what it is like, and what the model saw.

`explain` needs no model: it reads what the store holds. `attention_of` loads the model and computes the
sample's attention map by the code that made its vector. Reads only.

Costs of `explain`: four columns of every shard's rows to find the sample, two columns of every shard's scores
for its rank, and one pass over all vectors (n·d·4 bytes) for the samples like it and those that lie furthest
along its directions; memory of one shard's scores or one batch of vectors, and of the keys of the selected.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

from scalselect_assets.explain.sample_search import SamplePlace

DEFAULT_SIMILAR: Final = 5
DEFAULT_EXEMPLARS: Final = 2

Status: TypeAlias = Literal["selected", "not selected", "rejected"]


class ExplanationError(RuntimeError):
    """The store's data on a sample are missing or contradict each other; the message has the remedy."""


@dataclass(frozen=True, slots=True)
class Score:
    """A sample's place in the pool.

    Attributes:
        leverage: The stored leverage.
        normalised_leverage: n·leverage/k, by which the pool is ranked.
        rank: Place among all scored samples, from 1; ties by `sample_key`, then shard.
        pool: Scored samples.
        percentile: Percentage of the others that rank below: 100 for the first, 0 for the last.
        selected: Samples in the selected subset.
        lowest_selected: The lowest normalised leverage among them.
        k: Directions of the basis that the sample is scored with.
        basis: Version of that basis.
    """

    leverage: float
    normalised_leverage: float
    rank: int
    pool: int
    percentile: float
    selected: int
    lowest_selected: float | None
    k: int
    basis: str


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A sample that lies far along a direction.

    Attributes:
        shard: Its shard.
        row: Its row there.
        sample_key: Its key.
        source_id: Its own id.
        coordinate: u_ij.
        selected_rank: Its place in the selected subset; none where it is not selected.
    """

    shard: str
    row: int
    sample_key: str
    source_id: str | None
    coordinate: float
    selected_rank: int | None


@dataclass(frozen=True, slots=True)
class Direction:
    """The contribution of one direction to a sample's leverage.

    Attributes:
        direction: Its number, from 1; the strongest in the pool is 1.
        coordinate: u_ij; the sign tells on which side of the mean the sample lies.
        leverage: u_ij².
        share: Share of the sample's leverage, in [0, 1].
        singular_value: Singular value of the direction.
        energy_share: Share of the pool's energy, in [0, 1].
        same_side: The samples of the pool that lie furthest on the sample's side, furthest first.
        other_side: The furthest samples on the other side.
    """

    direction: int
    coordinate: float
    leverage: float
    share: float
    singular_value: float
    energy_share: float
    same_side: tuple[Exemplar, ...]
    other_side: tuple[Exemplar, ...]


@dataclass(frozen=True, slots=True)
class SimilarSample:
    """A sample whose vector points the same way from the pool's mean.

    Attributes:
        shard: Its shard.
        row: Its row there.
        sample_key: Its key.
        source_id: Its own id.
        cosine: Cosine of the two centred vectors, in [-1, 1].
        selected_rank: Its place in the selected subset; none where it is not selected.
    """

    shard: str
    row: int
    sample_key: str
    source_id: str | None
    cosine: float
    selected_rank: int | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that a sample's vector was made from.

    Attributes:
        n_tokens: Length of the model's input.
        n_vision_tokens: Image tokens in it.
        n_dominant_tokens: Those whose mean the vector is.
        n_instruction_tokens: Tokens that are neither vision nor content of an answer.
        vision_attention: Share of the instruction's attention that falls on vision tokens, in [0, 1].
    """

    n_tokens: int
    n_vision_tokens: int
    n_dominant_tokens: int
    n_instruction_tokens: int
    vision_attention: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a sample was selected, or not.

    Attributes:
        sample: Its key, id, shard, row and line.
        status: The outcome of the sample.
        selected_rank: Its place in the selected subset, if it is selected.
        reason: Why it was rejected, if it was: see `method.rejection.RejectionReason`.
        detail: What was found and what to do; likewise.
        score: Its place in the pool; none where it was rejected.
        directions: The directions that give most of its leverage, strongest first.
        similar: The samples most like it, most alike first.
        tokens: The tokens that its vector was made from; none where it was rejected.
        problems: Comparisons that could not be made, each with its remedy.
    """

    sample: SamplePlace
    status: Status
    selected_rank: int | None = None
    reason: str | None = None
    detail: str | None = None
    score: Score | None = None
    directions: tuple[Direction, ...] = ()
    similar: tuple[SimilarSample, ...] = ()
    tokens: Tokens | None = None
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "sample": self.sample.to_json()}

    def lines(self) -> Iterator[tuple[str, str]]:
        """Label and value of each line to print; what belongs to a line stands indented below it."""
        for name, value in self.sample.to_json().items():
            yield name.replace("_", " "), "-" if value is None else str(value)
        yield "", ""
        if self.status == "rejected":
            yield "rejected as", str(self.reason)
            yield "", str(self.detail)
        if self.score is not None:
            yield from self._score_lines(self.score)
        for direction in self.directions:
            yield "", ""
            side = "above" if direction.coordinate > 0 else "below"
            yield (
                f"direction {direction.direction}",
                f"{direction.share:.1%} of its leverage; {side} the mean; holds "
                f"{direction.energy_share:.1%} of the pool's energy",
            )
            for label, exemplars in (
                ("furthest on its side", direction.same_side),
                ("on the other side", direction.other_side),
            ):
                for place, other in enumerate(exemplars):
                    itself = (other.shard, other.row) == (self.sample.shard, self.sample.row)
                    name = _named(other.shard, other.row, other.sample_key, other.selected_rank)
                    name = "this sample" if itself else name
                    yield "" if place else f"  {label}", f"{other.coordinate:+.4f}  {name}"
        if self.similar:
            yield "", ""
        for place, near in enumerate(self.similar):
            name = _named(near.shard, near.row, near.sample_key, near.selected_rank)
            yield "" if place else "most like it (cosine)", f"{near.cosine:+.4f}  {name}"
        if self.tokens is not None:
            yield "", ""
            yield "tokens", f"{self.tokens.n_tokens:,}, of which {self.tokens.n_vision_tokens:,} vision"
            yield "  kept", f"{self.tokens.n_dominant_tokens:,} vision tokens, whose mean the vector is"
            yield (
                "  attention",
                f"{self.tokens.vision_attention:.1%} of that of {self.tokens.n_instruction_tokens:,} "
                "instruction tokens falls on vision",
            )

    def _score_lines(self, score: Score) -> Iterator[tuple[str, str]]:
        chosen = "" if self.selected_rank is None else f", rank {self.selected_rank:,} of {score.selected:,}"
        yield "status", f"{self.status}{chosen}"
        yield (
            "rank in the pool",
            f"{score.rank:,} of {score.pool:,}; {score.percentile:.1f} % of the others rank below",
        )
        yield "leverage", f"{score.leverage:.6g} in {score.k} directions"
        lowest = score.lowest_selected
        needed = "" if lowest is None else f"; the lowest selected has {lowest:.4g}"
        yield "  normalised", f"{score.normalised_leverage:.4g} where the pool's mean is 1{needed}"


def _named(shard: str, row: int, sample_key: str, selected_rank: int | None) -> str:
    chosen = "not selected" if selected_rank is None else f"selected, rank {selected_rank:,}"
    return f"{shard}#{row}  {sample_key}  {chosen}"
