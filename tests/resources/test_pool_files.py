"""A shard that is a link to elsewhere fails by itself, and nothing of what it points to is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
from upath import UPath

from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.shard_reader import ShardFormatError
from tests.conftest import sharegpt_row, write_lines

SECRET = "$ecret:x:0:0"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    (tmp_path / "secret.jsonl").write_text(SECRET)
    (tmp_path / "pool" / "images").mkdir(parents=True)
    (tmp_path / "pool" / "images" / "a.png").write_bytes(b"a")
    write_lines(tmp_path / "pool" / "good.jsonl", [sharegpt_row("images/a.png")])
    return tmp_path / "pool"


BAD_LINKS: dict[str, tuple[str, str]] = {
    "out of the pool": ("../secret.jsonl", "link that leads out of the pool"),
    "out of the pool, absolute": ("{tmp}/secret.jsonl", "link that leads out of the pool"),
    "in a circle": ("bad.jsonl", "link that leads in a circle"),
    "nowhere": ("missing.jsonl", "link to a file that is not there"),
}


@pytest.mark.parametrize("name", BAD_LINKS)
def test_a_link_that_cannot_be_followed_is_a_shard_that_fails_by_itself(pool: Path, name: str) -> None:
    target, message = BAD_LINKS[name]
    (pool / "bad.jsonl").symlink_to(target.format(tmp=pool.parent))
    source = SampleSource(UPath(pool))

    assert list(source.shard_keys()) == ["bad.jsonl", "good.jsonl"]
    index = source.index_shard("bad.jsonl")
    assert (index.n_rows, index.images) == (None, ())
    assert source.is_current("bad.jsonl", index)
    reads: list[Callable[[], object]] = [
        lambda: list(source.read_shard("bad.jsonl")),
        lambda: source.container("bad.jsonl"),
    ]
    for read in reads:
        with pytest.raises(ShardFormatError, match=message) as raised:
            read()
        assert SECRET[:4] not in str(raised.value)
        assert str(pool / "bad.jsonl") in str(raised.value)
    assert [row.rejection for row in source.read_shard("good.jsonl")] == [None]


def test_a_link_within_the_pool_is_followed_and_changes_with_its_target(pool: Path) -> None:
    (pool / "linked.jsonl").symlink_to("good.jsonl")
    source = SampleSource(UPath(pool))

    index = source.index_shard("linked.jsonl")

    assert (index.sha256, index.n_rows) == (source.index_shard("good.jsonl").sha256, 1)
    assert len(list(source.read_shard("linked.jsonl"))) == 1
    write_lines(pool / "good.jsonl", [sharegpt_row("images/a.png")] * 2)
    assert not source.is_current("linked.jsonl", index)


def test_a_link_that_is_repaired_is_read_again(pool: Path) -> None:
    (pool / "bad.jsonl").symlink_to("../secret.jsonl")
    source = SampleSource(UPath(pool))
    index = source.index_shard("bad.jsonl")
    before = source.shard_fingerprint("bad.jsonl", index)

    (pool / "bad.jsonl").unlink()
    (pool / "bad.jsonl").write_text("")

    assert not source.is_current("bad.jsonl", index)
    assert source.shard_fingerprint("bad.jsonl", source.index_shard("bad.jsonl")) != before


def test_a_shard_that_becomes_a_link_after_it_was_found_is_refused_when_it_is_read(pool: Path) -> None:
    source = SampleSource(UPath(pool))
    keys = source.shard_keys()
    rows = source.read_shard("good.jsonl")
    keys["good.jsonl"].unlink()
    (pool / "good.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(ShardFormatError, match="leads out of the pool"):
        list(rows)


def test_one_declared_file_may_be_a_link_to_anywhere(pool: Path) -> None:
    (pool.parent / "declared.jsonl").symlink_to("pool/good.jsonl")
    (pool.parent / "images").symlink_to("pool/images")
    source = SampleSource(UPath(pool.parent / "declared.jsonl"), UPath(pool))
    assert [row.rejection for row in source.read_shard("declared.jsonl")] == [None]
