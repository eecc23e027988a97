"""Pools of hostile rows for the exports, without a model: what a table holds of each row is made here."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from scalselect_assets.dataset.exports.base import Export
from scalselect_assets.dataset.exports.publish import EXPORTS, Report, write_export
from scalselect_assets.dataset.exports.rows import ExportRow, RowSpool
from scalselect_assets.declaration.export_specs import ExportSpec
from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.samples import parse_row
from tests.conftest import png_bytes

DATASET = "pool_of_tests"


def said(*turns: str, images: Sequence[str] = (), system: str | None = None, **more: Any) -> dict[str, Any]:
    """A row whose turns are the user's and the assistant's by turns."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "images": list(images), **more}


HOSTILE = [
    said("<image>\nWhat is this?", "Noise.", images=["plain.png"], id=7, source="coco"),
    said("<image>他们是谁？", "拜仁慕尼黑。", images=["目录/图 1.png"], id="中文", source="mllm"),
    said("<image> and <image>?", "Same.", images=["plain.png", "plain.png"], source={"name": "two"}),
    said(
        "Hello.",
        "Hi.",
        "And <image> this?",
        "Yes.",
        "Is {it}, it?",
        'It\'s "so".\u2028',
        images=["a,b {c}.PNG"],
    ),
    said("<image>\nBrief?", "No.", images=["upper.JPEG"], system="Be brief.", id=None),
    said("No mark at all", "Fine.", images=["no_suffix"], id="x" * 300),
    said("Text alone.", "Yes, </b> alone.", id="text", source="wiki"),
    said("Text, system.", "Yes.", system="Rules."),
]


@dataclass
class ExportBench:
    """A pool of rows on disk, the spool of them, and where exports go."""

    folder: Path
    target: UPath
    spool: RowSpool
    source: SampleSource
    spooled: list[ExportRow] = field(default_factory=list)

    def write(self, format_name: str | Export, **spec: Any) -> tuple[Report, UPath]:
        export = EXPORTS[format_name] if isinstance(format_name, str) else format_name
        declared = ExportSpec(format=export.name, **{"order": "pool", **spec})
        target = self.target / export.name
        return write_export(export, declared, self.spool, self.source, target, DATASET), target

    def lines(self, path: UPath) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


MakeBench = Callable[..., ExportBench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[MakeBench]:
    """Write rows as a pool, their images as noise, and spool all of them, the last image row ranked first."""
    spools: list[RowSpool] = []

    def make(rows: Iterable[dict[str, Any]] = HOSTILE, target: UPath | None = None) -> ExportBench:
        rows, pool = list(rows), tmp_path / "pool"
        pool.mkdir(exist_ok=True)
        spools.append(RowSpool())
        source = SampleSource(UPath(pool), UPath(pool))
        bench = ExportBench(pool, target or UPath(tmp_path / "exports"), spools[-1], source)
        for place, row in enumerate(rows):
            for image in row["images"]:
                (pool / image).parent.mkdir(parents=True, exist_ok=True)
                (pool / image).write_bytes(png_bytes(int(hashlib.sha256(image.encode()).hexdigest()[:6], 16)))
            bench.spooled.append(_spooled(pool, place, row, rank=len(rows) - place))
            bench.spool.add(bench.spooled[-1])
        return bench

    yield make
    for spool in spools:
        spool.close()


def _spooled(pool: Path, place: int, row: dict[str, Any], rank: int) -> ExportRow:
    text = json.dumps(row, ensure_ascii=False)
    source_id = parse_row(text).source_id
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    shard = "deep/a.jsonl" if place % 2 else "b.jsonl"
    if not row["images"]:
        return ExportRow(key, source_id, shard, place, text)
    sha256 = tuple(hashlib.sha256((pool / image).read_bytes()).hexdigest() for image in row["images"])
    return ExportRow(
        key, source_id, shard, place, text, tuple(row["images"]), sha256, rank, 0.5 / rank, 1.0 / rank, 17
    )
