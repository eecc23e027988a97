"""Coverage takes high leverage from every part of the subspace, greedily and exactly."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from scalselect_assets.method.choice.agreement import agree
from scalselect_assets.method.choice.candidates import Candidates
from scalselect_assets.method.choice.cells import N_TABLES, Cells, cells_of
from scalselect_assets.method.choice.choose import choose
from scalselect_assets.method.choice.coverage import SLACK, coverage_order
from scalselect_assets.method.choice.strategies import Coverage, TopLeverage
from scalselect_assets.method.choice.taking import take
from scalselect_assets.method.choice.terms import Budget, Quota, Terms
from tests.method.pools import blocks_of, of_rows, planted

SIZES = [60, 30, 20, 10, 5, 4, 3, 2, 2, 1, 1, 1]


def covered(cells: Cells, leverage: NDArray[np.float64], rows: list[int]) -> float:
    """The objective as its definition says."""
    largest: dict[int, float] = {}
    for row in rows:
        for cell in cells.of_row[row].tolist():
            largest[cell] = max(largest.get(cell, 0.0), float(leverage[row]))
    return sum(largest.values())


def naive_greedy(made: Candidates, cells: Cells, terms: Terms) -> list[int]:
    """Every step looks at every row."""
    rows = np.flatnonzero(terms.held).tolist()
    leverage = made.normalised_leverage
    while len(rows) < (terms.size or 0):
        rest = [row for row in terms.eligible_rows.tolist() if row not in rows]
        before = covered(cells, leverage, rows)
        rows.append(
            min(
                rest,
                key=lambda row: (
                    -round(covered(cells, leverage, [*rows, row]) - before, 9),
                    -leverage[row],
                    made.tie_order[row],
                ),
            )
        )
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_the_lazy_choice_is_the_greedy_one(seed: int) -> None:
    u, _ = planted(SIZES, 5, seed, noise=0.2)
    made = of_rows(u)
    terms = agree(made, Budget(25), include=[3, 50], exclude=[1])
    cells = cells_of(blocks_of(u), made.n, 25)
    found = coverage_order(made, terms, blocks_of(u), slack=0.0)
    assert sorted(take(terms, found.order).tolist()) == sorted(naive_greedy(made, cells, terms))
    picked = found.order[: found.n_picked]
    assert (np.diff(found.gain[picked]) <= 1e-9).all()
    assert found.gain[picked].min() >= found.gain[found.order[found.n_picked :]].max() - 1e-9
    assert (found.gain[picked] <= made.normalised_leverage[picked] + 1e-9).all()


def test_with_slack_every_row_adds_nearly_as_much_as_the_best_one() -> None:
    u, _ = planted(SIZES, 5, 3, noise=0.2)
    made = of_rows(u)
    terms, cells = agree(made, Budget(25)), cells_of(blocks_of(u), made.n, 25)
    rows: list[int] = []
    for row in coverage_order(made, terms, blocks_of(u), slack=0.1).order[:25].tolist():
        gains = [covered(cells, made.normalised_leverage, [*rows, other]) for other in range(made.n)]
        before = covered(cells, made.normalised_leverage, rows)
        assert gains[row] - before >= 0.9 * (max(gains) - before) - 1e-9
        rows.append(row)


@pytest.mark.parametrize("slack", [-0.1, 1.0, float("nan")])
def test_a_slack_out_of_range_is_refused(slack: float) -> None:
    u, _ = planted(SIZES, 5)
    made = of_rows(u)
    with pytest.raises(ValueError, match="allowed is 0 to below 1"):
        coverage_order(made, agree(made, Budget(2)), blocks_of(u), slack=slack)


def test_it_reaches_the_bound_of_the_best_choice() -> None:
    rng = np.random.default_rng(4)
    u = np.linalg.qr(rng.normal(size=(14, 3)))[0]
    made = of_rows(u)
    cells = cells_of(blocks_of(u), 14, 4)
    best = max(
        covered(cells, made.normalised_leverage, list(rows)) for rows in itertools.combinations(range(14), 4)
    )
    chosen = choose(made, Coverage(), agree(made, Budget(4)), blocks_of(u)).rows.tolist()
    assert covered(cells, made.normalised_leverage, chosen) >= (1 - 1 / np.e - SLACK) * best


@pytest.mark.parametrize("seed", range(4))
def test_it_shows_more_planted_groups_than_top_leverage_and_than_random(seed: int) -> None:
    u, groups = planted(SIZES, 6, seed, noise=0.05)
    made = of_rows(u)
    terms = agree(made, Budget(len(SIZES)))
    rng = np.random.default_rng(seed)
    ours = choose(made, Coverage(), terms, blocks_of(u)).rows
    top = choose(made, TopLeverage(), terms).rows
    drawn = np.mean([len(set(groups[rng.permutation(made.n)[: len(SIZES)]])) for _ in range(20)])
    assert len(set(groups[ours])) > max(len(set(groups[top])), drawn)
    cells = cells_of(blocks_of(u), made.n, len(SIZES))
    assert cells.distinct_share(ours) > cells.distinct_share(top)


def test_quotas_hold_and_every_eligible_row_is_ranked_once() -> None:
    u, groups = planted(SIZES, 6, 1)
    made = of_rows(u, source=[f"s{group % 3}" for group in groups.tolist()])
    terms = agree(made, Budget(20), [Quota("source", {"s2": 6}, {"s0": 5})], exclude=[0])
    order = coverage_order(made, terms, blocks_of(u)).order
    assert sorted(order.tolist()) == terms.eligible_rows.tolist()
    labels = np.array([made.labels["source"].values[code] for code in made.labels["source"].codes])
    chosen = labels[take(terms, order)]
    assert (chosen == "s0").sum() <= 5
    assert (chosen == "s2").sum() >= 6


def test_blocks_do_not_change_the_cells_and_copies_share_them() -> None:
    u, _ = planted(SIZES, 6, 2, noise=0.1)
    u[1] = u[0]
    cells = cells_of(blocks_of(u), len(u), 30)
    assert np.array_equal(cells.of_row, cells_of(blocks_of(u, rows=7), len(u), 30).of_row)
    assert np.array_equal(cells.of_row[0], cells.of_row[1])
    assert cells.of_row.shape == (len(u), N_TABLES)
    assert cells.n_cells == len(np.unique(cells.of_row))
    assert cells.distinct_share(np.array([0])) == 1.0
    assert cells.distinct_share(np.array([0, 1])) == 0.5


def test_more_rows_are_told_apart_by_finer_cells() -> None:
    u, _ = planted(SIZES, 6, 2)
    assert cells_of(blocks_of(u), len(u), 1).n_planes < cells_of(blocks_of(u), len(u), 1 << 12).n_planes


def test_without_directions_the_tie_order_decides() -> None:
    u = np.zeros((5, 0))
    made = Candidates(np.zeros(5), np.array([4, 3, 2, 1, 0]), np.ones(5, np.int64), np.ones(5, np.int64))
    terms = agree(made, Budget(2))
    assert take(terms, coverage_order(made, terms, blocks_of(u)).order).tolist() == [4, 3]


def test_without_projections_it_says_what_is_missing() -> None:
    u, _ = planted(SIZES, 6)
    made = of_rows(u)
    with pytest.raises(ValueError, match="strategy coverage, which needs the rows of U_k"):
        Coverage().rank(made, agree(made, Budget(2)))
