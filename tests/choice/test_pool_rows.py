"""The rows to choose from, as the method takes them: ties have one order, and copies tie."""

import numpy as np
import polars as pl
import pytest

from scalselect_assets.choice.pool_rows import candidates
from scalselect_assets.method.choice.agreement import agree
from scalselect_assets.method.choice.choose import choose
from scalselect_assets.method.choice.strategies import TopLeverage
from scalselect_assets.method.choice.terms import Budget
from scalselect_assets.method.subspace.leverage import ranked


def frame(*rows: tuple[str, str, float]) -> pl.DataFrame:
    """Rows of a sample key, a shard and a score."""
    return pl.DataFrame(
        {
            "sample_key": [key for key, _, _ in rows],
            "shard": [shard for _, shard, _ in rows],
            "normalised_leverage": ranked(np.array([score for _, _, score in rows])),
            "n_text_tokens": [1] * len(rows),
            "n_image_tokens": [1] * len(rows),
        }
    )


def chosen(rows: pl.DataFrame, size: int) -> list[tuple[str, str]]:
    pool = candidates(rows, [])
    places = choose(pool, TopLeverage(), agree(pool, Budget(size))).rows
    return [(str(key), str(shard)) for key, shard in rows[places].select("sample_key", "shard").iter_rows()]


@pytest.mark.parametrize("seed", range(5))
def test_level_scores_are_ordered_by_sample_key_then_shard_however_the_rows_come(seed: int) -> None:
    rows = frame(("b", "1", 1.0), ("a", "2", 1.0), ("c", "1", 2.0), ("a", "1", 1.0), ("d", "1", 0.5))
    rows = rows.sample(fraction=1.0, shuffle=True, seed=seed)
    assert chosen(rows, 5) == [("c", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("d", "1")]


@pytest.mark.parametrize("off", [-1e-6, -1e-7, 0.0, 1e-7, 1e-6])
@pytest.mark.parametrize("score", np.geomspace(0.01, 30, 7))
def test_of_copies_whose_scores_differ_by_rounding_the_first_shard_is_chosen(
    score: float, off: float
) -> None:
    rows = frame(("copy", "2", score * (1 + off)), ("copy", "1", score), ("other", "1", score / 2))
    assert chosen(rows, 1) == [("copy", "1")]


@pytest.mark.parametrize("seed", range(3))
def test_whichever_rounding_there_is_the_same_rows_are_chosen_at_every_budget(seed: int) -> None:
    """Forty samples, each in three shards, embedded twice in other batches."""
    generator = np.random.default_rng(seed)
    scores = generator.gamma(2.0, size=40)

    def embedded() -> pl.DataFrame:
        rounding = 1 + generator.uniform(-5e-7, 5e-7, size=(40, 3))
        return frame(
            *(
                (f"sample {number:02}", f"shard {shard}", scores[number] * rounding[number, shard])
                for number in range(40)
                for shard in range(3)
            )
        )

    one, other = embedded(), embedded()
    differing = [size for size in range(1, 120) if set(chosen(one, size)) != set(chosen(other, size))]
    assert differing == []


def test_samples_of_one_name_with_other_images_keep_their_scores() -> None:
    """Image names are relative to a shard's folder, so that equal names need not be equal images."""
    rows = frame(("name", "1", 1.0), ("between", "1", 1.5), ("name", "2", 2.0))
    assert chosen(rows, 3) == [("name", "2"), ("between", "1"), ("name", "1")]
