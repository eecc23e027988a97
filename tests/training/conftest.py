"""A selection as its own location makes it, once; and copies of what it leaves, which tests may change."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from scalselect_assets.declaration.selection import Selection
from tests.bench import Bench
from tests.conftest import png_bytes, sharegpt_row, write_lines
from tests.quick_dagster import quick_storage
from training.training_data import TrainingData, read_training_data

ROWS = [
    *(
        sharegpt_row(f"{index}.png", f"<image>\nIs this picture {index}?", f"It is {index}.", id=index)
        for index in range(5)
    ),
    sharegpt_row(["0.png", "1.png"], "<image> <image>\nAre they the same?", "No, they differ.", id="two"),
    {
        "id": "turns",
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "<image>\nIs it Yes or No?"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "And this? <image>"},
            {"role": "assistant", "content": "No"},
        ],
        "images": ["2.png", "3.png"],
    },
    {
        "id": "text",
        "messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}],
    },
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, dagster_templates: Path, demo_vlm: Path) -> Bench:
    """A refreshed selection of all of ``ROWS``, the one without an image included."""
    folder = tmp_path_factory.mktemp("selection")
    write_lines(folder / "pool" / "a.jsonl", ROWS)
    for index in range(5):
        (folder / "pool" / f"{index}.png").write_bytes(png_bytes(index))
    bench = Bench(folder / "pool", folder / "store", demo_vlm)
    bench.options |= {"budget": 1.0, "text_only": "keep"}
    with quick_storage(dagster_templates):
        bench.refresh()
    return bench


@dataclass(frozen=True)
class Outputs:
    """A copy of what the selection left for others; the pool and the model are the selection's own."""

    selection: Selection

    @property
    def folder(self) -> Path:
        return Path(self.selection.store) / "training_dataset"

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        found.pop("payload_sha256", None)  # so that what is changed and written passes as written by hand
        return found

    def read(self) -> TrainingData:
        return read_training_data(UPath(self.folder))

    def write(self, rows: list[Any], **more: Any) -> None:
        """Other rows, with a manifest that fits them, as the selection would write both."""
        path = write_lines(self.folder / self.manifest["training_file"], rows)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest = {**self.manifest, "data_version": sha256, **more}
        manifest["files"][path.name] = {"sha256": sha256, "rows": len(rows), "bytes": path.stat().st_size}
        (self.folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def outputs(made: Bench, tmp_path: Path) -> Outputs:
    for asset in ("training_dataset", "selected_subset"):
        shutil.copytree(made.store / asset, tmp_path / "store" / asset)
    return Outputs(made.selection.model_copy(update={"store": str(tmp_path / "store")}))


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family (`tests.method.zoo`)."""
    from tests.method.zoo import write_tiny_vlm

    root = tmp_path_factory.mktemp("zoo")
    return lambda family: write_tiny_vlm(family, root / family)
