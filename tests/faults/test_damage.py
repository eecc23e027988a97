"""What was damaged or deleted by hand is made again; where a run has to stop for it, the next one does it."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalselect_assets.pool import raw_samples
from scalselect_assets.resources.artifacts import ArtifactStore
from tests.faults.children import Children
from tests.faults.invariants import contents, expected, incomplete, torn
from tests.faults.known_pool import FaultBench, Pool, problems

SEED = 9
NOT_ARTIFACTS = {"dagster", "lance", ".locks"}


def heal(bench: FaultBench, pool: Pool, refreshes: int = 1) -> list[str]:
    """What refreshes say until the store is complete, which the last of some has to make it."""
    said: list[str] = []
    for _ in range(refreshes):
        if not (latest := problems(bench)):
            break
        said += latest
    else:
        assert latest == [], said
    assert incomplete(bench, pool) == []
    return said


def files(store: Path) -> list[Path]:
    """Every file of the assets."""
    return sorted(
        path
        for path in store.rglob("*")
        if path.is_file() and path.relative_to(store).parts[0] not in NOT_ARTIFACTS
    )


def cut_files_short(pool: Pool, store: Path) -> int:
    """Time and again, cut half of all files anywhere; returns how many."""
    bench, choose, n_cut = FaultBench(pool.folder, store), random.Random(SEED), 0
    heal(bench, pool)
    for _ in range(4):
        there = files(store)
        for path in choose.sample(there, len(there) // 2):
            os.truncate(path, choose.randrange(path.stat().st_size))
            n_cut += 1
        pool.change("b.jsonl", [0])  # so that everything is read
        heal(bench, pool)
    return n_cut


def test_whatever_is_cut_short_anywhere_is_made_again(children: Children, pool: Pool, tmp_path: Path) -> None:
    assert children.run(cut_files_short, pool, tmp_path / "store").value >= 30


def write_other_json(pool: Pool, store: Path, asset: str) -> None:
    """Replace an asset's JSON files by JSON of another shape, as other code may have left it."""
    bench = FaultBench(pool.folder, store)
    heal(bench, pool)
    for other in ("{}", "[]", "null", '"text"', '{"table": {}, "header": {}}'):
        written = list((store / asset).glob("*.json"))
        assert written
        for path in written:
            path.write_text(other)
        heal(bench, pool)


@pytest.mark.parametrize(
    "asset",
    [
        "model_cards",
        raw_samples.SHARD_INDEX,
        "attention_embeddings",
        "training_dataset",
    ],
)
def test_json_of_another_shape_is_written_again(
    children: Children, pool: Pool, tmp_path: Path, asset: str
) -> None:
    children.run(write_other_json, pool, tmp_path / "store", asset)


def damage_behind_the_header(pool: Pool, store: Path, asset: str) -> list[str]:
    """Overwrite columns of a file whose header stays readable."""
    bench = FaultBench(pool.folder, store)
    heal(bench, pool)
    path = store / asset / "a_2ejsonl.parquet"
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    pool.change("a.jsonl" if asset == "raw_samples" else "b.jsonl", [0])
    damaged = list(bench.refresh().damaged.values())
    heal(bench, pool)
    return damaged


def test_columns_that_are_damaged_are_named_and_made_again(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    said = children.run(damage_behind_the_header, pool, tmp_path / "store", "rejected_rows").value
    assert len(said) == 1
    assert "rejected_rows" in said[0]
    assert "a_2ejsonl" in said[0]


def _each(pattern: str, damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(store: Path) -> None:
        found = sorted(store.glob(f"lance/*a_2ejsonl.lance/{pattern}"))
        assert found
        for path in found:
            damage(path)

    return apply


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


TABLE_DAMAGES: dict[str, Callable[[Path], None]] = {
    "the table is gone": _each(".", shutil.rmtree),
    "its commits are empty": _each("_versions/*.manifest", _empty),
    "its commits are overwritten": _each("_versions/*.manifest", _zero),
    "its rows are cut short": _each("data/*", _cut),
}


def damage_a_table(pool: Pool, store: Path) -> dict[str, list[str]]:
    """What refreshes say of damages to a table, where its own shard has changed and where another has."""
    bench, said = FaultBench(pool.folder, store), {}
    heal(bench, pool)
    for name, damage in TABLE_DAMAGES.items():
        for changed in ("a.jsonl", "b.jsonl"):
            damage(store)
            pool.change(changed, [0])
            said[f"{name}, {changed} has changed"] = heal(bench, pool, refreshes=2)
    return said


def test_a_table_that_is_damaged_or_deleted_by_hand_is_made_again(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    said = children.run(damage_a_table, pool, tmp_path / "store").value
    assert len(said) == 2 * len(TABLE_DAMAGES)
    for name, messages in said.items():
        if name.endswith("a.jsonl has changed"):
            assert messages == [], name
        for message in messages:
            assert "run again, which embeds the shard anew" in message
            assert "a_2ejsonl" in message
            assert str(tmp_path / "store" / "lance") in message
    assert sum(map(len, said.values())) >= 3


def delete_tables_before_scoring(pool: Pool, store: Path) -> list[str]:
    """Tables that vanish while a refresh is at work, after their moments are in the basis."""
    bench = FaultBench(pool.folder, store)
    heal(bench, pool)
    write_arrays = ArtifactStore.write_arrays

    def delete_first(self: ArtifactStore, asset: str, *arguments: Any) -> Any:
        if asset == "subspace_basis":
            shutil.rmtree(store / "lance")
        return write_arrays(self, asset, *arguments)

    pool.change("b.jsonl", [1])
    before = contents(bench)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArtifactStore, "write_arrays", delete_first)
        (message,) = problems(bench)
    after, new = contents(bench), expected(pool)
    tables = {f"attention_embeddings[{shard}]" for shard in pool.shards}
    assert [told for told in torn(before, after, new) if told.split(" ")[0] not in tables] == []
    heal(bench, pool)
    return [message]


def test_tables_that_are_deleted_during_a_refresh_are_named_and_made_again(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    (message,) = children.run(delete_tables_before_scoring, pool, tmp_path / "store").value
    assert "run again, which embeds the shard anew" in message


def fail_between_vectors_and_moments(pool: Pool, store: Path) -> list[str]:
    """A disk that is full just when a shard's moments are written, and has space again after that."""
    bench = FaultBench(pool.folder, store)
    heal(bench, pool)
    write_arrays = ArtifactStore.write_arrays

    def refuse(self: ArtifactStore, asset: str, *arguments: Any) -> Any:
        if asset == "embedding_moments":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path(asset, suffix="")))
        return write_arrays(self, asset, *arguments)

    pool.change("a.jsonl", [1])
    before = contents(bench)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArtifactStore, "write_arrays", refuse)
        said = problems(bench)
    after = contents(bench)
    heal(bench, pool)
    return [*said, *torn(before, after, expected(pool))]


def test_a_shard_that_fails_after_its_vectors_were_replaced_stays_in_the_selection(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    (message,) = children.run(fail_between_vectors_and_moments, pool, tmp_path / "store").value
    assert "the disk is full" in message
