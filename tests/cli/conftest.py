"""The command in the tests' own process, which has imported what takes seconds."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scalselect_assets.cli import app as cli

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def scalselect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run the command in a folder of its own, in this process, which has imported what takes seconds."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"COLUMNS": "60", "LANCEDB_LOG": "error", "OMP_WAIT_POLICY": "PASSIVE"}.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["scalselect", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    level = logging.getLogger("scalselect").level
    yield run
    logging.getLogger("scalselect").setLevel(level)


def summary_of(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object on standard output."""
    assert finished.returncode == 0, finished.stderr
    (line,) = finished.stdout.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result
