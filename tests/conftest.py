"""Fixtures that several test folders share: the generated model, small pools built from rows, processes."""

import gc
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from sqlalchemy import Engine, event

from tests.tiers import hold_to_tiers, mark_slow, running

# No test is timed. In CI every property is tried on the same cases each time; elsewhere on new ones, which
# may show a fault that the change at hand did not make.
settings.register_profile("scalselect", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("scalselect")


@event.listens_for(Engine, "connect")
def _without_waiting_for_the_disk(connection: Any, _record: object) -> None:
    """Dagster's SQLite files of a test need not outlive a power cut; waiting took a fifth of the time."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: the daemon's tests mostly wait."""
    return (os.cpu_count() or 1) + 1


def pytest_configure(config: pytest.Config) -> None:
    """Let SIGINT interrupt, as the tests of interruptions raise it: `nohup` and ``&`` leave it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    patch = pytest.MonkeyPatch()
    hold_to_tiers(patch)
    config.add_cleanup(patch.undo)


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get the marker ``slow``; the daemon's test, which mostly waits, begins before all others."""
    mark_slow(items)
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection: it took a sixth of the time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test that starts processes is slow."""
    with running(item):
        return (yield)


ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

RunPython: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


def png_bytes(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A PNG of seeded noise blocks."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def sharegpt_row(
    image: str | Sequence[str] | None,
    question: str = "<image>\nWhat is this?",
    answer: str = "Noise.",
    **more: Any,
) -> dict[str, Any]:
    """One row in ShareGPT form."""
    images = [] if image is None else [image] if isinstance(image, str) else list(image)
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": images,
        **more,
    }


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A JSON Lines shard; strings are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Tiny products on several threads mostly wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def processes() -> None:
    """Says that a test starts processes of Python, which makes it a slow one."""


@pytest.fixture
def fresh_python(processes: None) -> RunPython:
    """Runs Python, which has imported nothing, in a process of its own; names are environment variables."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def demo_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model: a real LLaVA architecture with its real processor, randomly initialised."""
    from scalselect_assets.demo.demo_model import write_demo_vlm

    return write_demo_vlm(tmp_path_factory.mktemp("models") / "demo-vlm")


@pytest.fixture(scope="session")
def dagster_templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the schemas of Dagster's SQLite files are kept to be copied."""
    return tmp_path_factory.mktemp("dagster")


@pytest.fixture(scope="module")
def quick_dagster(dagster_templates: Path) -> Iterator[None]:
    """For modules with many refreshes; see `tests.quick_dagster`."""
    from tests.quick_dagster import quick_storage

    with quick_storage(dagster_templates):
        yield


@pytest.fixture(scope="session")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, int]], Path]:
    """An empty folder with a pool of ``{shard: n_rows}`` in it, as ``make_pool`` writes it.

    The folder is the same one for the same shards in every test, and so are the times of its files, so that
    what one test's refresh has made of it is up to date in the next one's.
    """
    root = tmp_path_factory.mktemp("standing")

    def make(shards: dict[str, int]) -> Path:
        folder = root / "-".join(f"{shard}-{n_rows}" for shard, n_rows in shards.items())
        untouched = folder.with_suffix(".untouched")
        if not untouched.exists():
            for number, (shard, n_rows) in enumerate(shards.items()):
                write_pool_shard(untouched / "pool", shard, n_rows, seed=1000 * number)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(untouched, folder)
        return folder

    return make


@pytest.fixture
def make_pool(tmp_path: Path) -> Callable[..., Path]:
    """Write ``{shard: n_rows}`` as a pool of distinct samples with one image each."""

    def make(shards: dict[str, int], folder: str = "pool") -> Path:
        root = tmp_path / folder
        for number, (shard, n_rows) in enumerate(shards.items()):
            write_pool_shard(root, shard, n_rows, seed=1000 * number)
        return root

    return make


def write_pool_shard(root: Path, shard: str, n_rows: int, seed: int) -> None:
    """One shard of distinct samples, with images of its own."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(seed, seed + n_rows):
        (root / "images" / f"{index}.png").write_bytes(png_bytes(index))
        depth = "../" * shard.count("/")
        rows.append(
            sharegpt_row(f"{depth}images/{index}.png", f"<image>\nIs this picture {index}?", "Yes", id=index)
        )
    write_lines(root / shard, rows)
