"""The pool's moments as running totals in the store, so that an update reads only the changed shards.

One file of totals is stored beside the basis and lists the version of each shard in it. For the next basis,
changed and removed shards are subtracted, and changed and new shards are added; only their moments are read.
Subtraction needs a shard's old moments. They are set aside when they are replaced, and deleted once they are
subtracted. If anything is missing, or a rebuild is asked for, the totals are added up anew from all shards.
Costs: reading and writing the totals (8·d² bytes each way), and d² operations per changed shard.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalselect_assets.resources.artifacts import (
    ARRAYS,
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStore,
)

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.moments import Moments
    from scalselect_assets.method.subspace.running_totals import RunningMoments

NAME = "pool_moments"
SHARD_MOMENTS = "embedding_moments"
RETIRED = "retired_moments"


@dataclass(frozen=True, slots=True)
class PoolMoments:
    """The moments of all shards, and the work that was needed to compute them.

    Attributes:
        moments: Moments of all shards together.
        n_read: Shard moments that were read.
        added: Shards put in.
        removed: Shards taken out; one that changed is in both.
        rebuilt: Whether everything was added up anew.
    """

    moments: "Moments"
    n_read: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    rebuilt: bool


def retire(artifacts: ArtifactStore, shard: str, new_version: str) -> None:
    """Set a shard's moments aside before they are replaced, if the totals contain them."""
    try:
        version = _version(artifacts, SHARD_MOMENTS, shard)
        held = _held(artifacts).get(shard)
    except (ArtifactMissingError, ArtifactCorruptError):
        return
    if version == held != new_version:
        artifacts.rename(SHARD_MOMENTS, shard, RETIRED, retired_name(shard, version), suffix=ARRAYS)


def update(artifacts: ArtifactStore, wanted: Mapping[str, str], *, rebuild: bool) -> PoolMoments | None:
    """Bring the totals in the store to exactly these shards.

    Args:
        artifacts: The store.
        wanted: Version of the moments by shard.
        rebuild: Add up all shards anew.

    Returns:
        The pool's moments; ``None`` where no shard is wanted.

    Raises:
        ArtifactMissingError: A wanted shard's moments are not there in that version.
        ArtifactCorruptError: They are damaged.
    """
    if not wanted:
        return None
    updated = None if rebuild else _updated(artifacts, wanted)
    if updated is None:
        totals = rebuilt_totals(artifacts, wanted)
        added, removed = tuple(wanted), tuple[str, ...]()
    else:
        totals, added, removed = updated
    n_read = len(added) + len(removed)
    if n_read:
        artifacts.write_arrays(NAME, totals.to_arrays(), {"shards": json.dumps(dict(wanted), sort_keys=True)})
    for path in artifacts.paths(RETIRED, suffix=ARRAYS):
        path.unlink(missing_ok=True)
    return PoolMoments(totals.moments(), n_read, added, removed, rebuilt=updated is None)


def stored(artifacts: ArtifactStore, wanted: Mapping[str, str]) -> "Moments":
    """The pool's moments of exactly these versions of its shards, without changing the store.

    Args:
        artifacts: The store.
        wanted: Version of the moments by shard.

    Raises:
        ArtifactMissingError: A wanted shard's moments are not there in that version.
        ArtifactCorruptError: They are damaged.
    """
    from scalselect_assets.method.subspace.running_totals import RunningMoments

    try:
        if _held(artifacts) == dict(wanted):
            return RunningMoments.from_arrays(artifacts.read_arrays(NAME)[0]).moments()
    except (ArtifactMissingError, ArtifactCorruptError, ValueError):
        pass  # the shards' own moments are the truth
    return rebuilt_totals(artifacts, wanted).moments()


def rebuilt_totals(artifacts: ArtifactStore, wanted: Mapping[str, str]) -> "RunningMoments":
    """The totals of these shards, added up anew; raises the same errors as ``update``."""
    from scalselect_assets.method.subspace.running_totals import RunningMoments

    totals: RunningMoments | None = None
    for shard, version in sorted(wanted.items()):
        moments = _shard_moments(artifacts, shard, version)
        if totals is None or totals.n == 0:
            totals = RunningMoments(moments.mean)
        totals.add(moments)
    if totals is None:
        raise ValueError("Got no shards; totals need at least one. Embed a shard first.")
    return totals


def _updated(
    artifacts: ArtifactStore, wanted: Mapping[str, str]
) -> "tuple[RunningMoments, tuple[str, ...], tuple[str, ...]] | None":
    """The stored totals, changed to the wanted shards; None if adding up anew reads no more."""
    from scalselect_assets.method.subspace.running_totals import RunningMoments

    try:
        held = _held(artifacts)
        removed = tuple(sorted(shard for shard, version in held.items() if wanted.get(shard) != version))
        added = tuple(sorted(shard for shard, version in wanted.items() if held.get(shard) != version))
        if len(removed) + len(added) >= len(wanted):
            return None
        totals = RunningMoments.from_arrays(artifacts.read_arrays(NAME)[0])
        for shard in removed:
            totals.remove(_shard_moments(artifacts, shard, held[shard]))
    except (ArtifactMissingError, ArtifactCorruptError, ValueError):
        # The totals or their moments are missing or damaged: add up the shards' own moments instead.
        return None
    for shard in added:
        totals.add(_shard_moments(artifacts, shard, wanted[shard]))
    return totals, added, removed


def _shard_moments(artifacts: ArtifactStore, shard: str, version: str) -> "Moments":
    """A shard's moments of one version, either the current ones or those set aside."""
    from scalselect_assets.method.subspace.moments import Moments

    for asset, name in ((SHARD_MOMENTS, shard), (RETIRED, retired_name(shard, version))):
        try:
            if _version(artifacts, asset, name) == version:
                return Moments.from_arrays(artifacts.read_arrays(asset, name)[0])
        except ArtifactMissingError:
            continue
    raise ArtifactMissingError(
        f"{SHARD_MOMENTS}[{shard}] of version {version} is not in the store; materialize it again"
    )


def _held(artifacts: ArtifactStore) -> dict[str, str]:
    """The version of each shard's moments that the stored totals hold."""
    held: dict[str, str] = json.loads(artifacts.read_header(NAME, suffix=ARRAYS)["shards"])
    return held


def _version(artifacts: ArtifactStore, asset: str, name: str) -> str:
    return artifacts.read_header(asset, name, suffix=ARRAYS)["data_version"]


def retired_name(shard: str, version: str) -> str:
    """The name of a shard's moments that were set aside."""
    return f"{shard}@{version}"
