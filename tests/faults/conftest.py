"""Processes and a pool, for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.children import Children
from tests.faults.known_pool import Pool


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is of the marker ``faults``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("faults")


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Runs functions in processes of their own."""
    server = Children(tmp_path_factory.mktemp("children"))
    yield server
    server.close()


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """Two shards, in each of which a row has an image that cannot be decoded."""
    pool = Pool(tmp_path / "pool")
    pool.add("a.jsonl", 5)
    pool.add("b.jsonl", 9)
    return pool
