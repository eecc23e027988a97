"""What a deployment declares: one pool, one target model, one budget.

A deployment may hold several selections; each has its own asset keys (``[name, asset]``), partitions and
store. Declarations are YAML files that `definitions.py` finds and that ``scalselect run`` writes. They have
the form of Dagster's component files; `scalselect_assets.component` is the component.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict

import dagster as dg
import yaml
from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from scalselect_assets.declaration.choice_settings import (
    Comparison,
    DeclaredQuota,
    KeptEarlier,
    Label,
    StrategyName,
    TokenBudget,
)
from scalselect_assets.declaration.curation import Decontamination, NearDuplicates
from scalselect_assets.declaration.export_specs import ExportSpecs
from scalselect_assets.method.choice.budget import budget_size
from scalselect_assets.method.choice.terms import Budget
from scalselect_assets.method.representation.image_place import DEFAULT_IMAGE_PLACE
from scalselect_assets.method.representation.image_size import ImageSize
from scalselect_assets.method.subspace.rank import DEFAULT_ENERGY_THRESHOLD, RankRule, parse_rank_rule
from scalselect_assets.recording.partitions import shard_partitions
from scalselect_assets.resources.vlm import TargetModel

DECLARATION_TYPE = "scalselect_assets.component.SelectionComponent"
"""The ``type`` of a declaration: the component that Dagster builds from the same file."""

_EARLIER_TYPES = ("scalselect_assets.selection.Selection",)  # declared by stores of earlier releases


# Fields that say when and for whom the results are made.
_DRIVING = {
    *("report", "settle_seconds", "owners"),
    *("automation", "automation_seconds", "nightly_cron", "nightly_timezone"),
}


# Settings that are retired, with the only value that is still accepted. Earlier releases wrote them to every
# declaration and hashed them, so they stay in the hashes: a store that is up to date remains so.
RETIRED_SETTINGS: Mapping[str, Any] = {"max_drift": 0.0}


# Fields that the choice depends on.
_CHOICE = {
    *(
        "budget",
        "strategy",
        "seed",
        "source_label",
        "quotas",
        "include",
        "exclude",
        "keep_earlier",
        "compare",
    ),
}


_EXPECTED_SHARE = 0.16  # of rows, where a budget is a number of tokens: the paper's


class SelectionFileError(ValueError):
    """A declaration cannot be read; the message names the file and what is wrong with it."""


class AssetOptions(TypedDict):
    """What the assets of one selection have in common."""

    key: dg.AssetKey
    group_name: str
    owners: list[str]
    partitions_def: dg.PartitionsDefinition[str] | None
    backfill_policy: dg.BackfillPolicy | None


class Selection(dg.Model):
    """Choose training samples from one pool for one target VLM."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_]+$",
        description="Prefix of the asset keys: letters, digits and underscores.",
    )
    source: str = Field(description="Folder (or file, or URI) of the pool's shard files.")
    store: str = Field(description="Folder or URI for all that is computed.")
    target_model: str = Field(description="The VLM that will be fine-tuned: local folder or hub id.")
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Of the model's weights and activations."
    )
    image_root: str | None = Field(
        default=None,
        description="What image paths are relative to; by default the folder of each shard file.",
    )
    attention_mass: float = Field(
        default=0.9, gt=0, le=1, description="Share of attention that the kept vision tokens exceed (τ)."
    )
    image_place: Literal["first", "as_written"] = Field(
        default=DEFAULT_IMAGE_PLACE,
        description="Where a row's images stand in the prompt: in front of the first user turn if all its "
        "marks are in that turn (the published code), or where the marks are written. It should be what the "
        "training will do.",
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Pixels that the longest side of an image is scaled to at most, for models whose "
        "processor knows it (Idefics3, SmolVLM); by default the processor's own.",
    )
    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Pixels that a smaller image is scaled up to (Qwen-VL); by default the processor's own.",
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Pixels that a larger image is scaled down to (Qwen-VL); by default the processor's own.",
    )
    max_tiles: int | None = Field(
        default=None,
        ge=1,
        description="Tiles that an image is cut into at most (InternVL); by default the processor's own.",
    )
    energy: float = Field(
        default=DEFAULT_ENERGY_THRESHOLD,
        gt=0,
        le=1,
        description="Share of the energy that the subspace's directions hold.",
    )
    rank: int | Literal["energy", "gavish_donoho", "effective_rank"] = Field(
        default="energy",
        description="How the subspace's rank k is chosen: by the energy threshold, by a rule of the "
        "literature (see scalselect_assets.method.subspace.rank), or a number of directions.",
    )
    standardise: bool = Field(
        default=False, description="Divide each column by its standard deviation; the paper does not."
    )
    unit_rows: bool = Field(
        default=False, description="Scale each embedding to length 1 first; the paper does not."
    )
    max_drift: float = Field(
        default=0.0, description="Retired: every shard is scored again when the basis moves."
    )
    budget: int | float | TokenBudget = Field(
        default=0.16,
        description="Fraction of the embedded samples if a float in (0, 1], their number, or a budget of "
        "tokens (image_tokens or text_tokens).",
    )
    strategy: StrategyName = Field(
        default="top_leverage",
        description="What is preferred: the highest leverage (the paper), high leverage in every part of the "
        "subspace, rows drawn in proportion to leverage, rows that span the subspace together, or a "
        "comparator.",
    )
    seed: int = Field(default=0, ge=0, description="Of strategies and exports that draw.")
    source_label: Label = "source"
    quotas: list[DeclaredQuota] = Field(
        default=[], description="Floors and ceilings by source, or by any other label; one entry for each."
    )
    include: str | None = Field(
        default=None,
        description="Text file of samples that must be chosen, one a line: source id, sample key, or the "
        "SHA-256 of an image.",
    )
    exclude: str | None = Field(default=None, description="The same, of samples that must not be chosen.")
    keep_earlier: KeptEarlier | None = Field(
        default=None, description="Bounds on how far the choice moves from the last one; by default none."
    )
    near_duplicates: NearDuplicates | None = Field(
        default=None, description="Remove samples that repeat one of higher leverage; by default none."
    )
    decontamination: Decontamination | None = Field(
        default=None, description="Remove samples that an evaluation set holds; by default none."
    )
    contentless_pictures: Literal["keep", "remove"] = Field(
        default="keep",
        description="Whether samples are removed whose pictures are all of one colour or noise, as broken "
        "scans are; leverage prefers them. Nothing that shows something is removed, however rare.",
    )
    report: bool = Field(default=True, description="Whether the result is told on a page for people.")
    compare: Comparison | None = Field(
        default=Comparison(), description="What the choice is measured beside; null for nothing."
    )
    text_only: Literal["drop", "keep"] | int | float = Field(
        default="drop",
        description="Whether rows without an image are added to the training dataset, on top of the budget: "
        "none, all, or a seeded draw of so many (a fraction of them if a float).",
    )
    exports: ExportSpecs = Field(
        default=[],
        description="Trainers' own formats that the training dataset is written in beside, one of a format.",
    )
    settle_seconds: float = Field(
        default=3.0,
        ge=0,
        allow_inf_nan=False,
        description="A shard whose file or images were modified more recently is taken to be still being "
        "written, and waits.",
    )
    owners: list[Annotated[str, StringConstraints(pattern=r"^(team:[\w-]+|[^@\s]+@[^@\s]+)$")]] = Field(
        default=[], description="Who is asked about the assets, as the UI shows: addresses or team:<name>."
    )
    automation: Literal["refresh", "declarative", "declarative_nightly"] = Field(
        default="refresh",
        description="What brings the selection up to date: the refresh (by hand, by `scalselect run` or by "
        "the schedule <name>_nightly_rescoring), or Dagster's automation conditions through the sensors "
        "<name>_discovery and <name>_automation, as changes come or at the tick of nightly_cron. Each is off "
        "until a person turns it on.",
    )
    automation_seconds: int = Field(
        default=30, ge=1, description="How often the two sensors of declarative automation look."
    )
    nightly_cron: str = Field(
        default="0 2 * * *",
        description="When the schedule, or nightly declarative automation, begins.",
    )
    nightly_timezone: str = Field(default="UTC", description="In which nightly_cron is read: an IANA name.")

    @field_validator(*RETIRED_SETTINGS)
    @classmethod
    def _retired_setting_is_unused(cls, value: float, info: ValidationInfo) -> float:
        name = str(info.field_name)
        if value != (allowed := RETIRED_SETTINGS[name]):
            raise ValueError(
                f"got {value:g}, but {name} is retired and only {allowed:g} is still accepted, because every "
                f"shard is scored again when the basis moves. Remove the line {name} from the declaration."
            )
        return value

    @field_validator("budget")
    @classmethod
    def _budget_is_possible(cls, budget: int | float | TokenBudget) -> int | float | TokenBudget:
        # The pool's size is not known here; any size that a count fits in shows the other mistakes.
        if not isinstance(budget, TokenBudget):
            budget_size(budget, budget if isinstance(budget, int) and budget > 0 else 1)
        return budget

    @field_validator("text_only")
    @classmethod
    def _text_only_is_possible(cls, text_only: str | int | float) -> str | int | float:
        if not isinstance(text_only, str):
            budget_size(text_only, text_only if isinstance(text_only, int) and text_only > 0 else 1)
        return text_only

    @field_validator("rank")
    @classmethod
    def _rank_is_possible(cls, rank: int | str) -> int | str:
        parse_rank_rule(rank, DEFAULT_ENERGY_THRESHOLD)
        return rank

    @model_validator(mode="after")
    def _image_size_is_possible(self) -> Self:
        ImageSize(self.image_size, self.min_pixels, self.max_pixels, self.max_tiles)
        return self

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> Self:
        try:
            dg.ScheduleDefinition(
                job_name="any", cron_schedule=self.nightly_cron, execution_timezone=self.nightly_timezone
            )
        except dg.DagsterInvalidDefinitionError as error:
            raise ValueError(f"nightly_cron or nightly_timezone: {error}") from error
        return self

    @property
    def is_declarative(self) -> bool:
        """Whether Dagster's automation conditions drive it, and not the refresh."""
        return self.automation != "refresh"

    @property
    def rank_rule(self) -> RankRule:
        """The rule that chooses k."""
        return parse_rank_rule(self.rank, self.energy)

    @property
    def declared_budget(self) -> Budget:
        """What may be spent, as the method takes it."""
        return self.budget.to_budget() if isinstance(self.budget, TokenBudget) else Budget(self.budget)

    def expected_share(self, n_rows: int) -> float:
        """The share of ``n_rows`` that the budget is taken to buy before their tokens are known."""
        budget = self.declared_budget
        if isinstance(budget.amount, float):
            return budget.amount
        return min(1.0, budget.amount / n_rows) if budget.unit == "rows" else _EXPECTED_SHARE

    @property
    def removes_samples(self) -> bool:
        """Whether duplicates, contaminated or contentless samples are removed before the choice."""
        return bool(self.near_duplicates or self.decontamination or self.contentless_pictures == "remove")

    @property
    def labels(self) -> list[str]:
        """The labels that the choice asks of a row, the source first."""
        return list(
            dict.fromkeys([self.source_label, *(quota.label(self.source_label) for quota in self.quotas)])
        )

    def choice_settings(self) -> dict[str, Any]:
        """All that the choice depends on, beside scores and lists."""
        return self.model_dump(include=_CHOICE)

    @property
    def partitions(self) -> dg.DynamicPartitionsDefinition:
        """The shards of the pool."""
        return shard_partitions(self.name)

    @property
    def target(self) -> TargetModel:
        """What identifies the target model to `scalselect_assets.resources.vlm.VlmResource`."""
        return {
            "model": self.target_model,
            "revision": self.model_revision,
            "dtype": self.dtype,
            "attention_mass": self.attention_mass,
            "image_place": self.image_place,
            "image_size": self.image_size,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "max_tiles": self.max_tiles,
        }

    def result_settings(self) -> dict[str, Any]:
        """All that may change a result or what is told of it: not when it is made, nor who is asked."""
        return self.model_dump(exclude=_DRIVING | set(RETIRED_SETTINGS))

    def key(self, asset: str) -> dg.AssetKey:
        """The asset key of this selection's ``asset``."""
        return dg.AssetKey([self.name, asset])

    def asset_options(self, asset: str, *, by_shard: bool) -> AssetOptions:
        """What every asset of this selection has in common, for ``asset``."""
        return {
            "key": self.key(asset),
            "group_name": self.name,
            "owners": self.owners,
            "partitions_def": self.partitions if by_shard else None,
            # One run for all shards of a backfill, so that the model is loaded once.
            "backfill_policy": dg.BackfillPolicy.single_run() if by_shard else None,
        }

    def job_name(self, job: str) -> str:
        """Job names are global to a deployment, so they carry the selection's name."""
        return f"{self.name}_{job}"

    def to_yaml(self, *, in_store: bool = False) -> str:
        """The declaration that `read_selection` reads back; one that lies in its store moves with it."""
        declared = self.model_dump(exclude=set(RETIRED_SETTINGS))
        attributes = {**declared, **({"store": "."} if in_store else {})}
        return yaml.safe_dump(
            {"type": DECLARATION_TYPE, "attributes": attributes}, sort_keys=False, allow_unicode=True
        )


def _absolute(place: str, declaration: Path) -> str:
    """A path of a declaration, which is relative to the folder that the file is in."""
    return str((declaration.parent / Path(place).expanduser()).absolute())


def _attributes(declared: object, path: Path) -> dict[str, Any]:
    """The attributes of a declaration of one of the accepted types."""
    if not isinstance(declared, dict):
        raise SelectionFileError(
            f"{path} does not hold a mapping; write `type: {DECLARATION_TYPE}` and `attributes`"
        )
    if (kind := declared.get("type")) not in (DECLARATION_TYPE, *_EARLIER_TYPES):
        raise SelectionFileError(
            f"{path} declares the type {kind!r}; a selection has `type: {DECLARATION_TYPE}`, or "
            f"{' or '.join(_EARLIER_TYPES)} as earlier releases wrote"
        )
    attributes = declared.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise SelectionFileError(
            f"{path} has the `attributes` {attributes!r}; write one `name: value` a line"
        )
    return dict(attributes)


def read_selection(path: Path) -> Selection:
    """Read one declaration; relative local paths in it are relative to the file's folder.

    A target model is taken as a path where it begins with a dot; otherwise it may be a hub id. The type that
    earlier releases wrote is accepted too, so that their stores still open.

    Raises:
        SelectionFileError: Not YAML, not of this type, or an attribute is unknown, missing or out of range.
    """
    try:
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SelectionFileError(f"cannot read the selection {path}: {error}") from error
    attributes = _attributes(declared, path)
    for name in ("source", "store", "image_root", "target_model", "include", "exclude"):
        value = attributes.get(name)
        if not isinstance(value, str) or "://" in value:
            continue
        if name != "target_model" or value.startswith((".", "~")):
            attributes[name] = _absolute(value, path)
    if isinstance(evaluation := attributes.get("decontamination"), dict):
        attributes["decontamination"] = {
            name: _absolute(value, path)
            if name in {"images", "texts"} and isinstance(value, str) and "://" not in value
            else value
            for name, value in evaluation.items()
        }
    try:
        # Not through Dagster's templating: it would read a name of digits as a number.
        return Selection.model_validate(attributes)
    except ValueError as error:
        raise SelectionFileError(f"the selection {path} is not valid: {error}") from error
