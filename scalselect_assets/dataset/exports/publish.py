"""Writing the declared exports; order, images, refusals, records and preflight are alike for all formats.

Each export is a folder that replaces the last one whole: the format's own files and companion,
``selected_ids.jsonl`` (a line for each written row, in the order of the rows), ``rejected.jsonl`` (every row
that the pool rejected or the format refused, with the typed reason; rows that were only not chosen are not
listed) and, where images are beside the files, ``images.jsonl``. Costs: per export one pass over the spooled
texts, one over the written files for the preflight, one file status per image, and its bytes where they are
copied, linked or embedded; in memory some tens of bytes a row, a few hundred for each distinct image beside
the files, and one row.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from upath import UPath

from scalselect_assets.dataset.exports.axolotl import Axolotl
from scalselect_assets.dataset.exports.base import (
    Carried,
    Export,
    PlacedRow,
    Preflight,
    Refusal,
    Setting,
    write_line,
)
from scalselect_assets.dataset.exports.carried import carried_fields, refuse_uncarried
from scalselect_assets.dataset.exports.internvl import InternVl
from scalselect_assets.dataset.exports.llama_factory import LlamaFactory
from scalselect_assets.dataset.exports.llava import Llava
from scalselect_assets.dataset.exports.llava_next import LlavaNext
from scalselect_assets.dataset.exports.ms_swift import MsSwift
from scalselect_assets.dataset.exports.placed_images import (
    IMAGE_FOLDER,
    Images,
    images_for,
    require_links,
)
from scalselect_assets.dataset.exports.qwen_vl import QwenVl
from scalselect_assets.dataset.exports.rows import ExportRow, RowSpool
from scalselect_assets.dataset.exports.trl_parquet import TrlParquet
from scalselect_assets.dataset.exports.web_dataset import WebDataset
from scalselect_assets.declaration.export_specs import ExportSpec
from scalselect_assets.resources.folders import (
    HashedStream,
    NewFolder,
    WrittenFile,
    forget_folder,
    remove_folder,
    replaced_folder,
)
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.sample_source import SampleSource

FOLDER = "exports"
CODE_VERSION = "2"
"""The code version of all formats; a new one makes every declared export be written again."""
SELECTED, REJECTED = "selected_ids.jsonl", "rejected.jsonl"

_EXPORTS: tuple[Export, ...] = (
    LlamaFactory(),
    Llava(),
    LlavaNext(),
    QwenVl(),
    MsSwift(),
    Axolotl(),
    TrlParquet(),
    InternVl(),
    WebDataset(),
)
EXPORTS: dict[str, Export] = {export.name: export for export in _EXPORTS}
"""Every format by its name."""


def write_exports(
    specs: Sequence[ExportSpec],
    spool: RowSpool,
    source: SampleSource,
    folder: UPath,
    name: str,
    approve: "Callable[[Mapping[str, Report]], None]" = lambda _: None,
) -> "dict[str, Report]":
    """Replace the declared exports, all of them or, where anything fails, none.

    Args:
        specs: The declarations, at most one for each format.
        spool: The chosen rows.
        source: The pool, for its images.
        folder: Holds a folder for each export.
        name: The name of the datasets in companion files.
        approve: Called with all reports before the exports replace the last ones; if it raises an error, the
            last exports stay.

    Returns:
        The report of each format.

    Raises:
        ExportError: Images cannot be linked.
        OSError: Something cannot be read or written; the last exports are still there.
    """
    reports: dict[str, Report] = {}
    with ExitStack() as folders:
        for spec in specs:
            new = folders.enter_context(replaced_folder(folder / spec.format))
            reports[spec.format] = _fill(new, EXPORTS[spec.format], spec, spool, source, name)
        approve(reports)
    return reports


def require_possible(specs: Sequence[ExportSpec], source: SampleSource, folder: UPath) -> None:
    """Require that the declared exports can be written to their folders; nothing is written.

    Raises:
        ExportError: Images cannot be hard-linked between the pool and the store.
    """
    images = source.images_folder()
    for spec in specs:
        if spec.images == "hardlinked" and not EXPORTS[spec.format].embeds_images:
            require_links(images, folder / spec.format)


def remove_others(folder: UPath, kept: Sequence[str]) -> None:
    """Remove exports that are no longer declared.

    Raises:
        OSError: An export cannot be removed.
    """
    for format_name in EXPORTS:
        if format_name not in kept:
            forget_folder(folder / format_name)
    if not kept:
        remove_folder(folder)


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one export.

    Attributes:
        spec: Declaration of the export.
        folder: Folder of the export.
        images_base: The folder that image references start at; None if the images are embedded.
        chosen: Number of chosen rows.
        refused: Numbers of rows that the format refused, by reason.
        leading: Keys of the rows that were put first so that a reader sees all columns; usually empty.
        preflight: The verdict on the files.
        files: All files except the images.
        image_files: Number of images beside the files.
        image_bytes: Size of the images beside the files.
    """

    spec: ExportSpec
    folder: str
    images_base: str | None
    chosen: int
    refused: dict[str, int]
    leading: list[str]
    preflight: Preflight
    files: dict[str, WrittenFile]
    image_files: int
    image_bytes: int

    @property
    def written(self) -> int:
        """The number of rows in the files."""
        return self.chosen - sum(self.refused.values())

    def to_json(self) -> dict[str, Any]:
        """The report for the manifest, which describes the files separately."""
        return {
            **self.spec.model_dump(),
            "folder": self.folder,
            "images_base": self.images_base,
            "chosen": self.chosen,
            "written": self.written,
            "refused": self.refused,
            "leading_rows": self.leading,
            "preflight": self.preflight.to_json(),
            "files": sorted(self.files),
            "image_files": self.image_files,
            "image_bytes": self.image_bytes,
        }


def write_export(
    export: Export, spec: ExportSpec, spool: RowSpool, source: SampleSource, target: UPath, name: str
) -> Report:
    """Replace one export; the arguments and errors are those of `write_exports`."""
    with replaced_folder(target) as folder:
        return _fill(folder, export, spec, spool, source, name)


def _fill(
    folder: NewFolder, export: Export, spec: ExportSpec, spool: RowSpool, source: SampleSource, name: str
) -> Report:
    """Write an export into its new folder and check it by its trainer's rules."""
    if spool.has_embedded and spec.images == "referenced" and not export.embeds_images:
        # No trainer opens an image inside a shard of the pool.
        spec = spec.model_copy(update={"images": "copied"})
    images = images_for(spec, source, folder, embedded=export.embeds_images)
    setting = Setting(spec, name, images.base, images.is_there)
    writing = _Writing(export, spec, spool, images)
    with ExitStack() as streams:
        selected = streams.enter_context(folder.stream(SELECTED))
        rejected = streams.enter_context(folder.stream(REJECTED))
        selected.rows = rejected.rows = 0
        for record in spool.rejections():
            rejected.write(record)
            rejected.rows += 1
        export.write(writing.rows(selected, rejected), folder, setting)
    images.write_list(folder)
    verdict = export.preflight(folder, setting)
    expected = len(spool) - sum(writing.refused.values())
    verdict.require(verdict.rows == expected, f"{verdict.rows} rows are read, {expected} were to be written")
    verdict.require(writing.written == expected, f"{writing.written} rows were written, not {expected}")
    for field in Carried:
        n = writing.carried[field]
        verdict.require(verdict.carried[field] == n, f"{verdict.carried[field]} rows have {field}, not {n}")
    verdict.require(expected, "no row is left to train on")
    beside = [file for path, file in folder.files.items() if path.startswith(f"{IMAGE_FOLDER}/")]
    return Report(
        spec,
        str(folder.target),
        None if export.embeds_images else images.base,
        len(spool),
        dict(sorted(writing.refused.items())),
        writing.leading,
        verdict,
        {path: file for path, file in folder.files.items() if not path.startswith(f"{IMAGE_FOLDER}/")},
        len(beside),
        sum(file.bytes for file in beside),
    )


class _Writing:
    """The rows of one export in its order, each written or refused, and counted as one or the other."""

    def __init__(self, export: Export, spec: ExportSpec, spool: RowSpool, images: Images) -> None:
        self._export, self._spool, self._images = export, spool, images
        self._order = spool.order(spec.order, spec.seed)
        self.refused = Counter[str]()
        self.written = 0
        self.carried = Counter[str]()
        self.leading: list[str] = []

    def rows(self, selected: HashedStream, rejected: HashedStream) -> Iterator[PlacedRow]:
        for place in self._places():
            row = self._spool[place]
            placed = self._place(row)
            if isinstance(placed, Refusal):
                self.refused[placed.reason.value] += 1
                record = {"by": self._export.name, "reason": placed.reason.value, "detail": placed.detail}
                write_line(rejected, {**row.identity(), **record})
                continue
            scores = {name: getattr(row, name) for name in ("rank", "leverage", "normalised_leverage")}
            write_line(selected, {**row.identity(), **scores, "images": list(row.images)})
            self.written += 1
            self.carried.update(carried_fields(row))
            yield placed

    def _places(self) -> Iterator[int]:
        """The rows' numbers in order, led by rows with each column if the format's reader needs that."""
        leading = self._leading() if self._export.image_row_first else []
        self.leading = [self._spool[place].sample_key for place in leading]
        yield from leading
        for place in map(int, self._order):
            if place not in leading:
                yield place

    def _leading(self) -> list[int]:
        """The first writable row with each optional feature; empty if these rows lead the order already."""
        wanted: list[Callable[[int], bool]] = [
            self._spool.has_image,
            *(partial(self._carries, field) for field in sorted(self._export.carries)),
        ]
        found = dict.fromkeys(place for has in wanted if (place := self._first(has)) is not None)
        first = [int(place) for place in self._order[: len(found)]]
        return [] if set(found) == set(first) else list(found)

    def _first(self, has: Callable[[int], bool]) -> int | None:
        for place in map(int, self._order):
            if has(place) and isinstance(self._place(self._spool[place]), PlacedRow):
                return place
        return None

    def _carries(self, field: Carried, place: int) -> bool:
        return self._spool.may_have_trained_fields(place) and field in carried_fields(self._spool[place])

    def _place(self, row: ExportRow) -> PlacedRow | Refusal:
        refusal = refuse_uncarried(row, self._export.carries) or self._export.refuses(row)
        if refusal is not None:
            return refusal
        images = self._images.place(row)
        return images if isinstance(images, Refusal) else PlacedRow(row, images)


def pool_record(shard: str, rejected: dict[str, Any]) -> dict[str, Any]:
    """The record in ``rejected.jsonl`` of a row that the pool rejected (a row of `tables.REJECTED_ROWS`)."""
    return {
        "sample_key": rejected["sample_key"],
        "id": rejected["source_id"],
        "shard": shard,
        "row": rejected["row"],
        "line": rejected["line"],
        "by": "pool",
        "reason": rejected["reason"],
        "detail": rejected["detail"],
    }


def files(reports: Mapping[str, Report]) -> dict[str, dict[str, Any]]:
    """Hash, size and rows of every export file except images, by its path from the dataset's folder."""
    return {
        f"{FOLDER}/{format_name}/{name}": asdict(file)
        for format_name, report in reports.items()
        for name, file in sorted(report.files.items())
    }


def failed(reports: Mapping[str, Report]) -> dict[str, str]:
    """The formats whose preflight did not pass, each with its first problem."""
    return {
        format_name: report.preflight.problems[0]
        for format_name, report in reports.items()
        if not report.preflight.passed
    }


def metadata(reports: Mapping[str, Report]) -> dict[str, Any]:
    """The metadata for the UI: the folder and the numbers of written and refused rows of each format."""
    metadata_of: dict[str, Any] = {}
    for format_name, report in reports.items():
        metadata_of[f"export_{format_name}"] = report.folder
        metadata_of[f"export_{format_name}_rows"] = report.written
        metadata_of[f"export_{format_name}_refused"] = sum(report.refused.values())
    return metadata_of


def provenance(specs: Sequence[ExportSpec]) -> str:
    """A hash of the exports' declarations and code version, for the training dataset's provenance."""
    return digest(CODE_VERSION, [spec.model_dump() for spec in specs])
