"""The settings of the choice: its budget, its terms, and the strategies that it is compared with."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeAlias, get_args

import dagster as dg
from pydantic import ConfigDict, Field, model_validator

from scalselect_assets.method.choice.budget import budget_size
from scalselect_assets.method.choice.choose import KeepEarlier
from scalselect_assets.method.choice.terms import Budget, Quota

StrategyName: TypeAlias = Literal[
    "top_leverage",
    "coverage",
    "leverage_sampling",
    "spanning",
    "random",
    "stratified_random",
    "length",
]
Label: TypeAlias = Annotated[
    str,
    Field(
        pattern=r"^(source|shard|shard_folder|image_folder|field:.+)$",
        description="Where the name of a row's source stands: `source`, its field of that name, or as for "
        "`shard_folder` if it has none; `shard`; `shard_folder`, the folder of its shard below the pool, or "
        "the shard's own name where it is in none; `image_folder`, the first folder of its first image; or "
        "`field:NAME`, a field of the row, `field:meta.origin` one within another.",
    ),
]

_COUNT_OR_SHARE = Field(ge=0)


class _Declared(dg.Model, dg.Resolvable):
    model_config = ConfigDict(frozen=True)


class TokenBudget(_Declared):
    """A budget in tokens of the target model's input instead of rows: one of the two, never exceeded."""

    image_tokens: int | float | None = Field(
        default=None, description="Vision tokens: their number, or a fraction of the pool's if a float."
    )
    text_tokens: int | float | None = Field(
        default=None, description="All other tokens: their number, or a fraction of the pool's if a float."
    )

    @model_validator(mode="after")
    def _one_is_named(self) -> Self:
        if (self.image_tokens is None) == (self.text_tokens is None):
            raise ValueError("name image_tokens or text_tokens, one of them")
        amount = self.to_budget().amount
        budget_size(amount, amount if isinstance(amount, int) and amount > 0 else 1)  # the range is the same
        return self

    def to_budget(self) -> Budget:
        """The budget in the form that the method takes."""
        if self.image_tokens is not None:
            return Budget(self.image_tokens, "image_tokens")
        assert self.text_tokens is not None  # noqa: S101 - validated
        return Budget(self.text_tokens, "text_tokens")


class DeclaredQuota(_Declared):
    """Bounds on the number of chosen rows of each source; a source without a bound is free."""

    by: Label = "source"
    floors: dict[str, Annotated[int | float, _COUNT_OR_SHARE]] = Field(
        default={},
        description="The least that is chosen of each source: rows, or a share of the budget if a float.",
    )
    ceilings: dict[str, Annotated[int | float, _COUNT_OR_SHARE]] = Field(
        default={},
        description="The most that is chosen of each source: rows, or a share of the budget if a float.",
    )

    @model_validator(mode="after")
    def _floors_are_at_most_ceilings(self) -> Self:
        for value, floor in self.floors.items():
            ceiling = self.ceilings.get(value)
            if ceiling is not None and isinstance(floor, int) == isinstance(ceiling, int) and floor > ceiling:
                raise ValueError(
                    f"got a floor of {floor} and a ceiling of {ceiling} for {value!r}; the floor has to be "
                    "at most the ceiling. Change one of them."
                )
        return self

    def label(self, source_label: str) -> str:
        """The label that the quota counts by; ``source_label`` says where a row's source stands."""
        return source_label if self.by == "source" else self.by

    def to_quota(self, source_label: str) -> Quota:
        """The quota in the form that the method takes."""
        return Quota(self.label(source_label), self.floors, self.ceilings)


def parse_quota(floors: Sequence[str], ceilings: Sequence[str]) -> DeclaredQuota | None:
    """The quota that ``SOURCE=ROWS`` and ``SOURCE=SHARE`` on a command line describe; None without bounds.

    Raises:
        ValueError: A bound is not of this form.
    """
    if not floors and not ceilings:
        return None
    return DeclaredQuota(floors=_bounds(floors), ceilings=_bounds(ceilings))


def _bounds(written: Sequence[str]) -> dict[str, int | float]:
    bounds: dict[str, int | float] = {}
    for one in written:
        source, separator, bound = one.rpartition("=")
        if not separator or not source:
            raise ValueError(f"{one!r} is no bound; write SOURCE=ROWS (3) or SOURCE=SHARE (0.1)")
        try:
            bounds[source] = int(bound) if bound.isdecimal() else float(bound)
        except ValueError as error:
            raise ValueError(f"{bound!r} in {one!r} is neither a number of rows nor a share") from error
    return bounds


class KeptEarlier(_Declared):
    """Bounds on the change from the last choice."""

    slack: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="An earlier pick stays while its score is at least (1 - slack) times the lowest one "
        "that would be chosen without it.",
    )
    max_churn: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="The largest share of the chosen rows that may be new."
    )

    def to_keep(self) -> KeepEarlier:
        """The bounds in the form that the method takes."""
        return KeepEarlier(self.slack, self.max_churn)


class DeclaredComparison(_Declared):
    """The comparison of the choice with other strategies, under the same terms and by the same measures."""

    strategies: list[StrategyName] = Field(
        default=list(get_args(StrategyName)),
        description="The strategies that the choice is compared with.",
    )
    seeds: int = Field(default=3, ge=1, le=20, description="How many times a random strategy is drawn.")
    cosine: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="Rows whose centred vectors, within the subspace, have at least this cosine are "
        "near-duplicates.",
    )
    max_rows: int = Field(
        default=2_000_000,
        ge=1,
        description="Larger pools are not compared, since it takes memory for every row (some 300 bytes), a "
        "pass over all vectors, and 4·k bytes of temporary disk for every row.",
    )
