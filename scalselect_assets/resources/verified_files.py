"""A check that a store's files are undamaged. Each file is read once, and again when it has changed.

A file with the same size and time as at its last reading is not read again, so a check costs one file status.
The results are kept in the store. If a file system changes bytes and keeps the time, only
`scalselect verify --deep` notices, because it ignores these results. Files in an object store are not checked
here: they are compared with their hash whenever they are read.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from upath import UPath

from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.files import is_local

NAME = "verified_files-1"
_SEALED = "sealed"

_Known = dict[str, tuple[int, int, str]]


@dataclass
class VerifiedFiles:
    """The knowledge about the files of one store, for one pass over them.

    Attributes:
        artifacts: The store.
        damaged: Files found to be damaged, each with a description of the damage.
    """

    artifacts: ArtifactStore
    damaged: dict[str, str] = field(default_factory=dict)
    _asked: _Known = field(default_factory=dict)
    _known: _Known | None = None

    def is_whole(self, path: UPath) -> bool:
        """Whether a file that carries its own hash exists and is undamaged."""
        if not is_local(self.artifacts.root):
            return bool(path.exists())
        name, state = self._name(path), _state(path)
        if state is None:
            return False
        if self._remembered(name, state) is None:
            try:
                self.artifacts.check_file(path)
            except ArtifactMissingError:
                return False
            except ArtifactCorruptError as error:
                self.damaged[name] = str(error)
                return False
        self._asked[name] = (*state, _SEALED)
        return True

    def sha256(self, path: UPath) -> str | None:
        """The SHA-256 of a file; None if it does not exist or lies in an object store."""
        state = _state(path) if is_local(self.artifacts.root) else None
        if state is None:
            return None
        name = self._name(path)
        found = self._remembered(name, state) or _hash(Path(path.path))
        self._asked[name] = (*state, found)
        return found

    def save(self) -> None:
        """Save the results of this pass, and nothing else."""
        if is_local(self.artifacts.root) and self._asked and self._asked != self._memory():
            self.artifacts.write_json(NAME, {"files": self._asked}, durable=False)
            self._known = dict(self._asked)

    def _remembered(self, name: str, state: tuple[int, int]) -> str | None:
        for memory in (self._asked, self._memory()):
            known = memory.get(name)
            if known is not None and tuple(known[:2]) == state:
                return known[2]
        return None

    def _memory(self) -> _Known:
        if self._known is None:
            try:
                read = self.artifacts.read_json(NAME, shape=dict[str, _Known])
            except (ArtifactMissingError, ArtifactCorruptError):
                read = {}  # the file is only a cache
            self._known = read.get("files", {})
        return self._known

    def _name(self, path: UPath) -> str:
        return path.path.removeprefix(f"{self.artifacts.root.path}/")


def _state(path: UPath) -> tuple[int, int] | None:
    try:
        status = Path(path.path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size, status.st_mtime_ns


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
