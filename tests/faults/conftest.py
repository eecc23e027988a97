"""Processes to kill, for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.faults import standin
from tests.faults.children import Children


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Runs functions in processes of their own."""
    server = Children(tmp_path_factory.mktemp("children"))
    yield server
    server.close()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes the place of any model in this process."""
    monkeypatch.setattr("scalselect_assets.method.loading.load_encoder", standin.load)
