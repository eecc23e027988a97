"""WebDataset archives: a sample is a row, and its images are read from where they lie."""

from pathlib import Path
from typing import Any

import pytest

from scalselect_assets.resources.shard_reader import ShardFormatError
from tests.resources.forms.conftest import (
    images_of,
    picture,
    reasons,
    rows_of,
    source_at,
    turns,
    write_tar,
)


@pytest.mark.parametrize(
    "named",
    [
        {"images": ["0.png", "1.png"]},
        {"images": ["deep/a.0.png", "deep/a.1.png"]},
        {"images": ["coco/7.jpg", "coco/8.jpg"]},
        {},
    ],
    ids=["by field", "by file", "by another name", "not at all"],
)
def test_a_sample_names_its_images_by_field_by_file_or_not_at_all(pool: Path, named: dict[str, Any]) -> None:
    row = {"messages": turns("<image><image>Same?"), **named}
    write_tar(
        pool / "s.tar",
        {"deep/a.0.png": picture(1), "deep/a.json": row, "deep/a.1.png": picture(2),
         "b.json": {"messages": turns(), "image": "b.jpg", "id": 5}, "b.jpg": picture(3)},
    )  # fmt: skip

    found = rows_of(pool, "s.tar")

    assert reasons(found) == [None, None]
    assert [row.source_id for row in found] == ["deep/a", "5"]
    assert found[0].image_paths == ("s.tar#0/0", "s.tar#0/1")
    assert images_of(pool, found[::-1]) == [[picture(3)], [picture(1), picture(2)]]
    index = source_at(pool).index_shard("s.tar")
    assert (index.n_rows, index.images) == (2, ())


def test_what_is_no_row_is_rejected_for_its_own_reason(pool: Path) -> None:
    write_tar(
        pool / "s.tar",
        {
            "a.json": {"messages": turns()},
            "a.png": picture(1),
            "b.json": b"{not json",
            "c.png": picture(2),
            "d.json": {"messages": turns("What?")},
            "e.json": {"messages": turns("What happens?")},
            "e.mp4": b"\0\0\0\x18ftypmp42",
            "f.json": b'{"id": "\xff"}',
            "g.json": b"[1]",
        },
    )

    assert reasons(rows_of(pool, "s.tar")) == [
        None, "malformed_row", "malformed_row", "text_only", "other_media", "malformed_row", "malformed_row",
    ]  # fmt: skip


def test_an_archive_of_images_only_or_a_damaged_one_is_no_shard(pool: Path) -> None:
    write_tar(pool / "images.tar", {"a.png": picture(1), "b.png": picture(2)})
    whole = write_tar(pool / "s.tar", {"a.png": picture(1), "a.json": {"messages": turns()}}).read_bytes()
    (pool / "cut.tar").write_bytes(whole[:700])
    (pool / "no.tar").write_bytes(b"x" * 2000)

    with pytest.raises(ShardFormatError, match="the archive holds no rows"):
        rows_of(pool, "images.tar")
    for key in ("cut.tar", "no.tar"):
        with pytest.raises(ShardFormatError, match="not an uncompressed tar archive, or is cut off"):
            rows_of(pool, key)
        assert source_at(pool).index_shard(key).n_rows is None
