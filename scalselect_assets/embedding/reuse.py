"""The reuse of vectors for samples whose text and images already have a vector of this model.

Such vectors are in two places: the shard's committed table, after a part of the shard has changed, and the
parts that a materialization saves at intervals, in case it is killed. Both are looked up by
content (sample key and the SHA-256 of each image's bytes), never by row number, so it does not matter which
version of the shard they were made from. Costs: reading the shard's images, and its vectors once.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa

from scalselect_assets.resources.artifacts import FRAME, ArtifactCorruptError, ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingStore, EmbeddingTable, EmbeddingTableError

if TYPE_CHECKING:
    from scalselect_assets.method.representation.encoder import Outcome, Representation

_MISSING, _NOT_ALLOWED = "missing", "not allowed"  # in the place of a hash
SET_ASIDE = "set_aside_embeddings"
_NUMBERS = ("n_tokens", "n_vision_tokens", "n_dominant_tokens", "n_instruction_tokens", "vision_attention")


Conditions: TypeAlias = Mapping[str, str]
"""The conditions that must be equal for a vector to be reused, by name."""


def known_vectors(
    artifacts: ArtifactStore,
    embeddings: EmbeddingStore,
    shard: str,
    conditions: Conditions,
    committed: tuple[EmbeddingTable, Conditions] | None,
) -> dict[str, "Representation"]:
    """The representations that a shard has under these conditions, by sample key.

    A committed table or part that cannot be read is ignored: its rows are embedded again.
    """
    known: dict[str, Representation] = {}
    if committed is not None and committed[1] == conditions:
        with suppress(EmbeddingTableError):
            known.update(_representations(embeddings.read_all(committed[0])))
    for part in parts(artifacts, shard):
        try:
            frame, header = artifacts.read_frame(SET_ASIDE, part)
        except ArtifactCorruptError:
            continue
        if {name: header[name] for name in conditions} == conditions:
            known.update(_representations(frame.to_arrow()))
    return known


def unchanged(
    known: "dict[str, Representation]",
    sample_keys: Sequence[str],
    images: Sequence[Sequence[str]],
    read_image: Callable[[str], bytes],
) -> "dict[int, Representation]":
    """The samples that need no embedding, by place: their key is known and their images are unchanged.

    Args:
        known: Known representations by sample key.
        sample_keys: (n,) keys of the samples.
        images: (n,) references of each sample's images.
        read_image: Reads the bytes of a reference. Samples with a reference that is not allowed count as
            changed. Samples with a missing image keep their vector (see `pool.missing_images`).

    Raises:
        OSError: An image exists but cannot be read.
    """
    digests: dict[str, str] = {}

    def digest(reference: str) -> str:
        if reference not in digests:
            try:
                digests[reference] = hashlib.sha256(read_image(reference)).hexdigest()
            except FileNotFoundError:
                digests[reference] = _MISSING
            except (PermissionError, IsADirectoryError):
                digests[reference] = _NOT_ALLOWED
        return digests[reference]

    def is_unchanged(references: Sequence[str], known_as: Sequence[str]) -> bool:
        return len(references) == len(known_as) and all(
            digest(reference) in {sha256, _MISSING}
            for reference, sha256 in zip(references, known_as, strict=True)
        )

    return {
        place: known[key]
        for place, (key, references) in enumerate(zip(sample_keys, images, strict=True))
        if key in known and is_unchanged(references, known[key].image_sha256)
    }


def set_aside(
    outcomes: "Iterable[tuple[int, Outcome]]",
    artifacts: ArtifactStore,
    shard: str,
    sample_keys: Sequence[str],
    conditions: Conditions,
    interval_seconds: float,
) -> "Iterator[tuple[int, Outcome]]":
    """Pass outcomes through, and write the representations among them to the store every interval.

    A materialization that is killed loses at most one interval of work.
    """
    from scalselect_assets.method.representation.encoder import Representation

    waiting: dict[str, Representation] = {}
    number, written = len(parts(artifacts, shard)), time.monotonic()
    for place, outcome in outcomes:
        if isinstance(outcome, Representation):
            waiting[sample_keys[place]] = outcome
        if waiting and time.monotonic() - written >= interval_seconds:
            artifacts.write_frame(SET_ASIDE, _frame(waiting), conditions, _part(shard, number))
            waiting, number, written = {}, number + 1, time.monotonic()
        yield place, outcome


def forget(artifacts: ArtifactStore, shard: str) -> None:
    """Remove the parts that were set aside for a shard, once the shard is committed."""
    # Delete the last part first: after a crash the remaining numbers have no gap, so the next call finds all.
    for part in reversed(parts(artifacts, shard)):
        artifacts.path(SET_ASIDE, part, suffix=FRAME).unlink(missing_ok=True)


def _part(shard: str, number: int) -> str:
    return f"{number:06d}/{shard}"


def parts(artifacts: ArtifactStore, shard: str) -> list[str]:
    """The parts of a shard, which are numbered from 0 without a gap."""
    found: list[str] = []
    while artifacts.exists(SET_ASIDE, part := _part(shard, len(found)), suffix=FRAME):
        found.append(part)
    return found


def _frame(representations: "dict[str, Representation]") -> pl.DataFrame:
    items = representations.values()
    return pl.DataFrame(
        {
            "sample_key": list(representations),
            "vector": np.array([item.vector for item in items]),
            "image_sha256": [list(item.image_sha256) for item in items],
            **{name: [getattr(item, name) for item in items] for name in _NUMBERS},
        }
    )


def _representations(table: pa.Table) -> "Iterator[tuple[str, Representation]]":
    """Sample key and representation of each row."""
    from scalselect_assets.method.representation.encoder import Representation

    if table.num_rows == 0:
        return
    vectors = table["vector"].combine_chunks()
    matrix = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1)
    columns = zip(*(table[name].to_pylist() for name in _NUMBERS), strict=True)
    for key, vector, images, numbers in zip(
        table["sample_key"].to_pylist(), matrix, table["image_sha256"].to_pylist(), columns, strict=True
    ):
        yield (
            key,
            Representation(
                vector=vector, image_sha256=tuple(images), **dict(zip(_NUMBERS, numbers, strict=True))
            ),
        )
