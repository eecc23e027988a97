"""The pool's totals in the store: what changed is read, and what comes out is what a rebuild gives."""

from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from scalselect_assets.method.subspace.moments import Moments
from scalselect_assets.resources.artifacts import ArtifactMissingError, ArtifactStore
from scalselect_assets.subspace import pool_moments


class Pool:
    """Shards' moments in a store, as `embedding_moments` leaves them."""

    def __init__(self, root: Path) -> None:
        self.artifacts = ArtifactStore(UPath(root))
        self.versions: dict[str, str] = {}

    def write(self, shard: str, seed: int) -> None:
        moments = Moments.of(np.random.default_rng(seed).normal(size=(20, 5)) + seed)
        pool_moments.retire(self.artifacts, shard, f"v{seed}")
        header = {"data_version": f"v{seed}"}
        self.artifacts.write_arrays("embedding_moments", moments.to_arrays(), header, shard)
        self.versions[shard] = f"v{seed}"

    def update(self, *, rebuild: bool = False) -> pool_moments.PoolMoments:
        result = pool_moments.update(self.artifacts, self.versions, rebuild=rebuild)
        assert result is not None
        rebuilt = pool_moments.rebuilt_totals(self.artifacts, self.versions).moments()
        assert result.moments.n == rebuilt.n == 20 * len(self.versions)
        np.testing.assert_allclose(result.moments.mean, rebuilt.mean, rtol=1e-14)
        np.testing.assert_allclose(result.moments.scatter_upper, rebuilt.scatter_upper, rtol=1e-11)
        return result

    def retired(self) -> int:
        return len(self.artifacts.paths("retired_moments", suffix=".safetensors"))


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pool = Pool(tmp_path)
    for seed in range(6):
        pool.write(f"shard {seed}.jsonl", seed)
    return pool


def test_an_empty_first_shard_costs_no_digits(pool: Pool):
    empty = Moments.empty(5)
    pool.artifacts.write_arrays("embedding_moments", empty.to_arrays(), {"data_version": "none"}, "0.jsonl")
    versions = {"0.jsonl": "none", **pool.versions}
    result = pool_moments.update(pool.artifacts, versions, rebuild=False)
    assert result is not None
    want = pool_moments.rebuilt_totals(pool.artifacts, pool.versions).moments()
    np.testing.assert_array_equal(result.moments.scatter_upper, want.scatter_upper)


def test_the_first_totals_read_every_shard_and_the_same_shards_again_none(pool: Pool):
    assert (pool.update().n_read, pool.update().n_read) == (6, 0)


def test_an_added_a_changed_and_a_removed_shard_cost_their_own_moments(pool: Pool):
    pool.update()
    pool.write("new.jsonl", 10)
    added = pool.update()
    assert (added.added, added.removed, added.n_read, added.rebuilt) == (("new.jsonl",), (), 1, False)

    pool.write("shard 3.jsonl", 33)
    assert pool.retired() == 1
    changed = pool.update()
    assert (changed.added, changed.removed) == (("shard 3.jsonl",), ("shard 3.jsonl",))
    assert changed.n_read == 2  # the old ones and the new ones
    assert pool.retired() == 0

    del pool.versions["shard 0.jsonl"]
    removed = pool.update()
    assert (removed.added, removed.removed, removed.n_read) == ((), ("shard 0.jsonl",), 1)


def test_a_shard_that_changed_twice_since_is_taken_out_as_it_was_put_in(pool: Pool):
    pool.update()
    pool.write("shard 3.jsonl", 33)
    pool.write("shard 3.jsonl", 34)
    assert not pool.update().rebuilt
    pool.write("shard 3.jsonl", 35)
    pool.write("shard 3.jsonl", 34)  # and back: nothing to do
    assert pool.update().n_read == 0


def test_a_rebuild_reads_every_shard(pool: Pool):
    pool.update()
    assert (pool.update(rebuild=True).n_read, pool.update(rebuild=True).rebuilt) == (6, True)


def test_more_changes_than_shards_are_added_up_anew(pool: Pool):
    pool.update()
    for seed in range(3):
        pool.write(f"shard {seed}.jsonl", 50 + seed)
    result = pool.update()  # three out and three in are as many reads as six
    assert (result.rebuilt, result.n_read) == (True, 6)


@pytest.mark.parametrize("damage", ["totals gone", "totals cut", "old moments gone", "old moments cut"])
def test_what_is_missing_or_damaged_is_added_up_anew(pool: Pool, damage: str):
    pool.update()
    pool.write("shard 3.jsonl", 33)
    totals = pool.artifacts.path("pool_moments", suffix=".safetensors")
    (retired,) = pool.artifacts.paths("retired_moments", suffix=".safetensors")
    path = totals if damage.startswith("totals") else retired
    if damage.endswith("gone"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    assert pool.update().rebuilt
    pool.write("shard 4.jsonl", 44)
    assert not pool.update().rebuilt


@pytest.mark.parametrize("step", ["after setting aside", "before the totals", "after the totals"])
def test_a_crash_at_any_step_puts_nothing_in_twice(pool: Pool, step: str, monkeypatch: pytest.MonkeyPatch):
    pool.update()

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if step == "after setting aside":
        monkeypatch.setattr(ArtifactStore, "write_arrays", dies)
        with pytest.raises(KeyboardInterrupt):
            pool.write("shard 3.jsonl", 33)
        monkeypatch.undo()
        assert pool.retired() == 1
    pool.write("shard 3.jsonl", 33)
    if step != "after setting aside":
        monkeypatch.setattr(ArtifactStore, "write_arrays" if step == "before the totals" else "paths", dies)
        with pytest.raises(KeyboardInterrupt):
            pool.update()
        monkeypatch.undo()
    result = pool.update()
    assert not result.rebuilt
    assert result.n_read == (0 if step == "after the totals" else 2)
    assert pool.retired() == 0


def test_wanted_moments_that_are_not_there_are_named(pool: Pool):
    pool.versions["shard 2.jsonl"] = "never"
    with pytest.raises(ArtifactMissingError, match=r"embedding_moments\[shard 2.jsonl\] of version never"):
        pool_moments.update(pool.artifacts, pool.versions, rebuild=False)


def test_no_shards_have_no_totals(pool: Pool):
    assert pool_moments.update(pool.artifacts, {}, rebuild=False) is None


@pytest.mark.parametrize("shard", ["shard 0.jsonl", "shard 3.jsonl"])
def test_a_wild_shard_that_was_repaired_leaves_no_trace(pool: Pool, shard: str):
    pool.update()
    wild = Moments.of(np.random.default_rng(0).normal(size=(20, 5)) * 1e9)
    pool_moments.retire(pool.artifacts, shard, "wild")
    pool.artifacts.write_arrays("embedding_moments", wild.to_arrays(), {"data_version": "wild"}, shard)
    pool.versions[shard] = "wild"
    pool.update(rebuild=True)  # the totals are about a point of the wild shard, if it is the first
    pool.write(shard, int(shard[6]))
    assert not pool.update().rebuilt  # which compares with a rebuild
