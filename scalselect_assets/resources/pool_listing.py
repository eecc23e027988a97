"""The files of a pool's folder: the shards, and the files passed over, with the reason.

Nothing is passed over in silence: files other than shards and images are counted by kind, with examples.
"""

import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from upath import UPath

from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.forms.registry import form_of
from scalselect_assets.resources.row_images import IMAGE_SUFFIXES, MEDIA_SUFFIXES

STORE_MARK = "selection.yaml"
"""A folder with a file of this name is the store of some selection, and holds no shards."""

DEFAULT_IGNORE = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"),
    *("trainer_state.json", "trainer_log.jsonl", "*_results.json", "training_args.*", "train_arguments.yaml"),
    *(
        "config.json",
        "*_config.json",
        "tokenizer*.json",
        "special_tokens_map.json",
        "*.safetensors.index.json",
    ),
    *("README*", "LICENSE*", "LICENCE*", "*.md", "*.py", "*.sh", "*.yaml", "*.yml", "*.toml", "*.lock"),
    *(".git", ".gitattributes", ".gitignore", ".DS_Store", "._*", "Thumbs.db", ".cache", ".huggingface"),
)
"""Names that are no shards in any pool: files that libraries write beside a dataset, and documentation."""


def ignore_patterns(declared: Sequence[str]) -> tuple[str, ...]:
    """The default patterns and those of a declaration, in which ``!pattern`` removes a default."""
    taken_back = {pattern.removeprefix("!") for pattern in declared if pattern.startswith("!")}
    defaults = (pattern for pattern in DEFAULT_IGNORE if pattern not in taken_back)
    return (*defaults, *(pattern for pattern in declared if not pattern.startswith("!")))


EXPORT_MARK = "selected_ids.jsonl"
_EXPORT_RECORDS = (EXPORT_MARK, "rejected.jsonl", "images.jsonl", "meta.json", "shards.json", "arguments.txt")
"""Files that our export writes beside its rows; listing skips them, so the folder can be a pool again."""

_EXAMPLES = 3


@dataclass(slots=True)
class PassedOver:
    """Files or folders of one kind that are not read.

    Attributes:
        count: Number of such files or folders; the content of a folder is not counted.
        examples: The first of them, as paths from the pool's folder.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(path)


@dataclass(frozen=True, slots=True)
class PoolListing:
    """The content of a pool's folder.

    Attributes:
        shards: The shards' paths from the folder, unordered.
        passed_over: By kind: ``hidden``, ``linked_folder``, ``unreadable`` (a pipe, a device),
            ``ignored`` (by a pattern), and ``other:<suffix>`` for files of a form that is not read.
    """

    shards: list[str] = field(default_factory=list)
    passed_over: dict[str, PassedOver] = field(default_factory=dict)

    def pass_over(self, kind: str, path: str) -> None:
        """Count a file or folder that is not read."""
        self.passed_over.setdefault(kind, PassedOver()).add(path)

    @property
    def unexpected(self) -> dict[str, PassedOver]:
        """The files and folders passed over although no pattern asked for it."""
        return {kind: found for kind, found in sorted(self.passed_over.items()) if kind != "ignored"}

    def to_json(self) -> dict[str, Any]:
        """Count and examples by kind, for the manifest and `status --json`."""
        return {
            kind: {"count": found.count, "examples": list(found.examples)}
            for kind, found in sorted(self.passed_over.items())
        }


def in_words(passed_over: Mapping[str, Mapping[str, Any]]) -> str:
    """``PoolListing.to_json`` as one phrase; empty if only ignored files are passed over."""
    return ", ".join(
        f"{found['count']} {_WORDS.get(kind, kind.removeprefix('other:'))} (such as {found['examples'][0]})"
        for kind, found in passed_over.items()
        if kind != "ignored"
    )


_WORDS = {
    "hidden": "hidden",
    "linked_folder": "linked folder(s)",
    "unreadable": "that cannot be opened",
    "other:": "without a suffix",
}


def list_shards(folder: UPath, excluded: frozenset[str], ignore: Sequence[str]) -> PoolListing:
    """List a pool's folder and the folders below it.

    Args:
        folder: The folder.
        excluded: Identities (``folder_identity``) of folders that hold no shards.
        ignore: Shell patterns for names or for paths from the folder.

    Raises:
        OSError: A folder cannot be listed; a partial answer would look like deleted shards.
    """
    listing = PoolListing()
    _walk(folder, "", excluded, tuple(ignore), listing)
    return listing


def folder_identity(folder: UPath) -> str:
    """A text that is equal for two paths to the same folder."""
    if is_local(folder):
        return os.path.realpath(folder.path)
    return f"{folder.protocol}:{folder.path.strip('/')}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a folder, or something else in a folder."""

    name: str
    kind: str
    """``file``, ``folder``, ``linked_folder`` or ``unreadable``."""


def _walk(
    folder: UPath, below: str, excluded: frozenset[str], ignore: tuple[str, ...], listing: PoolListing
) -> None:
    entries = list(entries_of(folder))
    is_export = any(entry.name == EXPORT_MARK for entry in entries)
    for entry in entries:
        path = f"{below}{entry.name}"
        if is_ignored(entry.name, path, ignore) or (is_export and entry.name in _EXPORT_RECORDS):
            listing.pass_over("ignored", path)
        elif entry.name.startswith("."):
            listing.pass_over("hidden", path)
        elif entry.kind == "file":
            _sort(entry.name, path, listing)
        elif entry.kind != "folder":
            listing.pass_over(entry.kind, path)
        elif (
            folder_identity(folder / entry.name) not in excluded
            and not (folder / entry.name / STORE_MARK).exists()
        ):
            _walk(folder / entry.name, f"{path}/", excluded, ignore, listing)


def _sort(name: str, path: str, listing: PoolListing) -> None:
    if form_of(name):
        listing.shards.append(path)
    elif not name.lower().endswith((*IMAGE_SUFFIXES, *MEDIA_SUFFIXES)):
        # Rows name images and similar files, and a row that lacks one reports it.
        listing.pass_over(f"other:{suffixes_of(name)}", path)


def suffixes_of(name: str) -> str:
    """The last two suffixes of a name, in lower case; empty where it has none."""
    suffixes = [suffix for suffix in name.lower().split(".")[1:] if suffix.isalnum()]
    return "".join(f".{suffix}" for suffix in suffixes[-2:])


def is_ignored(name: str, path: str, ignore: tuple[str, ...]) -> bool:
    """Whether a file or folder matches a pattern, by its name or by its path from the folder."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(path, pattern) for pattern in ignore)


def entries_of(folder: UPath) -> Iterator[Entry]:
    """Everything in a folder; links to folders are distinguished from folders, and neither is followed.

    Raises:
        OSError: The folder cannot be listed.
    """
    if is_local(folder):
        with os.scandir(folder.path) as entries:
            for entry in entries:
                yield Entry(entry.name, _kind(entry))
        return
    own_name = folder.path.strip("/")
    for info in folder.fs.ls(folder.path, detail=True):
        name = info["name"].strip("/")
        # A store may list the folder's own marker object among what it holds.
        if name != own_name:
            yield Entry(posixpath.basename(name), "folder" if info["type"] == "directory" else "file")


def _kind(entry: "os.DirEntry[str]") -> str:
    if entry.is_symlink():
        # A link that leads nowhere, or in a circle, is a shard that fails, not one that was removed.
        return "linked_folder" if os.path.isdir(entry.path) else "file"  # noqa: PTH112
    if entry.is_dir():
        return "folder"
    return "file" if entry.is_file() else "unreadable"
