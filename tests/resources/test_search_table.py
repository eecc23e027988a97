"""The search table: what it gives back, that its index finds what is there, and that nothing of it stays."""

import errno
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from upath import UPath

from scalselect_assets.method.choice.near_duplicates import near_duplicates, pairs_within
from scalselect_assets.method.subspace.preprocessing import unit_rows
from scalselect_assets.resources.embedding_store import EmbeddingStore, table_name
from scalselect_assets.resources.search_table import SEARCH_TABLE, search_table
from tests.method.vectors import VectorsInMemory

D = 32


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(UPath(tmp_path / "lance"), {})


def planted(n: int, copies: int) -> NDArray[np.float32]:
    """Random directions, and at the end near copies of the first ones."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(n, D))
    x[n - copies :] = x[:copies] + 0.02 * rng.normal(size=(copies, D))
    return unit_rows(x).astype(np.float32)


def batches(x: NDArray[np.float32], size: int = 300) -> list[NDArray[np.float32]]:
    return [x[start : start + size] for start in range(0, len(x), size)]


def test_it_gives_back_what_was_written(store: EmbeddingStore) -> None:
    x = planted(1000, 10)
    with search_table(store, D, batches(x), exact_up_to=1000) as table:
        assert (table.n, table.indexed) == (1000, False)
        positions = np.array([999, 0, 512, 7])
        assert np.array_equal(table.take(positions), x[positions])
        seen = dict(
            pair for numbers, rows in table.scan() for pair in zip(numbers.tolist(), rows, strict=True)
        )
    assert np.array_equal(np.stack([seen[place] for place in range(1000)]), x)


def test_an_indexed_search_removes_what_an_exact_one_does(store: EmbeddingStore) -> None:
    x, order = planted(3000, 600), np.random.default_rng(5).permutation(3000)
    exact = near_duplicates(order, VectorsInMemory(x), 0.98)
    with search_table(store, D, batches(x), exact_up_to=0) as table:
        assert table.indexed
        indexed = near_duplicates(order, table, 0.98, block_rows=500)
    assert (~exact.kept).sum() == 600
    found = (~indexed.kept & ~exact.kept).sum() / 600
    assert found >= 0.99
    assert not (~indexed.kept & exact.kept).any()


def test_no_number_of_copies_hides_one(store: EmbeddingStore) -> None:
    """More copies of one row than the index is first asked for: all are found."""
    x = planted(2000, 0)
    x[500:1500] = unit_rows(x[3] + 0.005 * np.random.default_rng(8).normal(size=(1000, D)))
    with search_table(store, D, batches(x), exact_up_to=0) as table:
        pairs = pairs_within(x[[3]], table.near(x[[3]], 0.99), 0.99)
        itself = pairs_within(x[[3]], table.near(x[[3]], 1.0), 1.0)
    assert pairs.tolist() == [[0, place] for place in [3, *range(500, 1500)]]
    assert [0, 3] in itself.tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 101])
def test_pools_of_any_size_are_searched(store: EmbeddingStore, n: int) -> None:
    x = planted(n, n // 2)
    with search_table(store, D, batches(x), exact_up_to=0) as table:
        assert table.indexed == (n > 100)
        assert near_duplicates(np.arange(n), table, 0.98).kept.sum() == n - n // 2


def test_nothing_of_it_stays_whatever_happens(store: EmbeddingStore) -> None:
    with search_table(store, D, batches(planted(10, 1)), exact_up_to=10):
        assert store.table_names() == {SEARCH_TABLE}
    assert store.table_names() == set()
    with pytest.raises(ZeroDivisionError), search_table(store, D, batches(planted(10, 1)), exact_up_to=10):
        raise ZeroDivisionError
    assert store.table_names() == set()


def test_what_a_killed_search_left_is_replaced(store: EmbeddingStore) -> None:
    abandoned = search_table(store, D, batches(planted(50, 1)), exact_up_to=50)
    abandoned.__enter__()
    (store.folder / f"{SEARCH_TABLE}.lance" / "_versions").rename(store.folder / "versions")
    with search_table(store, D, batches(planted(20, 1)), exact_up_to=50) as table:
        assert table.n == 20


@pytest.mark.parametrize("shard", ["", SEARCH_TABLE, "--", "a.jsonl"])
def test_it_has_no_name_that_a_shards_table_could_have(shard: str) -> None:
    assert "--" in table_name("fingerprint", shard)
    assert "--" not in SEARCH_TABLE


def test_a_folder_that_cannot_be_written_is_told_as_the_system_tells_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = EmbeddingStore(UPath(tmp_path / "file"), {})
    with (
        pytest.raises(OSError, match=r".") as caught,
        search_table(store, D, batches(planted(5, 1)), exact_up_to=5),
    ):
        pass
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
