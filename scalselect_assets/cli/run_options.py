"""The options of `scalselect run`, in groups; each group turns its options into settings of a declaration.

An option that is not given is None, and the store's declaration keeps what it says.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, get_args

import typer

from scalselect_assets.cli.options import (
    PAPER_MODEL,
    Device,
    DeviceOption,
    Dtype,
    ImagePlaceName,
    absolute_place,
)
from scalselect_assets.declaration.choice_settings import StrategyName, parse_quota
from scalselect_assets.declaration.export_specs import parse_exports
from scalselect_assets.method.choice.budget import parse_budget
from scalselect_assets.method.subspace.rank import FixedRank, parse_rank_rule
from scalselect_assets.resources.vlm import VlmResource


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Options for reading the rows of the pool."""

    PANEL: ClassVar = "The pool"

    image_root: Annotated[
        str | None,
        typer.Option(help="Folder that image paths start from. (default: the folder of each shard)"),
    ] = None
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of files in the pool that are no shards; may be given several times."),
    ] = None
    text_only: Annotated[
        str | None,
        typer.Option(
            help="Rows without an image: drop, keep, or how many (a share or a number). (default: drop)"
        ),
    ] = None
    source_label: Annotated[
        str | None,
        typer.Option(
            help="Where the name of a row's source stands: source (its field), shard, shard_folder, "
            "image_folder or field:NAME. (default: source)"
        ),
    ] = None
    accept_missing_images: Annotated[
        bool,
        typer.Option(
            "--accept-missing-images",
            help="Agree that missing images are gone: their rows give up their vectors, this time only.",
        ),
    ] = False

    def settings(self) -> dict[str, Any]:
        """The settings that these options declare."""
        text_only: Any = self.text_only
        if text_only not in {None, "drop", "keep"}:
            text_only = _amount("--text-only", text_only)
        return {
            "image_root": _place(self.image_root),
            "ignore": self.ignore or None,
            "text_only": text_only,
            "source_label": self.source_label,
        }


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The target model and how it represents a sample."""

    PANEL: ClassVar = "The target model"

    model: Annotated[
        str | None,
        typer.Option(
            help=f"The model that you are going to fine-tune: a local folder or a hub id. "
            f"(default: {PAPER_MODEL})"
        ),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Number type of weights and activations; auto takes bfloat16 for a checkpoint in half "
            "precision and float32 for others. (default: auto)"
        ),
    ] = None
    attention_mass: Annotated[
        float | None, typer.Option(help="Attention share of the kept vision tokens. (default: 0.9)")
    ] = None

    def settings(self) -> dict[str, Any]:
        """The settings that these options declare."""
        return {
            "target_model": self.model,
            "model_revision": self.revision,
            "dtype": self.dtype and self.dtype.value,
            "attention_mass": self.attention_mass,
        }


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """The place and the size of images in the prompt."""

    PANEL: ClassVar = "Images in the prompt"

    image_place: Annotated[
        ImagePlaceName | None,
        typer.Option(
            help="first: in front of the first question, if all marks of the row are in its turn; or "
            "as_written. (default: first)"
        ),
    ] = None
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the longest side, at most (Idefics3, SmolVLM).")
    ] = None
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Pixels of an image, at least (Qwen-VL).")] = (
        None
    )
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Pixels of an image, at most (Qwen-VL).")] = (
        None
    )
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Tiles that an image is cut into, at most (InternVL).")
    ] = None

    def settings(self) -> dict[str, Any]:
        """The settings that these options declare."""
        return {**asdict(self), "image_place": self.image_place and self.image_place.value}


@dataclass(frozen=True, slots=True)
class SubspaceOptions:
    """The subspace that the scores refer to."""

    PANEL: ClassVar = "The subspace"

    energy: Annotated[float | None, typer.Option(help="Energy share of the subspace. (default: 0.9)")] = None
    rank: Annotated[
        str | None,
        typer.Option(
            help="How many directions: energy, gavish_donoho, effective_rank or a number. (default: energy)"
        ),
    ] = None
    standardise: Annotated[
        bool | None,
        typer.Option(
            "--standardise/--no-standardise",
            help="Divide columns by their standard deviation? (default: no)",
            show_default=False,
        ),
    ] = None
    unit_rows: Annotated[
        bool | None,
        typer.Option(
            "--unit-rows/--no-unit-rows",
            help="Scale embeddings to length 1? (default: no)",
            show_default=False,
        ),
    ] = None
    rebuild_basis: Annotated[
        bool, typer.Option("--rebuild-basis", help="Add up the moments of all shards again, this time only.")
    ] = False

    def settings(self) -> dict[str, Any]:
        """The settings that these options declare; a rebuild is an order to one run and no setting."""
        rank: str | int | None = self.rank
        if self.rank is not None:
            try:
                rule = parse_rank_rule(self.rank)
            except ValueError as error:
                raise typer.BadParameter(f"--rank: {error}") from error
            rank = rule.k if isinstance(rule, FixedRank) else self.rank
        return {
            "energy": self.energy,
            "rank": rank,
            "standardise": self.standardise,
            "unit_rows": self.unit_rows,
        }


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """Which samples are chosen, and the files that they are written to."""

    PANEL: ClassVar = "The choice and its files"

    budget: Annotated[
        str | None, typer.Option(help="Fraction (0.16, 16%) or number of samples. (default: 0.16)")
    ] = None
    image_tokens: Annotated[str | None, typer.Option(help="A budget of vision tokens, instead of rows.")] = (
        None
    )
    text_tokens: Annotated[
        str | None, typer.Option(help="A budget of all other tokens, instead of rows.")
    ] = None
    strategy: Annotated[
        str | None,
        typer.Option(
            help=f"How samples are preferred: {', '.join(get_args(StrategyName))}. (default: top_leverage)"
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of strategies that draw at random. (default: 0)")
    ] = None
    floor: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE=ROWS or SOURCE=SHARE: choose at least so much of the budget from SOURCE."),
    ] = None
    ceiling: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE=ROWS or SOURCE=SHARE: choose at most so much of the budget from SOURCE."),
    ] = None
    include: Annotated[
        str | None,
        typer.Option(
            help="File of samples that must be chosen: on each line an id, a key or the SHA-256 of an image."
        ),
    ] = None
    exclude: Annotated[
        str | None, typer.Option(help="File of samples that must not be chosen, in the same form.")
    ] = None
    export: Annotated[
        list[str] | None,
        typer.Option(
            help="Also write for a trainer: FORMAT or FORMAT:order=score,images=copied; see docs/exports.md."
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """The settings that these options declare."""
        return {
            **self._budget(),
            "strategy": self.strategy,
            "seed": self.seed,
            "quotas": self._quotas(),
            "include": _place(self.include),
            "exclude": _place(self.exclude),
            "exports": self._exports(),
        }

    def _budget(self) -> dict[str, Any]:
        budgets = {
            "rows": _amount("--budget", self.budget),
            "image_tokens": _amount("--image-tokens", self.image_tokens),
            "text_tokens": _amount("--text-tokens", self.text_tokens),
        }
        given = {unit: amount for unit, amount in budgets.items() if amount is not None}
        if len(given) > 1:
            raise typer.BadParameter(
                "--budget, --image-tokens and --text-tokens exclude each other; give one"
            )
        return {"budget": given.get("rows", given or None)}

    def _quotas(self) -> list[Any] | None:
        """Quotas by source; quotas by other labels are declared in the store's selection.yaml."""
        try:
            quota = parse_quota(self.floor or [], self.ceiling or [])
        except ValueError as error:
            raise typer.BadParameter(f"--floor, --ceiling: {error}") from error
        return None if quota is None else [quota]

    def _exports(self) -> Any:
        try:
            return parse_exports(self.export) if self.export else None
        except ValueError as error:
            raise typer.BadParameter(f"--export: {error}") from error


@dataclass(frozen=True, slots=True)
class RemovalOptions:
    """Samples that are removed before the choice."""

    PANEL: ClassVar = "Samples to remove before the choice"

    near_duplicates: Annotated[
        str | None,
        typer.Option(
            metavar="COSINE",
            help="Remove samples with the text of a sample of higher leverage and at least this cosine with "
            "it; `suggested` takes the cosine from the pool.",
        ),
    ] = None
    contentless_pictures: Annotated[
        str | None,
        typer.Option(
            metavar="keep|remove",
            help="Remove samples whose pictures are of one colour or noise? (default: keep)",
        ),
    ] = None
    evaluation_images: Annotated[
        str | None, typer.Option(help="Remove samples whose image is in this folder.")
    ] = None
    evaluation_texts: Annotated[
        str | None, typer.Option(help="Remove samples that contain a text of this file.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """The settings that these options declare."""
        evaluation = {"images": _place(self.evaluation_images), "texts": _place(self.evaluation_texts)}
        return {
            "near_duplicates": self._near_duplicates(),
            "contentless_pictures": self.contentless_pictures,
            "decontamination": evaluation if any(evaluation.values()) else None,
        }

    def _near_duplicates(self) -> dict[str, Any] | None:
        if self.near_duplicates in {None, "suggested"}:
            return None if self.near_duplicates is None else {"cosine": "suggested"}
        try:
            return {"cosine": float(str(self.near_duplicates))}
        except ValueError as error:
            raise typer.BadParameter(
                f"--near-duplicates: {self.near_duplicates!r} is neither a cosine, such as 0.995, nor "
                "`suggested`"
            ) from error


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """The store that a run writes to."""

    PANEL: ClassVar = "The store"

    store: Annotated[
        str | None,
        typer.Option(
            help="Folder for everything that is computed. (default: .scalselect/<name>)", show_default=False
        ),
    ] = None
    name: Annotated[
        str | None, typer.Option(help="Prefix of the asset keys. (default: from the name of the pool)")
    ] = None
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Read the whole store first, and make again what is damaged or wrong."),
    ] = False


@dataclass(frozen=True, slots=True)
class ComputingOptions:
    """Options for the speed of a run; none of them changes a result."""

    PANEL: ClassVar = "Computing (changes no result)"

    device: DeviceOption = Device.AUTO
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a batch. (default: 4096, on a GPU 16384)"),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes that decode images ahead. (default: one thread, on a GPU most cores)"
        ),
    ] = None

    def vlm(self) -> VlmResource:
        """The model resource that these options configure."""
        return VlmResource(device=self.device.value, batch_tokens=self.batch_tokens, workers=self.workers)


def _amount(option: str, text: str | None) -> int | float | None:
    try:
        return None if text is None else parse_budget(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from error


def _place(location: str | None) -> str | None:
    return location and absolute_place(location)
