"""The settings of an export: its format, the order of its rows, and how it refers to images."""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias, get_args

import dagster as dg
from pydantic import AfterValidator, Field

FormatName: TypeAlias = Literal[
    "llama_factory",
    "llava",
    "llava_next",
    "qwen_vl",
    "ms_swift",
    "axolotl",
    "trl",
    "internvl",
    "webdataset",
]
FORMAT_NAMES: tuple[str, ...] = get_args(FormatName)


class ExportSpec(dg.Model, dg.Resolvable):
    """One export of the selected rows, in ``training_dataset/exports/<format>``."""

    format: FormatName = Field(description="The trainer whose files are written; see docs/exports.md.")
    order: Literal["shuffled", "score", "pool"] = Field(
        default="shuffled",
        description="Order of the rows: shuffled by the seed, by rank (rows without an image last), or as "
        "in the pool. Several trainers take the first N rows.",
    )
    seed: int = Field(
        default=0, description="Seed of the shuffled order, which is the same on every machine."
    )
    images: Literal["referenced", "copied", "hardlinked"] = Field(
        default="referenced",
        description="Whether the files name the pool's images in place, or copies or hard links in the "
        "export's folder; formats that contain the images (trl, webdataset) do so in any case.",
    )
    channel_field: str = Field(
        default="source",
        min_length=1,
        description="The field of the pool's rows that becomes `channel` (ms_swift).",
    )


def _distinct(exports: list[ExportSpec]) -> list[ExportSpec]:
    formats = [export.format for export in exports]
    if repeated := sorted({name for name in formats if formats.count(name) > 1}):
        raise ValueError(f"exports: {', '.join(repeated)} is declared twice; a format has one folder")
    return exports


ExportSpecs: TypeAlias = Annotated[list[ExportSpec], AfterValidator(_distinct)]
"""The exports of one selection, at most one of each format."""


def parse_exports(options: Sequence[str]) -> list[ExportSpec]:
    """The exports that ``format`` or ``format:setting=value,setting=value`` on a command line describe.

    Raises:
        ValueError: A format or setting is unknown, a value is not allowed, or a format is named twice.
    """
    exports = []
    for option in options:
        name, _, settings = option.partition(":")
        if name not in FORMAT_NAMES:
            raise ValueError(f"unknown export format {name!r}; there are {', '.join(FORMAT_NAMES)}")
        given = [setting.partition("=") for setting in settings.split(",") if setting]
        exports.append(ExportSpec.model_validate({"format": name, **{key: value for key, _, value in given}}))
    return _distinct(exports)
