"""Strategies prefer what their names say, draw by the probabilities they record, and repeat themselves."""

import tracemalloc
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scalselect_assets.method.choice.agreement import agree
from scalselect_assets.method.choice.candidates import Candidates, Labels, projected
from scalselect_assets.method.choice.choose import choose
from scalselect_assets.method.choice.spanning import spanning_order
from scalselect_assets.method.choice.strategies import (
    STRATEGIES,
    LeverageSampling,
    LongestText,
    Random,
    Spanning,
    StratifiedRandom,
    TopLeverage,
    inclusion_probabilities,
    strategy_named,
    systematic_sample,
)
from scalselect_assets.method.choice.taking import take
from scalselect_assets.method.choice.terms import Budget, InfeasibleError, Quota
from scalselect_assets.method.subspace.basis import fit_subspace
from scalselect_assets.method.subspace.moments import Moments
from tests.method.pools import blocks_of, candidates, of_rows, planted, whitened
from tests.method.vectors import rows

SIZES = [200, 100, 50, 20, 10, 8, 6, 5, 4, 3, 3, 2, 2, 2, 2]


def every_strategy() -> list:
    return [strategy_named(name, seed=3, stratify_by="source") for name in STRATEGIES]


def permuted(pool: Candidates, places: NDArray[np.int64]) -> Candidates:
    """The same rows, given in another order."""
    return Candidates(
        pool.normalised_leverage[places],
        pool.tie_order[places],
        pool.n_text_tokens[places],
        pool.n_image_tokens[places],
        {name: Labels(labels.codes[places], labels.values) for name, labels in pool.labels.items()},
    )


@pytest.fixture(scope="module")
def pool() -> tuple[NDArray[np.float64], Candidates]:
    u, groups = planted(SIZES, 8)
    labels = [f"source {group % 3}" for group in groups.tolist()]
    rng = np.random.default_rng(1)
    made = of_rows(u, source=labels)
    texts = rng.integers(1, 50, len(u))
    return u, Candidates(made.normalised_leverage, rng.permutation(len(u)), texts, texts, made.labels)


@pytest.mark.parametrize("strategy", every_strategy(), ids=STRATEGIES)
@pytest.mark.parametrize("budget", [Budget(40), Budget(0.1, "text_tokens")], ids=["rows", "tokens"])
@pytest.mark.parametrize(
    "quotas", [[], [Quota("source", {"source 2": 15}, {"source 0": 12})]], ids=["free", "quotas"]
)
def test_every_strategy_ranks_every_row_once_keeps_to_the_terms_and_repeats_itself(
    pool, strategy, budget, quotas
):
    u, made = pool
    terms = agree(made, budget, quotas, include=[7, 8], exclude=range(20, 60))
    ranking = strategy.rank(made, terms, blocks_of(u))
    assert sorted(ranking.order.tolist()) == terms.eligible_rows.tolist()
    assert all(len(values) == made.n for values in ranking.recorded.values())
    chosen = choose(made, strategy, terms, blocks_of(u))
    assert len(set(chosen.rows.tolist())) == len(chosen.rows)
    assert chosen.rows[:2].tolist() == [7, 8]
    assert chosen.n_held == 2
    assert not set(chosen.rows.tolist()) & set(range(20, 60))
    if budget.unit == "rows":
        assert chosen.spent == len(chosen.rows) == 40
    else:
        assert chosen.spent == made.n_text_tokens[chosen.rows].sum() <= terms.tokens
    for column in terms.columns:
        assert (column.counts(chosen.rows) >= column.floors).all()
        assert (column.counts(chosen.rows) <= column.ceilings).all()
    again = choose(made, strategy, terms, blocks_of(u))
    assert again.rows.tolist() == chosen.rows.tolist()
    for name, values in chosen.recorded.items():
        assert values.shape == chosen.rows.shape
        assert np.array_equal(values, again.recorded[name], equal_nan=True)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "spanning"])
def test_the_order_in_which_rows_are_given_does_not_change_the_choice(pool, name):
    u, made = pool
    strategy = strategy_named(name, seed=5, stratify_by="source")
    places = np.random.default_rng(2).permutation(made.n)
    shuffled = permuted(made, places)
    chosen = choose(made, strategy, agree(made, Budget(40)), blocks_of(u)).rows
    other = choose(shuffled, strategy, agree(shuffled, Budget(40)), blocks_of(u[places])).rows
    assert places[other].tolist() == chosen.tolist()


def test_the_default_is_top_leverage_with_ties_by_tie_order():
    assert strategy_named() == TopLeverage()
    pool = candidates([1.0, 2.0, 1.0, 3.0], tie_order=[3, 0, 1, 2])
    assert choose(pool, TopLeverage(), agree(pool, Budget(3))).rows.tolist() == [3, 1, 2]


def test_length_prefers_the_longest_text():
    pool = candidates([9.0, 1.0, 1.0], text=[3, 7, 7], tie_order=[0, 2, 1])
    assert choose(pool, LongestText(), agree(pool, Budget(2))).rows.tolist() == [2, 1]


def test_another_seed_draws_other_rows():
    pool = candidates(np.linspace(1, 2, 200))
    terms = agree(pool, Budget(50))
    for kind in (Random, LeverageSampling):
        assert set(choose(pool, kind(0), terms).rows) != set(choose(pool, kind(1), terms).rows)


def test_random_draws_every_pair_equally_often():
    pool = candidates(np.ones(4))
    terms = agree(pool, Budget(2))
    drawn = [tuple(sorted(choose(pool, Random(seed), terms).rows.tolist())) for seed in range(600)]
    counts = [drawn.count(pair) for pair in combinations(range(4), 2)]
    assert sum(counts) == 600
    # A binomial(600, 1/6) stays within this in all but 1 of 10,000 cases.
    assert all(abs(count - 100) < 40 for count in counts)


def test_stratified_random_takes_from_each_label_in_proportion_to_the_rounding():
    labels = ["a"] * 50 + ["b"] * 33 + ["c"] * 17
    pool = candidates(np.ones(100), source=labels)
    chosen = choose(pool, StratifiedRandom("source"), agree(pool, Budget(10))).rows
    assert sorted(labels[row] for row in chosen) == ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    quota = [Quota("source", {"c": 5}, {"a": 3})]
    chosen = choose(pool, StratifiedRandom("source"), agree(pool, Budget(10), quota, include=[99])).rows
    assert sorted(labels[row] for row in chosen) == ["a"] * 3 + ["b"] * 2 + ["c"] * 5


def test_stratified_random_stays_in_proportion_at_every_length_of_a_token_budget():
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    pool = candidates(np.ones(100), source=labels)
    for tokens in (10, 20, 50):
        chosen = choose(pool, StratifiedRandom("source"), agree(pool, Budget(tokens, "text_tokens"))).rows
        counts = [sum(labels[row] == label for row in chosen) for label in "abc"]
        assert np.abs(np.array(counts) - tokens * np.array([0.6, 0.3, 0.1])).max() <= 1


weights = st.lists(st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0, 3.0, 50.0]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=300)
@given(weights, st.data())
def test_inclusion_probabilities_are_proportional_up_to_one_and_sum_to_the_size(given_weights, data):
    weight = np.array(given_weights)
    size = data.draw(st.integers(0, len(weight)))
    got = inclusion_probabilities(weight, size)
    assert got.sum() == pytest.approx(size, abs=1e-12)
    assert ((got >= 0) & (got <= 1)).all()
    between = (got > 0) & (got < 1) & (weight > 0)
    if between.any():
        rates = got[between] / weight[between]
        assert rates == pytest.approx(rates[0])
        # Who is certain would exceed one at the rate of the others.
        assert (weight[got == 1] * rates[0] >= 1 - 1e-12).all()
    assert all(
        got[i] <= got[j] for i in range(len(weight)) for j in range(len(weight)) if weight[i] < weight[j]
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=15))
def test_a_systematic_sample_draws_each_row_for_exactly_its_share_of_the_starts(twentieths):
    total = sum(twentieths)
    padded = [*twentieths, -total % 20] if total % 20 else twentieths
    probability = np.array(padded) / 20
    size = sum(padded) // 20
    # The sample is the same for all starts of one twentieth, so that 20 starts stand for all.
    samples = np.array([systematic_sample(probability, size, (start + 0.5) / 20) for start in range(20)])
    assert (samples.sum(axis=1) == size).all()
    assert samples.sum(axis=0).tolist() == padded


@pytest.mark.parametrize("start", [np.finfo(float).tiny, 0.5, 1.0])
def test_a_large_systematic_sample_has_its_size_at_any_start(start: float):
    weight = np.random.default_rng(0).pareto(1.2, 200_000)
    probability = inclusion_probabilities(weight, 32_000)
    assert systematic_sample(probability, 32_000, start).sum() == 32_000


def test_leverage_sampling_draws_rows_as_often_as_it_says():
    leverage = np.array([8.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.0])
    pool = candidates(leverage)
    terms = agree(pool, Budget(3), include=[5], exclude=[3])
    draws = [choose(pool, LeverageSampling(seed), terms) for seed in range(800)]
    frequency = np.bincount(np.concatenate([draw.rows for draw in draws]), minlength=7) / 800
    probability = LeverageSampling(0).rank(pool, terms).recorded["inclusion_probability"]
    # 8 of 15 for two rows exceeds one; the other row is drawn in proportion among 4, 2, 1.
    assert probability == pytest.approx([1, 4 / 7, 2 / 7, 0, 1 / 7, 1, 0])
    assert np.abs(frequency - probability).max() < 4 * 0.5 / np.sqrt(800)
    assert frequency[[0, 5]].tolist() == [1, 1]
    assert frequency[[3, 6]].tolist() == [0, 0]


def test_leverage_sampling_with_a_quota_draws_the_sizes_and_says_the_probabilities_within_them():
    leverage = np.array([6.0, 3.0, 3.0, 2.0, 1.0, 1.0])
    pool = candidates(leverage, source=list("aaabbb"))
    terms = agree(pool, Budget(3), [Quota("source", {"b": 2})])
    probability = LeverageSampling(0).rank(pool, terms).recorded["inclusion_probability"]
    assert probability == pytest.approx([0.5, 0.25, 0.25, 1, 0.5, 0.5])
    draws = [choose(pool, LeverageSampling(seed), terms) for seed in range(800)]
    assert all(sum(row >= 3 for row in draw.rows) == 2 for draw in draws)
    frequency = np.bincount(np.concatenate([draw.rows for draw in draws]), minlength=6) / 800
    assert np.abs(frequency - probability).max() < 4 * 0.5 / np.sqrt(800)
    assert draws[0].recorded["inclusion_probability"].tolist() == probability[draws[0].rows].tolist()


@pytest.mark.parametrize("name", ["tokens", "two columns"])
def test_leverage_sampling_records_no_probability_that_it_does_not_know(name: str):
    pool = candidates([4.0, 2.0, 1.0, 1.0, 0.0], source=list("aabbb"), kind=list("pqpqp"))
    if name == "tokens":
        terms = agree(pool, Budget(2, "text_tokens"), include=[4], exclude=[3])
    else:
        terms = agree(pool, Budget(2), [Quota("source"), Quota("kind")], include=[4], exclude=[3])
    recorded = LeverageSampling(0).rank(pool, terms).recorded["inclusion_probability"]
    assert np.isnan(recorded[:3]).all()
    assert recorded[3:].tolist() == [0, 1]
    first = [choose(pool, LeverageSampling(seed), terms).rows[1] for seed in range(700)]
    frequency = np.bincount(first, minlength=5)[:3] / 700
    assert np.abs(frequency - np.array([4, 2, 1]) / 7).max() < 4 * 0.5 / np.sqrt(700)


@pytest.mark.parametrize(
    ("k", "size", "more"), [(8, 15, 4), (8, 30, 2), (len(SIZES), 15, 8), (len(SIZES), 30, 4)]
)
def test_spanning_covers_more_planted_groups_than_top_leverage(k: int, size: int, more: int):
    for seed in range(5):
        u, groups = planted(SIZES, k, seed)
        pool = of_rows(u)
        terms = agree(pool, Budget(size))
        top = choose(pool, TopLeverage(), terms).rows
        spanning = choose(pool, Spanning(), terms, blocks_of(u)).rows
        assert len(set(groups[spanning])) >= len(set(groups[top])) + more


def log_det(u: NDArray[np.float64], chosen: NDArray[np.int64], weight: float) -> float:
    k = u.shape[1]
    return float(np.linalg.slogdet(weight * np.eye(k) + u[chosen].T @ u[chosen])[1]) - k * float(
        np.log(weight)
    )


@pytest.mark.parametrize(("passes", "share"), [(3, 0.3), (5, 0.1), (6, 0.01), (10, 0.01), (40, 0.01)])
def test_no_subset_is_better_than_spanning_by_more_than_the_gap(passes: int, share: float):
    for seed in range(4):
        u = whitened(np.random.default_rng(seed).normal(size=(12, 4)) ** 3)
        pool = of_rows(u)
        terms = agree(pool, Budget(6), include=[3])
        spanned = spanning_order(pool, terms, blocks_of(u, 5), passes=passes)
        chosen = take(terms, spanned.order)
        best = max(
            log_det(u, np.array([3, *others]), spanned.prior_weight)
            for others in combinations(np.flatnonzero(np.arange(12) != 3), 5)
        )
        got = log_det(u, chosen, spanned.prior_weight)
        assert best - got <= spanned.gap * 4 + 1e-9
        assert best - got < share * best
        assert spanned.n_passes <= passes


def exact_greedy(u: NDArray[np.float64], size: int, weight: float) -> NDArray[np.int64]:
    matrix, chosen = weight * np.eye(u.shape[1]), []
    for _ in range(size):
        forms = (u @ np.linalg.inv(matrix) * u).sum(axis=1)
        forms[chosen] = -1
        chosen.append(int(forms.argmax()))
        matrix += np.outer(u[chosen[-1]], u[chosen[-1]])
    return np.array(chosen)


def test_ten_passes_come_near_exact_greedy_and_far_above_top_leverage():
    u, _ = planted(SIZES * 3, 12, noise=0.3)
    pool = of_rows(u)
    terms = agree(pool, Budget(0.16))
    few, ten, many = (spanning_order(pool, terms, blocks_of(u), passes=p) for p in (3, 10, 30))
    few_got, ten_got, many_got = (
        log_det(u, take(terms, spanned.order), ten.prior_weight) for spanned in (few, ten, many)
    )
    greedy = log_det(u, exact_greedy(u, terms.expected_size, ten.prior_weight), ten.prior_weight)
    top = log_det(u, choose(pool, TopLeverage(), terms).rows, ten.prior_weight)
    assert few_got < ten_got
    assert greedy - ten_got < 0.15 * (greedy - top)
    assert greedy - many_got < 0.05 * (greedy - top)
    assert many.gap < ten.gap < few.gap


@pytest.mark.parametrize("passes", [3, 10])
def test_the_gain_of_a_row_is_what_it_adds_to_the_other_chosen_ones(passes: int):
    u, _ = planted(SIZES, 8)
    pool = of_rows(u)
    terms = agree(pool, Budget(50), include=[4], exclude=[9])
    spanned = spanning_order(pool, terms, blocks_of(u), passes=passes)
    picked = spanned.order[: spanned.n_picked]
    chosen = np.append(picked, 4)
    whole = log_det(u, chosen, spanned.prior_weight)
    for row in picked.tolist():
        without = log_det(u, chosen[chosen != row], spanned.prior_weight)
        assert spanned.gain[row] == pytest.approx(whole - without, abs=1e-9)
    rest = spanned.order[spanned.n_picked :]
    for row in rest[:20].tolist():
        more = log_det(u, np.append(chosen, row), spanned.prior_weight)
        assert spanned.gain[row] == pytest.approx(more - whole, abs=1e-9)
    assert spanned.gain[[4, 9]].tolist() == [0, 0]
    # The gap is the derivative of log det towards the 49 rows in whose direction it is largest.
    inverse = np.linalg.inv(spanned.prior_weight * np.eye(8) + u[chosen].T @ u[chosen])
    forms = (u @ inverse * u).sum(axis=1)
    best = np.sort(forms[terms.eligible])[-49:].sum()
    assert spanned.gap == pytest.approx((best - forms[picked].sum()) / 8, abs=1e-12)
    for part in (picked, rest):
        assert all(spanned.gain[a] >= spanned.gain[b] for a, b in pairwise(part))


def test_spanning_leaves_out_what_the_rows_to_include_span_already():
    u, groups = planted([20] * 6, 6)
    pool = of_rows(u)
    held = np.flatnonzero(groups < 3).tolist()
    terms = agree(pool, Budget(len(held) + 3), include=held)
    chosen = choose(pool, Spanning(), terms, blocks_of(u)).rows
    assert sorted(groups[chosen[len(held) :]].tolist()) == [3, 4, 5]


def test_spanning_keeps_to_quotas_while_it_picks():
    u, groups = planted([30] * 8, 8)
    labels = np.where(np.arange(len(u)) % 4 == 0, "rare", "common").tolist()
    pool = of_rows(u, kind=labels)
    terms = agree(pool, Budget(8), [Quota("kind", {}, {"common": 2})])
    chosen = choose(pool, Spanning(), terms, blocks_of(u)).rows
    assert sum(labels[row] == "common" for row in chosen) <= 2
    assert len(set(groups[chosen])) == 8


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_of_any_size_give_a_choice_that_spans(block: int):
    u, groups = planted(SIZES, len(SIZES))
    pool = of_rows(u)
    chosen = choose(pool, Spanning(), agree(pool, Budget(30)), blocks_of(u, block)).rows
    assert len(set(groups[chosen])) == len(SIZES)


@pytest.mark.parametrize("passes", [3, 6, 10])
def test_spanning_reads_the_pool_as_often_as_it_says_and_holds_no_more_than_blocks(passes: int):
    n, k, block = 10_000, 64, 500
    n_read = 0

    def stream():
        nonlocal n_read
        n_read += 1
        for start in range(0, n, block):
            yield np.random.default_rng(start).normal(size=(block, k)) / np.sqrt(n)

    pool = candidates(np.ones(n))
    terms = agree(pool, Budget(60))
    tracemalloc.start()
    spanned = spanning_order(pool, terms, stream, passes=passes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_read == spanned.n_passes <= passes
    assert peak < n * k * 8 / 2


def test_rows_that_add_nothing_come_last_in_tie_order():
    u = np.zeros((6, 2))
    u[2, 0] = u[4, 1] = 1.0
    pool = candidates(np.ones(6), tie_order=[5, 4, 3, 2, 1, 0])
    spanned = spanning_order(pool, agree(pool, Budget(4)), blocks_of(u))
    assert spanned.order.tolist() == [4, 2, 5, 3, 1, 0]
    assert spanned.n_picked == 2
    none = spanning_order(pool, agree(pool, Budget(4)), blocks_of(np.zeros((6, 0))))
    assert none.order.tolist() == [5, 4, 3, 2, 1, 0]
    assert none.gain.tolist() == [0] * 6


def test_projected_rows_have_the_leverages_and_an_identity_for_their_gram_matrix():
    x = rows(80, 6)
    subspace = fit_subspace(Moments.of(x))
    u = projected(x, subspace)
    assert u.T @ u == pytest.approx(np.eye(subspace.k), abs=1e-10)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (lambda: [np.ones((2, 3))], "2 rows in the blocks for 3 candidates"),
        (lambda: [np.ones((4, 3))], "4 rows in the blocks for 3 candidates"),
        (lambda: [np.ones((2, 3)), np.ones((1, 2))], r"block of shape \(1, 2\) at row 2"),
        (lambda: [np.ones((2, 3)), np.full((1, 3), np.nan)], "nan in row 2"),
        (lambda: [np.ones(3)], r"block of shape \(3,\)"),
    ],
)
def test_projections_of_other_rows_are_refused(blocks, message):
    pool = candidates(np.ones(3))
    with pytest.raises(ValueError, match=message):
        Spanning().rank(pool, agree(pool, Budget(1)), blocks)


def test_what_a_strategy_lacks_is_said():
    pool = candidates(np.ones(3), source=list("abc"))
    terms = agree(pool, Budget(1))
    with pytest.raises(ValueError, match="no projections"):
        Spanning().rank(pool, terms)
    with pytest.raises(ValueError, match=r"'kind' to stratify by.*\['source'\]"):
        StratifiedRandom("kind").rank(pool, terms)
    with pytest.raises(ValueError, match="no column to stratify by"):
        strategy_named("stratified_random")
    with pytest.raises(ValueError, match="strategy 'best'; allowed are top_leverage"):
        strategy_named("best")
    with pytest.raises(ValueError, match="seed -1"):
        strategy_named("random", seed=-1)
    with pytest.raises(ValueError, match="2 passes; allowed is 3"):
        spanning_order(pool, terms, blocks_of(np.ones((3, 1))), passes=2)
    with pytest.raises(ValueError, match="prior 0"):
        spanning_order(pool, terms, blocks_of(np.ones((3, 1))), prior=0)
    with pytest.raises(InfeasibleError, match="4 rows to draw of 3"):
        inclusion_probabilities(np.ones(3), 4)


def test_a_strategy_describes_its_name_and_its_knobs():
    described = [strategy.describe() for strategy in every_strategy()]
    assert [entry["strategy"] for entry in described] == list(STRATEGIES)
    assert LeverageSampling(4).describe() != LeverageSampling(5).describe()
    assert Spanning(passes=5).describe() != Spanning().describe()
