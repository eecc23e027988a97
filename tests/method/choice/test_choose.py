"""Earlier rows stay as long as they are nearly as good, or as many as were promised, and the cost is told."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalselect_assets.method.choice.agreement import agree
from scalselect_assets.method.choice.choose import KeepEarlier, choose
from scalselect_assets.method.choice.strategies import (
    LeverageSampling,
    LongestText,
    Random,
    Spanning,
    TopLeverage,
)
from scalselect_assets.method.choice.terms import Budget, InfeasibleError, Quota
from tests.method.pools import blocks_of, candidates, of_rows, planted

scores = st.lists(st.floats(0, 4).map(lambda x: round(x, 1)), min_size=10, max_size=10)
few_rows = st.sets(st.integers(0, 9), max_size=7)
shares = st.integers(0, 10).map(lambda tenths: tenths / 10)


@settings(deadline=None, max_examples=300)
@given(scores, few_rows, st.integers(1, 9), shares)
def test_an_earlier_row_stays_while_its_score_is_within_the_slack(leverage, earlier, size, slack):
    pool = candidates(leverage)
    terms = agree(pool, Budget(size))
    without = choose(pool, TopLeverage(), terms)
    got = choose(pool, TopLeverage(), terms, earlier=sorted(earlier), keep=KeepEarlier(slack))
    threshold = min(leverage[row] for row in without.rows)
    stays = {row for row in earlier if leverage[row] >= (1 - slack) * threshold}
    assert len(got.rows) == len(set(got.rows.tolist())) == size
    # All of them, or as many as the budget has room for, the best first.
    best_staying = sorted(stays, key=lambda row: (-leverage[row], row))[:size]
    assert set(best_staying) <= set(got.rows.tolist())
    # The places that are left go to the best of the others.
    others = sorted(set(range(10)) - stays, key=lambda row: (-leverage[row], row))
    assert set(got.rows.tolist()) == {*best_staying, *others[: size - len(best_staying)]}


@settings(deadline=None, max_examples=300)
@given(scores, few_rows, st.integers(1, 9), shares)
def test_no_more_rows_are_new_than_the_churn_allows(leverage, earlier, size, max_churn):
    pool = candidates(leverage)
    terms = agree(pool, Budget(size))
    got = choose(pool, TopLeverage(), terms, earlier=sorted(earlier), keep=KeepEarlier(max_churn=max_churn))
    n_new = len(set(got.rows.tolist()) - earlier)
    assert len(set(got.rows.tolist())) == size
    # Where there are not enough earlier rows to keep, all of them stay.
    assert n_new <= max(np.floor(max_churn * size + 1e-9), size - len(earlier))
    assert n_new / size <= got.kept.churn_without


labels = st.lists(st.sampled_from("abc"), min_size=9, max_size=9)
bounds = st.dictionaries(st.sampled_from("abc"), st.integers(0, 4), max_size=2)
places = st.sets(st.integers(0, 8), max_size=2)


def meets(rows, columns, quotas, include, exclude):
    """Whether a set of rows is admissible; written without the code under test."""
    counts = [Counter(column[row] for row in rows) for column in columns]
    return (
        include <= set(rows)
        and not exclude & set(rows)
        and all(
            count[label] >= least
            for count, quota in zip(counts, quotas, strict=True)
            for label, least in quota.floors.items()
        )
        and all(
            count[label] <= most
            for count, quota in zip(counts, quotas, strict=True)
            for label, most in quota.ceilings.items()
        )
    )


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.integers(0, 9), min_size=9, max_size=9),
    st.sets(st.integers(0, 8), max_size=7),
    st.integers(1, 8),
    shares,
    st.sampled_from([0.0, 0.3]),
    st.lists(st.tuples(labels, bounds, bounds), min_size=1, max_size=2),
    places,
    places,
)
def test_beside_quotas_the_churn_is_kept_to_as_far_as_the_terms_allow(
    leverage, earlier, size, max_churn, slack, drawn, include, exclude
):
    columns = [column for column, _, _ in drawn]
    quotas = [Quota(f"label {number}", *drawn[number][1:]) for number in range(len(drawn))]
    pool = candidates(leverage, **{f"label {number}": column for number, column in enumerate(columns)})
    try:
        terms = agree(pool, Budget(size), quotas, include=sorted(include), exclude=sorted(exclude))
    except (InfeasibleError, ValueError):
        assume(False)
    got = choose(
        pool, TopLeverage(), terms, earlier=sorted(earlier), keep=KeepEarlier(slack, max_churn)
    ).rows.tolist()
    assert meets(got, columns, quotas, include, exclude)
    admissible = [
        set(rows) for rows in combinations(range(9), size) if meets(rows, columns, quotas, include, exclude)
    ]
    fewest_new = min(len(rows - earlier) for rows in admissible)
    allowed = max(math.floor(max_churn * size + 1e-9), fewest_new)
    assert len(set(got) - earlier) <= allowed
    # Of the choices that are left, the first in the order of preference, in which rows within the slack lead.
    possible = [rows for rows in admissible if len(rows - earlier) <= allowed]
    free = choose(pool, TopLeverage(), terms).rows[terms.n_held :]
    least = (1 - slack) * min((leverage[row] for row in free), default=math.inf)
    expected = set(include)
    for row in sorted(
        range(9), key=lambda row: (not (row in earlier and leverage[row] >= least), -leverage[row], row)
    ):
        if any(expected | {row} <= rows for rows in possible):
            expected.add(row)
    assert set(got) == expected


def test_an_earlier_row_that_a_ceiling_keeps_out_is_not_counted_as_staying():
    """Six rows, at most two of a source that has most of the earlier ones, and none may be new."""
    pool = candidates([9, 8, 7, 6, 5, 4, 3, 3, 3, 3], source=list("aaaabbbbbb"))
    terms = agree(pool, Budget(6), [Quota("source", ceilings={"a": 2})])
    earlier = [0, 1, 2, 3, 6, 7, 8, 9]
    got = choose(pool, TopLeverage(), terms, earlier=earlier, keep=KeepEarlier(max_churn=0.0))
    assert sorted(got.rows.tolist()) == [0, 1, 6, 7, 8, 9]
    assert got.kept.n_kept == 2


def test_a_row_that_must_be_chosen_counts_as_new_or_as_staying_as_it_is():
    pool = candidates([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    for include, chosen in (([4], [0, 3, 4, 5]), ([2], [2, 3, 4, 5])):
        terms = agree(pool, Budget(4), include=include)
        got = choose(pool, TopLeverage(), terms, earlier=[3, 4, 5], keep=KeepEarlier(max_churn=0.25))
        assert sorted(got.rows.tolist()) == chosen


def test_with_tokens_earlier_rows_come_first_until_few_enough_are_new():
    pool = candidates([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], text=[3, 3, 3, 3, 3, 3], source=list("aabbab"))
    terms = agree(pool, Budget(12, "text_tokens"), [Quota("source", ceilings={"a": 2})])
    got = choose(pool, TopLeverage(), terms, earlier=[3, 4, 5], keep=KeepEarlier(max_churn=0.25))
    assert sorted(got.rows.tolist()) == [0, 3, 4, 5]


def test_the_cost_of_keeping_is_reported():
    pool = candidates([5.0, 4.0, 3.0, 2.5, 1.0])
    terms = agree(pool, Budget(3))
    kept = choose(pool, TopLeverage(), terms, earlier=[3, 4], keep=KeepEarlier(slack=0.2)).kept
    assert kept.n_kept == 1
    assert kept.churn_without == 1.0
    assert kept.leverage_lost == pytest.approx(0.5 / 12)


def test_without_slack_an_earlier_row_only_wins_ties():
    pool = candidates([3.0, 2.0, 2.0, 1.9])
    terms = agree(pool, Budget(2))
    got = choose(pool, TopLeverage(), terms, earlier=[2, 3], keep=KeepEarlier())
    assert sorted(got.rows.tolist()) == [0, 2]
    assert got.kept.leverage_lost == 0


def test_a_churn_of_one_and_no_earlier_rows_change_nothing():
    pool = candidates(np.linspace(1, 2, 20))
    terms = agree(pool, Budget(5))
    plain = choose(pool, TopLeverage(), terms)
    assert plain.kept is None
    for keep, earlier in ((KeepEarlier(max_churn=1.0), [0, 1]), (KeepEarlier(0.5, 0.0), [])):
        got = choose(pool, TopLeverage(), terms, earlier=earlier, keep=keep)
        assert sorted(got.rows.tolist()) == sorted(plain.rows.tolist())


def test_terms_come_before_earlier_rows():
    pool = candidates([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], source=list("aabbbb"))
    terms = agree(pool, Budget(3), [Quota("source", {"a": 1}, {"b": 1})], include=[5], exclude=[4])
    got = choose(pool, TopLeverage(), terms, earlier=[2, 3, 4], keep=KeepEarlier(1.0))
    assert sorted(got.rows.tolist()) == [0, 1, 5]


def test_a_token_budget_holds_with_earlier_rows_too():
    pool = candidates([5.0, 4.0, 3.0], text=[5, 5, 9])
    terms = agree(pool, Budget(10, "text_tokens"))
    got = choose(pool, TopLeverage(), terms, earlier=[2], keep=KeepEarlier(0.5))
    assert got.rows.tolist() == [2]
    assert got.spent == 9


@pytest.mark.parametrize("strategy", [LongestText(), Spanning()], ids=["length", "spanning"])
def test_other_scores_than_leverage_keep_earlier_rows_too(strategy):
    u, _ = planted([9] * 5, 5)
    pool = of_rows(u)
    terms = agree(pool, Budget(10))
    plain = choose(pool, strategy, terms, blocks_of(u))
    earlier = np.setdiff1d(np.arange(pool.n), plain.rows)[:6]
    got = choose(pool, strategy, terms, blocks_of(u), earlier=earlier, keep=KeepEarlier(max_churn=0.4))
    assert len(np.intersect1d(got.rows, earlier)) == 6
    assert len(got.rows) == 10


@pytest.mark.parametrize("strategy", [Random(), LeverageSampling()], ids=["random", "leverage_sampling"])
def test_a_strategy_that_draws_keeps_nothing(strategy):
    pool = candidates(np.ones(4))
    with pytest.raises(ValueError, match="draws at random"):
        choose(pool, strategy, agree(pool, Budget(2)), earlier=[0], keep=KeepEarlier())


def test_shares_and_rows_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"slack 1\.5; allowed is 0 to 1"):
        KeepEarlier(1.5)
    with pytest.raises(ValueError, match=r"max_churn -0\.1"):
        KeepEarlier(max_churn=-0.1)
    pool = candidates(np.ones(4))
    with pytest.raises(ValueError, match="earlier row 4; allowed is 0 to 3"):
        choose(pool, TopLeverage(), agree(pool, Budget(2)), earlier=[4], keep=KeepEarlier())
