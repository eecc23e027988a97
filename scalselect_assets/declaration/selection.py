"""The declaration of a selection: one pool, one target model, one budget.

A deployment may hold several selections; each has its own asset keys (``[name, asset]``), partitions and
store. Declarations are YAML files that `definitions.py` finds and that ``scalselect run`` writes. They have
the form of Dagster's component files; `scalselect_assets.component` is the component.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias, TypedDict

import dagster as dg
import yaml
from pydantic import (
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from scalselect_assets.declaration.choice_settings import (
    DeclaredComparison,
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
from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.shown_text import has_credentials
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import TargetModel

DECLARATION_TYPE = "scalselect_assets.component.SelectionComponent"
"""The ``type`` of a declaration: the component that Dagster builds from the same file."""


# Fields that say when and for whom results are made, and change no result.
_DRIVING = {
    *("report", "settle_seconds", "owners", "ignore", "max_missing_images"),
    *("automation", "automation_seconds", "nightly_cron", "nightly_timezone"),
}


# Retired settings, each with the only value that is still accepted. Earlier releases wrote them into every
# declaration and hashed them, so they stay in the hashes, and a store that was up to date remains so.
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


NO_CREDENTIALS = (
    "a place names a user or a password; give them to the storage by its environment (for S3 "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or by the storage resource's options, and leave them out "
    "of the URI, which stands in files, records and messages"
)

_EXPECTED_SHARE = 0.16  # share of the rows if the budget is a number of tokens: the paper's


# The bound is inside the union, because Dagster's loader would apply an outer one to null, too.
_Positive: TypeAlias = Annotated[int, Field(ge=1)]


class AssetOptions(TypedDict):
    """Options of Dagster that all assets of a selection share."""

    key: dg.AssetKey
    group_name: str
    owners: list[str]
    partitions_def: dg.PartitionsDefinition[str] | None
    backfill_policy: dg.BackfillPolicy | None


class Selection(dg.Model):
    """Choose training samples from one pool for one target VLM."""

    # What was given may hold a password, and errors are printed and recorded.
    model_config = ConfigDict(hide_input_in_errors=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9_]+$",
        description="Prefix of the asset keys: letters, digits and underscores.",
    )
    source: str = Field(description="Folder (or file, or URI) of the pool's shard files.")
    store: str = Field(description="Folder or URI for everything that is computed.")
    target_model: str = Field(description="The VLM that will be fine-tuned: local folder or hub id.")
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number type of the model's weights and activations; auto is bfloat16 for a checkpoint "
        "in half precision and float32 for others, on every machine.",
    )
    image_root: str | None = Field(
        default=None,
        description="Folder that image paths start from; by default the folder of each shard file.",
    )
    ignore: list[str] = Field(
        default=[],
        description="Patterns (*.tmp.json, old/*) of files and folders in the pool that are no shards, on "
        "top of the usual ones (dataset_info.json, trainer_state.json, ...); !pattern takes one back.",
    )
    attention_mass: float = Field(
        default=0.9, gt=0, le=1, description="Share of attention that the kept vision tokens exceed (τ)."
    )
    image_place: Literal["first", "as_written"] = Field(
        default=DEFAULT_IMAGE_PLACE,
        description="Where a row's images stand in the prompt: in front of the first user turn if all its "
        "marks are in that turn (as in the published code), or where the marks are written. Choose the "
        "place that the training will use.",
    )
    image_size: _Positive | None = Field(
        default=None,
        description="Pixels that the longest side of an image is scaled to at most, for models whose "
        "processor knows it (Idefics3, SmolVLM); by default the processor's own.",
    )
    min_pixels: _Positive | None = Field(
        default=None,
        description="Pixels that a smaller image is scaled up to (Qwen-VL); by default the processor's own.",
    )
    max_pixels: _Positive | None = Field(
        default=None,
        description="Pixels that a larger image is scaled down to (Qwen-VL); by default the processor's own.",
    )
    max_tiles: _Positive | None = Field(
        default=None,
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
        description="How rows are preferred: by the highest leverage (the paper), by high leverage in every "
        "part of the subspace, drawn in proportion to leverage, by how well they span the subspace together, "
        "or by a comparator.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of everything that is drawn at random.",
    )
    source_label: Label = "source"
    quotas: list[DeclaredQuota] = Field(
        default=[], description="Floors and ceilings by source, or by any other label; one entry for each."
    )
    include: str | None = Field(
        default=None,
        description="Text file of samples that must be chosen, one a line: source id, sample key, or the "
        "SHA-256 of an image.",
    )
    exclude: str | None = Field(
        default=None, description="Text file of samples that must not be chosen, in the form of `include`."
    )
    keep_earlier: KeptEarlier | None = Field(
        default=None, description="Bounds on how far the choice moves from the last one; by default none."
    )
    near_duplicates: NearDuplicates | None = Field(
        default=None, description="Remove samples that repeat one of higher leverage; by default none."
    )
    decontamination: Decontamination | None = Field(
        default=None, description="Remove samples that an evaluation set contains; by default none."
    )
    contentless_pictures: Literal["keep", "remove"] = Field(
        default="keep",
        description="Whether samples are removed whose pictures are all of one colour or noise, as broken "
        "scans are; leverage prefers them. Nothing that shows something is removed, however rare.",
    )
    report: bool = Field(default=True, description="Whether a page for people describes the result.")
    compare: DeclaredComparison | None = Field(
        default=DeclaredComparison(),
        description="The strategies that the choice is compared with; null for none.",
    )
    text_only: Literal["drop", "keep"] | int | float = Field(
        default="drop",
        description="Whether rows without an image are added to the training dataset, on top of the budget: "
        "none, all, or a seeded draw of so many (a fraction of them if a float).",
    )
    exports: ExportSpecs = Field(
        default=[],
        description="Formats of trainers that the training dataset is also written in, at most once in each.",
    )
    settle_seconds: float = Field(
        default=3.0,
        ge=0,
        allow_inf_nan=False,
        description="A shard whose file or images were modified within this time counts as still being "
        "written, and waits.",
    )
    max_missing_images: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="A refresh stops where more than this share of the pool's images is missing that were "
        "there before: a disk that is not mounted. Until a person agrees, rows keep their vectors.",
    )
    owners: list[Annotated[str, StringConstraints(pattern=r"^(team:[\w-]+|[^@\s]+@[^@\s]+)$")]] = Field(
        default=[], description="Owners that the UI shows for the assets: addresses or team:<name>."
    )
    automation: Literal["refresh", "declarative", "declarative_nightly"] = Field(
        default="refresh",
        description="How the selection is brought up to date: by the refresh (by hand, by `scalselect run` "
        "or by the schedule <name>_nightly_rescoring), or by Dagster's automation conditions through the "
        "sensors <name>_discovery and <name>_automation, either at each change or at the tick of "
        "nightly_cron. Schedule and sensors are off until a person turns them on.",
    )
    automation_seconds: int = Field(
        default=30, ge=1, description="Seconds between two ticks of the sensors of declarative automation."
    )
    nightly_cron: str = Field(
        default="0 2 * * *",
        description="Start of the schedule, or of nightly declarative automation.",
    )
    nightly_timezone: str = Field(default="UTC", description="Time zone of nightly_cron: an IANA name.")

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

    @model_validator(mode="after")
    def _no_place_holds_credentials(self) -> Self:
        pending: list[object] = [self.model_dump()]
        while pending:
            value = pending.pop()
            if isinstance(value, dict | list):
                pending += value.values() if isinstance(value, dict) else value
            elif isinstance(value, str) and has_credentials(value):
                raise ValueError(NO_CREDENTIALS)
        return self

    @field_validator("budget")
    @classmethod
    def _budget_is_possible(cls, budget: int | float | TokenBudget) -> int | float | TokenBudget:
        # The size of the pool is unknown here. Other mistakes show with any size that the count fits in.
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
        """Whether Dagster's automation conditions drive the selection, and not the refresh."""
        return self.automation != "refresh"

    @property
    def rank_rule(self) -> RankRule:
        """The rule that chooses k."""
        return parse_rank_rule(self.rank, self.energy)

    @property
    def declared_budget(self) -> Budget:
        """The budget in the form that the method takes."""
        return self.budget.to_budget() if isinstance(self.budget, TokenBudget) else Budget(self.budget)

    def expected_share(self, n_rows: int) -> float:
        """The share of ``n_rows`` that the budget probably buys, estimated before their tokens are known."""
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
        """The labels of a row that the choice needs, the source first."""
        return list(
            dict.fromkeys([self.source_label, *(quota.label(self.source_label) for quota in self.quotas)])
        )

    def choice_settings(self) -> dict[str, Any]:
        """The settings that the choice depends on, beside scores and lists."""
        return self.model_dump(include=_CHOICE)

    @property
    def partitions(self) -> dg.DynamicPartitionsDefinition:
        """The shards of the pool."""
        return shard_partitions(self.name)

    @property
    def target(self) -> TargetModel:
        """The settings by which `scalselect_assets.resources.vlm.VlmResource` identifies the target model."""
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
        """The settings that may change a result or its description; not those of its schedule and owners."""
        return self.model_dump(exclude=_DRIVING | set(RETIRED_SETTINGS))

    def open_pool(self, storage: StorageResource) -> SampleSource:
        """The pool that is declared, without the files that are to be ignored."""
        return storage.samples(self.source, self.image_root, self.store, self.ignore)

    def key(self, asset: str) -> dg.AssetKey:
        """The asset key of this selection's ``asset``."""
        return dg.AssetKey([self.name, asset])

    def asset_options(self, asset: str, *, by_shard: bool) -> AssetOptions:
        """The options that all assets of this selection share, for ``asset``."""
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
        """The declaration as `read_selection` reads it; one in a store does not name the store's place."""
        declared = self.model_dump(exclude=set(RETIRED_SETTINGS))
        attributes = {**declared, **({"store": "."} if in_store else {})}
        return yaml.safe_dump(
            {"type": DECLARATION_TYPE, "attributes": attributes}, sort_keys=False, allow_unicode=True
        )
