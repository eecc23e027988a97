"""Budgets mean what they say, and the choice is the same on every machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalselect_assets.method.choice.budget import budget_size, parse_budget


@pytest.mark.parametrize(
    ("budget", "n_embedded", "size"),
    [
        (0.16, 624_610, 99_938),
        (0.5, 5, 3),  # 2.5, half up where banker's rounding gives 2
        (0.5, 7, 4),
        (0.145, 100, 15),  # 14.499999999999998 in float64
        (0.285, 100, 29),  # 28.499999999999996
        (0.1449, 100, 14),
        (0.07, 100, 7),  # 7.000000000000001
        (np.float64(0.145), 100, 15),
        (1.0, 7, 7),
        (0.001, 7, 1),  # at least one
        (1e-300, 7, 1),
        (1, 7, 1),
        (7, 7, 7),
        (100_000, 624_610, 100_000),
    ],
)
def test_a_budget_buys_this_many_rows(budget: int | float, n_embedded: int, size: int):
    got = budget_size(budget, n_embedded)
    assert got == size
    assert type(got) is int


@settings(deadline=None, max_examples=200)
@given(thousandths=st.integers(1, 1000), n=st.integers(1, 10**7))
def test_a_decimal_fraction_is_rounded_half_up_exactly(thousandths, n):
    assert budget_size(thousandths / 1000, n) == max(1, (thousandths * n + 500) // 1000)


def test_a_count_above_the_pool_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"8 rows with 7 embedded"):
        budget_size(8, 7)


@pytest.mark.parametrize("budget", [0.5, 1])
def test_an_empty_pool_is_refused(budget: int | float):
    with pytest.raises(ValueError, match="0 embedded rows"):
        budget_size(budget, 0)


@pytest.mark.parametrize(
    "budget", [True, False, 0, -3, 0.0, -0.1, 1.5, 100.0, float("nan"), float("inf"), "0.5", None]
)
def test_any_other_budget_is_refused_with_what_is_allowed(budget):
    with pytest.raises(ValueError, match=r"(?s)Got budget .*allowed is"):
        budget_size(budget, 10)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.16", 0.16),
        (".5", 0.5),
        ("16%", 0.16),
        ("14.5%", 0.145),
        ("7 %", 0.07),
        ("100%", 1.0),
        ("1", 1),
        ("1.0", 1.0),
        ("1.", 1.0),
        ("100000", 100_000),
        ("100_000", 100_000),
        (" 42\n", 42),
    ],
)
def test_a_written_budget_is_a_count_or_a_fraction(text: str, budget: int | float):
    got = parse_budget(text)
    assert got == budget
    assert type(got) is type(budget)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "many",
        "0",
        "0.0",
        "0%",
        "101%",
        "1.01",
        "100.0",
        "-5",
        "-0.1",
        "+5",
        "nan",
        "inf",
        "1e3",
        "1,000",
        "1__0",
        "_1",
        "5%%",
        "1_0%",
        "½",
        "٣",
    ],
)
def test_any_other_text_is_refused_and_quoted(text: str):
    with pytest.raises(ValueError, match=r"(?s)allowed is .*16%") as refusal:
        parse_budget(text)
    assert repr(text) in str(refusal.value)


@settings(deadline=None, max_examples=200)
@given(per_mille=st.integers(1, 1000))
def test_a_percentage_and_its_fraction_are_the_same_budget(per_mille):
    assert parse_budget(f"{per_mille / 10}%") == parse_budget(f"{per_mille / 1000:.3f}") == per_mille / 1000
