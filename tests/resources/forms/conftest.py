"""Pools in every form, with pictures of one colour each, so that a mix-up shows."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from scalselect_assets.resources.judged_rows import PoolRow
from scalselect_assets.resources.sample_source import SampleSource
from tests.conftest import png_bytes

TURNS = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A dog."}]


def picture(number: int) -> bytes:
    return png_bytes(number)


def turns(question: str = "<image>What is it?", answer: str = "A dog.") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def source_at(root: Path, **fields: Any) -> SampleSource:
    return SampleSource(UPath(root), **fields)


def rows_of(root: Path, key: str, **fields: Any) -> list[PoolRow]:
    return list(source_at(root, **fields).read_shard(key))


def reasons(rows: Sequence[PoolRow]) -> list[str | None]:
    return [row.rejection.reason.value if row.rejection else None for row in rows]


def images_of(root: Path, rows: Sequence[PoolRow], **fields: Any) -> list[list[bytes]]:
    source = source_at(root, **fields)
    return [[source.open_image(path) for path in row.image_paths] for row in rows]


def write_tar(path: Path, files: Mapping[str, bytes | dict[str, Any]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    root = tmp_path / "pool"
    root.mkdir()
    return root


WritePool = Callable[..., Path]
