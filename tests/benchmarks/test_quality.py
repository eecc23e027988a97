"""The quality benchmark draws the pools that it says, chooses by the product, and pairs seeds in tables."""

import math

import numpy as np
import pytest

from benchmarks.quality.choosing import ScoredPool
from benchmarks.quality.pools import make_pool, world
from benchmarks.quality.result_tables import (
    accuracy_table,
    advice_line,
    interval,
    paired_differences,
    worth_in_random_rows,
)
from benchmarks.quality.trial import FULL, TrialRun
from benchmarks.quality.tuning import Training


def run(name: str, seed: int, accuracy: float, *, share: float = 0.16, distinct: float = 0.5) -> TrialRun:
    return TrialRun(name, share, seed, 10, {"count": accuracy}, 8, 0.0, 0.0, 0.1, distinct, Training())


def test_a_pool_has_the_share_of_copies_and_junk_that_its_name_says() -> None:
    pool, test = make_pool("world-80-junk", 0, rows=300, tests=20, grid=2, place=None)
    assert (len(pool), len(test)) == (300, 20)
    assert len(np.unique(pool.group)) == 60
    assert 0.03 < (pool.noise | pool.wrong).mean() < 0.2
    assert not (pool.noise & pool.wrong).any()
    first, second = np.flatnonzero(pool.group == np.bincount(pool.group).argmax())[:2]
    assert pool.sources[first] == pool.sources[second]


def test_the_same_seed_draws_the_same_pool_and_another_one_another() -> None:
    one, again, other = (world(20, seed, 2, copies=0.5) for seed in (1, 1, 2))
    assert np.array_equal(one.pictures, again.pictures)
    assert one.asked == again.asked
    assert not np.array_equal(one.pictures, other.pictures)


@pytest.mark.parametrize(("name", "said"), [("worlds-80", "no pool"), ("folder", "give --folder PLACE")])
def test_a_pool_that_is_not_there_is_named(name: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        make_pool(name, 0, rows=10, tests=5, grid=2, place=None)


def test_choices_are_the_products_own() -> None:
    pool = world(60, 3, 2, copies=0.5)
    # Vectors that stand for the scene: copies are near each other.
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(pool.group.max() + 1, 12))
    vectors = (centres[pool.group] + 0.01 * rng.normal(size=(60, 12))).astype(np.float32)
    tokens = np.ones(60, np.int64)
    scored = ScoredPool(pool, vectors, tokens, tokens)
    leverage = scored.candidates.normalised_leverage
    assert leverage.mean() == pytest.approx(1.0)
    top = scored.choose("top_leverage", 0.2, 0)
    assert leverage[top].min() >= np.sort(leverage)[-12]
    assert len(np.unique(pool.group[scored.choose("coverage", 0.2, 0)])) >= len(np.unique(pool.group[top]))
    removed = scored.removed(by_text=False)
    assert len(removed.rows) == 60 - len(np.unique(pool.group))
    assert removed.same_picture_other_question == 0
    assert not set(scored.choose("vectors+random", 0.2, 0)) & set(removed.rows)
    assert set(scored.removed(by_text=True).rows) <= set(removed.rows)


def test_without_centring_the_mean_direction_is_kept() -> None:
    pool = world(40, 3, 2, copies=0.0)
    vectors = (5 + np.random.default_rng(0).normal(size=(40, 6))).astype(np.float32)
    tokens = np.ones(40, np.int64)
    raw = ScoredPool(pool, vectors, tokens, tokens, centred=False)
    assert np.allclose(raw.subspace.mean, 0)
    assert abs(raw.subspace.directions[:, 0] @ np.ones(6)) / math.sqrt(6) > 0.99


def test_differences_are_paired_by_seed_and_have_an_interval() -> None:
    random = [run("random", seed, 0.5 + seed / 10) for seed in range(3)]
    ours = [run("coverage", seed, 0.52 + seed / 10) for seed in (2, 0, 7)]
    assert paired_differences(ours, random) == pytest.approx([2.0, 2.0])
    mean, half = interval([1.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 12.706), abs=1e-3)
    assert math.isnan(interval([1.0])[1])


def test_an_accuracy_is_worth_the_random_rows_that_reach_it() -> None:
    curve = [(0.04, 0.2), (0.16, 0.4), (0.64, 0.6)]
    assert worth_in_random_rows(0.4, curve) == pytest.approx(0.16)
    assert worth_in_random_rows(0.5, curve) == pytest.approx(0.32)
    assert math.isnan(worth_in_random_rows(0.7, curve))


def test_the_table_and_the_advice_tell_who_beat_random() -> None:
    runs = [
        run(FULL, 0, 0.8, share=1.0),
        *(run("random", seed, 0.5) for seed in range(2)),
        *(run("coverage", seed, 0.6, distinct=0.6) for seed in range(2)),
        *(run("top_leverage", seed, 0.4, distinct=0.3) for seed in range(2)),
    ]
    table = accuracy_table(runs, 0.16)
    coverage = next(line for line in table.splitlines() if line.startswith("| coverage"))
    assert "| 60.0 ± 0.0 | 75.0 | 10.0 ± 0.0 |" in coverage
    said = advice_line(runs, 0.16)
    assert "warns of: 2, 2 of them below random; the others: 2, 0 below random" in said
