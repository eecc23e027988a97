"""The explanation for a pool without embedded rows: each reason with an example, and a remedy."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.resources.artifacts import FRAME, ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.image_root import ImageRoot
from scalselect_assets.resources.samples import parse_row
from scalselect_assets.resources.storage import StorageResource

_ELSEWHERE = (RejectionReason.MISSING_IMAGE.value, RejectionReason.OUTSIDE_IMAGE_ROOT.value)
_SAMPLED_ROWS = 50
_LOOKED_AT = 100_000
"""The maximum number of files and folders near the pool that are searched for images."""


@dataclass(frozen=True, slots=True)
class FoundImages:
    """A folder below which images of a pool were found.

    Attributes:
        root: The folder, to be declared as the image root.
        found: Number of images that were found below the folder.
        wanted: Number of images that were searched for.
    """

    root: str
    found: int
    wanted: int


def explain_rejections(
    selection: Selection, storage: StorageResource, artifacts: ArtifactStore, shards: Iterable[str]
) -> str:
    """The reasons for which rows of the shards were rejected, for a pool without embedded rows."""
    counts, examples, texts = Counter[str](), dict[str, str](), list[str]()
    for shard in shards:
        try:
            rejected, _ = artifacts.read_frame(receipts.REJECTED, shard, columns=["reason", "detail", "text"])
        except ArtifactMissingError:
            continue
        for reason, n_rows in rejected.group_by("reason").len().iter_rows():
            counts[reason] += n_rows
        for reason, detail in rejected.group_by("reason").agg(pl.col("detail").first()).iter_rows():
            examples.setdefault(reason, detail)
        elsewhere = rejected.filter(pl.col("reason").is_in(_ELSEWHERE))
        texts += elsewhere["text"].head(_SAMPLED_ROWS - len(texts)).to_list()
    lines = [
        f"  {reason} ({n_rows:,} rows), for example: {examples[reason]}"
        for reason, n_rows in counts.most_common()
    ]
    folder = artifacts.path(receipts.REJECTED, suffix=FRAME).parent
    lines.append(f"The rejected rows with their reasons are in {folder}.")
    if (found := find_images(selection, storage, texts)) is not None:
        lines.append(
            f"{found.found} of {found.wanted} images that were looked for are below {found.root}: run again "
            f"with --image-root {found.root}"
        )
    return "\n".join(lines)


def find_images(selection: Selection, storage: StorageResource, texts: Iterable[str]) -> FoundImages | None:
    """The folder near a local pool below which most of the images of some rows are found, or None."""
    source = storage.path(selection.source)
    if not is_local(source):
        return None
    wanted = dict.fromkeys(reference for text in texts for reference in _references(text))
    if not wanted:
        return None
    roots = Counter[str]()
    names = {posixpath.basename(reference) for reference in wanted}
    for path in _files_named(Path(source.path).parent, names):
        for reference in wanted:
            if posixpath.basename(reference) == path.name:
                roots[_root_of(path, reference, Path(source.path))] += 1
    for root, _ in roots.most_common(3):
        folder = storage.path(root)
        images = ImageRoot(folder, folder, moved=True)
        n_found = sum(images.resolve(reference).rejection is None for reference in wanted)
        if n_found:
            return FoundImages(root, n_found, len(wanted))
    return None


def _references(text: str) -> tuple[str, ...]:
    sample = parse_row(text).sample
    return tuple(name for name in sample.images if "://" not in name) if sample else ()


def _files_named(folder: Path, names: set[str]) -> Iterator[Path]:
    """Files with these names in a folder and below it, nearest first, among the first `_LOOKED_AT` entries.

    Other file systems are not searched, since a hint is not worth waiting for a network.
    """
    waiting, looked_at, device = [folder], 0, folder.stat().st_dev
    while waiting and looked_at < _LOOKED_AT:
        below = waiting.pop(0)
        try:
            entries = sorted(os.scandir(below), key=lambda entry: entry.name)
        except OSError:
            continue  # a hint is not worth an error
        looked_at += len(entries)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                hidden = entry.name.startswith(".")
                if not hidden and entry.stat(follow_symlinks=False).st_dev == device:
                    waiting.append(Path(entry.path))
            elif entry.name in names:
                yield Path(entry.path)


def _root_of(path: Path, reference: str, pool: Path) -> str:
    """The folder from which a reference leads to a file: the file's path without their common end."""
    there, named = list(path.parts), [part for part in reference.split("/") if part not in ("", ".")]
    n_common = 0
    while n_common < min(len(there), len(named)) and there[-1 - n_common] == named[-1 - n_common]:
        n_common += 1
    # A root that holds the pool itself says little, so an absolute path keeps one more folder in the root.
    if reference.startswith("/") and pool.is_relative_to(Path(*there[: len(there) - n_common])):
        n_common = max(1, n_common - 1)
    return str(Path(*there[: len(there) - n_common]))
