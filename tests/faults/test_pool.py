"""Files of the pool that are replaced or vanish while they are read: no mixture, and the next run heals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalselect_assets.recording import materialization
from scalselect_assets.resources.sample_source import SampleSource
from tests.faults import standin
from tests.faults.children import Children
from tests.faults.invariants import contents, expected, incomplete, same, torn
from tests.faults.known_pool import FaultBench, Pool, problems

Replace = Callable[[Pool], None]


def replace_while_it_is_read(pool: Pool, store: Path, times: int) -> list[str]:
    """Put another file in a shard's place whenever its second row is read, some times."""
    bench = FaultBench(pool.folder, store)
    assert problems(bench) == []
    read_shard, replaced = SampleSource.read_shard, []

    def disturbed(self: SampleSource, key: str) -> Any:
        for number, row in enumerate(read_shard(self, key)):
            if number == 1 and key == "a.jsonl" and len(replaced) < times:
                replaced.append(key)
                pool.change("a.jsonl", [0, 4])
            yield row

    pool.change("a.jsonl", [2])
    pool.change("b.jsonl", [1])
    before = contents(bench)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materialization, "RETRY_SECONDS", 0.0)
        patch.setattr(SampleSource, "read_shard", disturbed)
        said = problems(bench)
    assert len(replaced) == times
    after, new = contents(bench), expected(pool)
    if said:
        # The shard stays as it was, all others go on, and so does what is selected from both.
        assert same(after["raw_samples[a.jsonl]"], before["raw_samples[a.jsonl]"])
        assert same(after["attention_embeddings[a.jsonl]"], before["attention_embeddings[a.jsonl]"])
        assert same(after["attention_embeddings[b.jsonl]"], new["attention_embeddings[b.jsonl]"])
        assert problems(bench) == []
    assert incomplete(bench, pool) == []
    return said


def test_a_shard_that_is_replaced_while_it_is_read_is_read_again(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    assert children.run(replace_while_it_is_read, pool, tmp_path / "store", 1).value == []


def test_a_shard_that_is_replaced_all_the_time_fails_alone_until_that_ends(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    times = materialization.RETRIES + 1
    (message,) = children.run(replace_while_it_is_read, pool, tmp_path / "store", times).value
    assert message.startswith("shard a.jsonl failed")
    assert "changed while it was read" in message
    assert "run again" in message


def replace_between_reading_and_embedding(pool: Pool, store: Path) -> list[str]:
    """Put another file in a shard's place when its rows are known and not yet embedded."""
    bench = FaultBench(pool.folder, store)
    assert problems(bench) == []
    pool.change("a.jsonl", [0])
    before, known = contents(bench), expected(pool)
    encode = standin.StandIn.encode_as_done

    def disturbed(self: standin.StandIn, *arguments: Any, **options: Any) -> Any:
        pool.change("a.jsonl", [1])
        return encode(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standin.StandIn, "encode_as_done", disturbed)
        said = problems(bench)
    # What was read is what is selected from, as if the other file had come after the refresh.
    assert torn(before, contents(bench), known) == []
    assert problems(bench) == []
    assert incomplete(bench, pool) == []
    return said


def test_a_shard_that_is_replaced_before_its_rows_are_embedded_is_embedded_as_it_was_read(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    assert children.run(replace_between_reading_and_embedding, pool, tmp_path / "store").value == []


def vanish_before_it_is_read(pool: Pool, store: Path) -> list[str]:
    """Delete a new shard, and an old one, after they were discovered."""
    bench = FaultBench(pool.folder, store)
    assert problems(bench) == []
    pool.add("c.jsonl", 3)
    pool.change("a.jsonl", [0])
    before = contents(bench)
    index_shard, deleted = SampleSource.index_shard, []

    def disturbed(self: SampleSource, key: str) -> Any:
        index = index_shard(self, key)
        if key in {"a.jsonl", "c.jsonl"} and key not in deleted:
            deleted.append(key)
            pool.remove(key)
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleSource, "index_shard", disturbed)
        said = problems(bench)
    after = contents(bench)
    assert sorted(deleted) == ["a.jsonl", "c.jsonl"]
    assert same(after["attention_embeddings[a.jsonl]"], before["attention_embeddings[a.jsonl]"])
    assert problems(bench) == []
    assert incomplete(bench, pool) == []
    return said


def test_shards_that_vanish_between_discovery_and_reading_fail_alone_and_are_gone_next_time(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    said = children.run(vanish_before_it_is_read, pool, tmp_path / "store").value
    assert len(said) == 2
    for shard, message in zip(["a.jsonl", "c.jsonl"], said, strict=True):
        assert message.startswith(f"shard {shard} failed")
        assert str(tmp_path / "pool" / shard) in message
        assert "leaves the pool at the next refresh" in message


def lose_images_before_they_are_embedded(pool: Pool, store: Path) -> list[str]:
    """Delete the image of a row that was there when the row was read."""
    bench = FaultBench(pool.folder, store)
    pool_of_now = expected(pool)
    image = pool.folder / "images" / f"{pool.shards['a.jsonl'][0]}.png"
    content = image.read_bytes()
    encode = standin.StandIn.encode_as_done

    def disturbed(self: standin.StandIn, *arguments: Any, **options: Any) -> Any:
        image.unlink(missing_ok=True)
        return encode(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standin.StandIn, "encode_as_done", disturbed)
        said = problems(bench)
    after = contents(bench)
    assert 0 in after["rejected_rows[a.jsonl]"]
    assert 0 not in after["attention_embeddings[a.jsonl]"]
    assert after["manifest"]["embedded"] == pool_of_now["manifest"]["embedded"] - 1
    assert after["manifest"]["rows"] == pool_of_now["manifest"]["rows"]
    image.write_bytes(content)
    assert problems(bench) == []
    assert incomplete(bench, pool) == []
    return said


def test_an_image_that_vanishes_before_it_is_embedded_costs_its_row_until_it_is_back(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    assert children.run(lose_images_before_they_are_embedded, pool, tmp_path / "store").value == []
