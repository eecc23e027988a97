"""Budgets and quotas are kept to the row; what cannot be kept to is refused with the numbers."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalselect_assets.method.choice.agreement import agree
from scalselect_assets.method.choice.candidates import Candidates, Labels
from scalselect_assets.method.choice.proportions import proportional_sizes
from scalselect_assets.method.choice.taking import take
from scalselect_assets.method.choice.tally import Tally
from scalselect_assets.method.choice.terms import Budget, InfeasibleError, Quota, Terms
from tests.method.pools import candidates


def by_leverage(pool: Candidates, terms: Terms) -> list[int]:
    return take(terms, pool.by(pool.normalised_leverage, terms.eligible_rows)).tolist()


def admissible(terms: Terms, rows: tuple[int, ...]) -> bool:
    """By the words of the terms, not by the code."""
    chosen = np.array(rows, dtype=np.int64)
    allowed = set(np.flatnonzero(terms.held | terms.eligible).tolist())
    return (
        set(np.flatnonzero(terms.held).tolist()) <= set(rows) <= allowed
        and (terms.size is None or len(rows) == terms.size)
        and (terms.costs is None or terms.costs[chosen].sum() <= terms.tokens)
        and all(
            (column.floors <= column.counts(chosen)).all()
            and (column.counts(chosen) <= column.ceilings).all()
            for column in terms.columns
        )
    )


quota_numbers = st.dictionaries(st.sampled_from("abc"), st.integers(0, 4), max_size=3)
labels_of = st.lists(st.sampled_from("abc"), min_size=8, max_size=8)
few_scores = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.5]), min_size=8, max_size=8)
few_rows = st.sets(st.integers(0, 7), max_size=2)


@settings(deadline=None, max_examples=250)
@given(few_scores, labels_of, st.integers(1, 8), quota_numbers, quota_numbers, few_rows, few_rows)
def test_with_one_column_the_choice_has_the_largest_score_of_all_admissible_ones(
    scores, labels, size, floors, ceilings, include, exclude
):
    pool = candidates(scores, source=labels)
    try:
        terms = agree(
            pool,
            Budget(size),
            [Quota("source", floors, ceilings)],
            include=sorted(include),
            exclude=sorted(exclude),
        )
    except InfeasibleError:
        terms = None
    # The same terms, without what `agree` has found out.
    allowed = [row for row in range(8) if row not in exclude]
    best = [
        sum(scores[row] for row in rows)
        for rows in combinations(allowed, size)
        if include <= set(rows)
        and all(sum(labels[row] == label for row in rows) >= floor for label, floor in floors.items())
        and all(sum(labels[row] == label for row in rows) <= most for label, most in ceilings.items())
    ]
    if terms is None:
        assert not best
    else:
        chosen = by_leverage(pool, terms)
        assert admissible(terms, tuple(chosen))
        assert sum(scores[row] for row in chosen) == max(best)


@settings(deadline=None, max_examples=60)
@given(few_scores, labels_of, labels_of, st.integers(1, 7), quota_numbers, quota_numbers, quota_numbers)
def test_with_two_columns_the_choice_is_the_first_admissible_one_in_order(
    scores, sources, kinds, size, floors, ceilings, other_floors
):
    pool = candidates(scores, source=sources, kind=kinds)
    quotas = [Quota("source", floors, ceilings), Quota("kind", other_floors)]
    order = pool.by(pool.normalised_leverage, np.arange(8)).tolist()
    free = Terms(8, size, None, None, np.zeros(8, bool), np.ones(8, bool), ())

    def within(rows: tuple[int, ...]) -> bool:
        return admissible(free, rows) and all(
            low <= sum(labels[row] == label for row in rows) <= high
            for labels, at_least, at_most in ((sources, floors, ceilings), (kinds, other_floors, {}))
            for label in "abc"
            for low, high in [(at_least.get(label, 0), at_most.get(label, 8))]
        )

    # Combinations of the order come in the order of preference.
    first = next((rows for rows in combinations(order, size) if within(rows)), None)
    try:
        terms = agree(pool, Budget(size), quotas)
    except InfeasibleError:
        assert first is None
    else:
        assert by_leverage(pool, terms) == list(first or ())


@settings(deadline=None, max_examples=200)
@given(
    few_scores,
    labels_of,
    st.lists(st.integers(0, 6), min_size=8, max_size=8),
    st.integers(1, 30),
    quota_numbers,
    quota_numbers,
    few_rows,
)
def test_a_budget_of_tokens_is_never_exceeded_and_no_row_that_fits_is_passed_over(
    scores, labels, costs, tokens, floors, ceilings, include
):
    assume(0 < tokens <= sum(costs))
    pool = candidates(scores, text=costs, source=labels)
    quotas = [Quota("source", floors, ceilings)]
    possible = [
        rows
        for size in range(9)
        for rows in combinations(range(8), size)
        if include <= set(rows)
        and sum(costs[row] for row in rows) <= tokens
        and all(sum(labels[row] == label for row in rows) >= floor for label, floor in floors.items())
        and all(sum(labels[row] == label for row in rows) <= most for label, most in ceilings.items())
    ]
    try:
        terms = agree(pool, Budget(tokens, "text_tokens"), quotas, include=sorted(include))
    except InfeasibleError:
        assert possible in ([], [()])
        return
    chosen = by_leverage(pool, terms)
    assert tuple(sorted(chosen)) in possible
    assert terms.spent(np.array(chosen, np.int64)) == sum(costs[row] for row in chosen)
    # Lexicographically first: what was passed over did not go with what was taken before it.
    order = pool.by(pool.normalised_leverage, terms.eligible_rows).tolist()
    taken = set(include)
    for row in order:
        goes = any(taken | {row} <= set(rows) for rows in possible)
        assert (row in chosen) == goes
        if goes:
            taken.add(row)


def test_without_quotas_the_first_rows_are_taken():
    pool = candidates([1.0, 3.0, 2.0, 3.0])
    assert by_leverage(pool, agree(pool, Budget(3))) == [1, 3, 2]
    assert by_leverage(pool, agree(pool, Budget(0.5))) == [1, 3]


def test_ties_break_by_tie_order_and_not_by_place():
    pool = candidates([1.0, 1.0, 1.0], tie_order=[2, 0, 1])
    assert by_leverage(pool, agree(pool, Budget(2))) == [1, 2]


def test_rows_to_include_come_first_and_count():
    pool = candidates([5.0, 4.0, 3.0, 2.0])
    assert by_leverage(pool, agree(pool, Budget(2), include=[3])) == [3, 0]
    assert by_leverage(pool, agree(pool, Budget(2), exclude=[0, 1])) == [2, 3]


def test_shares_round_so_that_they_hold_as_written():
    pool = candidates(np.arange(30.0), source=["a"] * 10 + ["b"] * 20)
    terms = agree(pool, Budget(15), [Quota("source", {"a": 0.145}, {"b": 0.83})])
    assert terms.columns[0].floors.tolist() == [3, 0, 0]  # 2.175 up
    assert terms.columns[0].ceilings.tolist() == [30, 12, 30]  # 12.45 down


def test_labels_that_no_quota_names_are_free():
    pool = candidates([4.0, 3.0, 2.0, 1.0], source=["x", "y", "z", "w"])
    terms = agree(pool, Budget(2), [Quota("source", {"w": 1})])
    assert by_leverage(pool, terms) == [0, 3]


def test_a_token_budget_passes_over_what_does_not_fit():
    pool = candidates([4.0, 3.0, 2.0, 1.0], image=[6, 5, 4, 0])
    terms = agree(pool, Budget(10, "image_tokens"))
    assert by_leverage(pool, terms) == [0, 2, 3]


def test_tokens_are_kept_back_for_the_floors():
    pool = candidates([4.0, 3.0, 2.0, 1.0], text=[6, 5, 4, 3], source=["a", "a", "b", "b"])
    terms = agree(pool, Budget(10, "text_tokens"), [Quota("source", {"b": 1})])
    assert by_leverage(pool, terms) == [0, 2]
    assert by_leverage(pool, agree(pool, Budget(9, "text_tokens"), [Quota("source", {"b": 1})])) == [0, 3]


@pytest.mark.parametrize(
    ("budget", "quotas", "lists", "numbers"),
    [
        (3, [Quota("source", {"a": 2, "b": 2})], {}, "floors of 'source' need 4 rows, the budget has 3"),
        (5, [Quota("source", {}, {"a": 1, "b": 2})], {}, "leave room for 3 rows, the budget has 5"),
        (5, [Quota("source", {"a": 4})], {}, "floor of 4 rows for 'a' in 'source', which has 3"),
        (2, [Quota("source", {"none": 1})], {}, "floor of 1 rows for 'none' in 'source', which has 0"),
        (2, [Quota("source", {"a": 2}, {"a": 1})], {}, "floor of 2 rows and a ceiling of 1 for 'a'"),
        (3, [Quota("source", {}, {"a": 1})], {"include": [0, 1]}, "ceiling of 1 .*2 of them to include"),
        (
            2,
            [Quota("source", {"b": 1})],
            {"include": [0, 1]},
            "rows to include, need 3 rows, the budget has 2",
        ),
        (2, [], {"include": [0, 1, 2]}, "3 rows to include with a budget of 2"),
        (5, [], {"exclude": [0, 1]}, "budget of 5 rows with 4 left when 2 of 6 are excluded"),
        (2, [], {"include": [3], "exclude": [3]}, "1 rows both to include and to exclude.*row 3"),
        (
            2,
            [Quota("source", {"a": 1}), Quota("kind", {"p": 2})],
            {"exclude": [0]},
            "each column alone can be met, all together cannot",
        ),
    ],
)
def test_terms_that_contradict_each_other_are_refused_with_the_numbers(budget, quotas, lists, numbers):
    pool = candidates(np.ones(6), source=list("aaabbb"), kind=list("pqqppp"))
    with pytest.raises(InfeasibleError, match=numbers):
        agree(pool, Budget(budget), quotas, **lists)


@pytest.mark.parametrize(
    ("amount", "quotas", "lists", "numbers"),
    [
        (40, [], {}, "40 text tokens with 33 in the pool"),
        (2, [], {}, "2 text tokens, which no row fits: the cheapest has 3"),
        (9, [], {"include": [4, 5]}, "2 rows to include, of 15 text tokens together, with a budget of 9"),
        (9, [Quota("source", {"b": 2})], {}, "need at least 13 text tokens, the budget has 9"),
    ],
)
def test_a_token_budget_that_is_too_small_is_refused_with_the_numbers(amount, quotas, lists, numbers):
    pool = candidates(np.ones(6), text=[3, 4, 5, 6, 7, 8], source=list("aaabbb"))
    with pytest.raises(InfeasibleError, match=numbers):
        agree(pool, Budget(amount, "text_tokens"), quotas, **lists)


@pytest.mark.parametrize(
    ("budget", "quotas", "message"),
    [
        (Budget(2), [Quota("color", {"a": 1})], r"quota on 'color'.*\['source'\]"),
        (Budget(2), [Quota("source", {"a": -1})], "-1 as a quota of 'a'"),
        (Budget(2), [Quota("source", {"a": 1.5})], "1.5 as a quota of 'a'"),
        (Budget(2), [Quota("source", {"a": True})], "True as a quota of 'a'"),
        (Budget(2), [Quota("source"), Quota("source")], "one for each"),
        (Budget(2, "text_tokens"), [Quota("source", {"a": 0.5})], "0.5 as a quota .*budget of tokens"),
        (Budget(2, "words"), [], "budget in 'words'"),
        (Budget(0), [], "Got budget 0"),
    ],
)
def test_terms_that_mean_nothing_are_refused(budget, quotas, message):
    with pytest.raises(ValueError, match=message):
        agree(candidates(np.ones(3), source=list("aab")), budget, quotas)


def test_rows_outside_the_pool_are_refused():
    with pytest.raises(ValueError, match="row 3 to include; allowed is 0 to 2"):
        agree(candidates(np.ones(3)), Budget(1), include=[3])


def test_an_order_that_leaves_rows_out_is_refused():
    terms = agree(candidates(np.ones(3)), Budget(1), exclude=[2])
    with pytest.raises(ValueError, match="each of the 2 eligible rows once"):
        take(terms, np.array([0]))
    with pytest.raises(ValueError, match="each of the 2 eligible rows once"):
        take(terms, np.array([0, 2]))


@settings(deadline=None, max_examples=100)
@given(few_scores, labels_of, st.integers(1, 8), quota_numbers, quota_numbers)
def test_a_tally_with_one_column_admits_exactly_what_the_choice_takes(scores, labels, size, floors, ceilings):
    pool = candidates(scores, source=labels)
    try:
        terms = agree(pool, Budget(size), [Quota("source", floors, ceilings)])
    except InfeasibleError:
        assume(False)
    tally, taken = Tally(terms), []
    order = pool.by(pool.normalised_leverage, terms.eligible_rows)
    for row in order.tolist():
        if tally.admits(np.array([row]))[0]:
            tally.take(row)
            taken.append(row)
    assert taken == take(terms, order).tolist()
    assert tally.is_full


def test_many_rows_with_many_quotas_are_chosen_quickly_and_within_them():
    rng = np.random.default_rng(0)
    n = 20_000
    source, kind = (rng.choice([f"{name}{i}" for i in range(6)], n).tolist() for name in "sk")
    pool = candidates(rng.random(n), source=source, kind=kind)
    terms = agree(
        pool,
        Budget(3000),
        [
            Quota("source", {"s0": 700, "s1": 600}, {"s2": 100, "s3": 400}),
            Quota("kind", {"k0": 900}, {"k1": 20, "k2": 500}),
        ],
    )
    assert admissible(terms, tuple(by_leverage(pool, terms)))


@settings(deadline=None, max_examples=300)
@given(st.data(), st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_proportional_sizes_sum_up_keep_to_bounds_and_leave_no_fairer_whole_number(data, weights):
    floors = [data.draw(st.integers(0, 5)) for _ in weights]
    ceilings = [floor + data.draw(st.integers(0, 20)) for floor in floors]
    size = data.draw(st.integers(sum(floors), sum(ceilings)))
    sizes = proportional_sizes(weights, size, floors, ceilings)
    assert sum(sizes) == size
    assert all(low <= got <= high for low, got, high in zip(floors, sizes, ceilings, strict=True))
    # Where no bound is near, a larger weight never gets less.
    inner = [i for i in range(len(weights)) if floors[i] < sizes[i] < ceilings[i]]
    assert all(sizes[i] <= sizes[j] for i in inner for j in inner if weights[i] < weights[j])


def test_proportional_sizes_are_those_of_largest_remainders():
    # Hamilton's method: 41.7, 31.3, 27.0 of 10 are 4.17, 3.13, 2.70.
    assert proportional_sizes([417, 313, 270], 10) == [4, 3, 3]
    assert proportional_sizes([1, 1, 1], 2) == [1, 1, 0]
    assert proportional_sizes([0, 0, 0], 4) == [2, 1, 1]
    assert proportional_sizes([10, 1, 1], 12, ceilings=[4, 12, 12]) == [4, 4, 4]
    assert proportional_sizes([10, 1, 1], 12, floors=[0, 3, 0]) == [8, 3, 1]
    with pytest.raises(InfeasibleError, match="3 rows in proportion"):
        proportional_sizes([1, 1], 3, floors=[2, 2])


def test_labels_and_candidates_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="code 2 in row 1"):
        Labels(np.array([0, 2]), ("a", "b"))
    with pytest.raises(ValueError, match="sorted and distinct"):
        Labels(np.array([0]), ("b", "a"))
    with pytest.raises(ValueError, match="normalised_leverage nan in row 1"):
        candidates([1.0, np.nan])
    with pytest.raises(ValueError, match="tie order"):
        candidates([1.0, 1.0], tie_order=[0, 0])
    with pytest.raises(ValueError, match="1 labels of 'source' for 2 candidates"):
        candidates([1.0, 1.0], source=["a"])
    with pytest.raises(ValueError, match="0 candidates"):
        candidates([])
