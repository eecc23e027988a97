"""A choice that is less distinct than random is called repetitive, with what to try."""

import polars as pl
import pytest

from scalselect_assets.choice.advice import repetition, repetition_check
from scalselect_assets.choice.comparison import CHOICE, SUBSET_COMPARISON
from scalselect_assets.recording.columns import polars_schema


def compared(**shares: list[float]) -> pl.DataFrame:
    """A comparison with the given distinct shares by strategy, one row for each seed."""
    rows = [
        {"strategy": CHOICE if name == "choice" else name, "seed": seed, "rows": 8, "distinct_share": share}
        for name, values in shares.items()
        for seed, share in enumerate(values)
    ]
    return pl.DataFrame(rows, schema_overrides=polars_schema(SUBSET_COMPARISON))


def test_a_repetitive_choice_is_warned_of_with_the_strategy_that_is_more_distinct() -> None:
    found = repetition(compared(choice=[0.3], coverage=[0.7], random=[0.5, 0.7]))
    assert found is not None
    assert found.against_random == pytest.approx(0.5)
    assert "repeats itself: it is 50% as distinct" in found.advice()
    assert "--strategy coverage" in found.advice()
    check = repetition_check(found)
    assert (check.passed, check.severity.value) == (False, "WARN")
    assert check.metadata["distinct_against_random"].value == pytest.approx(0.5)


def test_a_choice_as_distinct_as_random_passes() -> None:
    found = repetition(compared(choice=[0.58], random=[0.5, 0.7]))
    assert found is not None
    assert not found.repeats_itself
    assert "Try" not in found.advice()
    assert repetition_check(found).passed


def test_a_random_strategy_is_not_recommended() -> None:
    found = repetition(compared(choice=[0.3], coverage=[0.2], random=[0.6]))
    assert found is not None
    assert "--strategy" not in found.advice()
    assert "--near-duplicates" in found.advice()


@pytest.mark.parametrize("shares", [{"choice": [0.3]}, {"random": [0.3]}, {}])
def test_without_random_beside_the_choice_there_is_no_advice(shares: dict[str, list[float]]) -> None:
    assert repetition(compared(**shares)) is None
    assert repetition_check(None).passed


def test_a_comparison_of_an_earlier_release_gives_no_advice() -> None:
    assert repetition(compared(choice=[0.3], random=[0.6]).drop("distinct_share")) is None
