"""Which outputs of a selection are out of date.

An output is current where its own header and Dagster's record of it both state the provenance that it would
have now. The assets of the path say what that is (`asset_path`); nothing here knows any of them by name.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import dagster as dg

from scalselect_assets.asset_path import OutputHeader, PathAsset, PoolAsset, ShardAsset, StoreState, path_of
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.method.interrupts import deferred
from scalselect_assets.pool.discovery import Discovery
from scalselect_assets.recording.data_versions import recorded
from scalselect_assets.recording.partitions import known_shards
from scalselect_assets.recording.records import latest_versions
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource


class Staleness:
    """Compares what a store and Dagster's records hold with what would be computed now; changes nothing.

    Attributes:
        path: The assets of the selection, in order.
        first: The assets by shard that come before all assets over the pool.
        rest: The assets after them.
    """

    def __init__(
        self, selection: Selection, storage: StorageResource, vlm: VlmResource, instance: dg.DagsterInstance
    ) -> None:
        self._selection, self._storage, self._vlm, self._instance = selection, storage, vlm, instance
        self.path = path_of(selection)
        n_first = next(i for i, asset in enumerate(self.path) if isinstance(asset, PoolAsset))
        self.first = [asset for asset in self.path[:n_first] if isinstance(asset, ShardAsset)]
        self.rest: list[PathAsset] = self.path[n_first:]

    @cached_property
    def model_fingerprint(self) -> str:
        """The target model's fingerprint when it was first asked for."""
        return self.model_fingerprint_now()

    def model_fingerprint_now(self) -> str:
        """The target model's fingerprint, from its files as they are."""
        artifacts = self._storage.artifacts(self._selection.store)
        return str(self._vlm.card(artifacts, **self._selection.target)["fingerprint"])

    def state(self, shard_versions: Mapping[str, str] | None = None) -> StoreState:
        """The store as it is now."""
        return StoreState(
            self._selection,
            self._storage,
            self._vlm,
            lambda: self.model_fingerprint,
            known_shards(self._instance, self._selection.name),
            shard_versions or {},
        )

    def stale_shards(self, shard_versions: Mapping[str, str]) -> dict[str, list[str]]:
        """By shard, the first assets that must run, in order: the first stale one and all after it.

        Args:
            shard_versions: The fingerprint of each shard file to look at.
        """
        state = self.state(shard_versions)
        found = {asset.name: self._recorded_by_shard(asset, set(shard_versions)) for asset in self.first}
        stale = {}
        for shard in shard_versions:
            for position, asset in enumerate(self.first):
                if not _is_current(
                    state.header(asset, shard),
                    found[asset.name].get(shard, {}),
                    asset.expected(state, shard),
                ):
                    stale[shard] = [later.name for later in self.first[position:]]
                    break
        return stale

    def stale_shards_of(self, asset: ShardAsset, state: StoreState) -> set[str]:
        """The shards of which an asset after an asset over the pool must be computed."""
        expected = {shard: asset.expected(state, shard) for shard in state.shards}
        wanted = {shard: provenance for shard, provenance in expected.items() if provenance is not None}
        found = self._recorded_by_shard(asset, set(wanted))
        return {
            shard
            for shard, provenance in wanted.items()
            if not _is_current(state.header(asset, shard), found.get(shard, {}), provenance)
        }

    def is_stale(self, asset: PathAsset, state: StoreState) -> bool:
        """Whether an asset, or any shard of it, must be computed, given that all before it is up to date."""
        if isinstance(asset, ShardAsset):
            return bool(self.stale_shards_of(asset, state))
        with deferred():
            event = self._instance.get_latest_materialization_event(self._selection.key(asset.name))
        found = recorded(event.asset_materialization) if event else {}
        return not _is_current(state.header(asset), found, asset.expected(state))

    def pending(self, discovery: Discovery) -> list[str]:
        """What a refresh would compute now: shards, else assets over the pool.

        Where shards are pending, what follows from them cannot be known and is not listed.
        """
        if shards := list(self.stale_shards(discovery.versions)):
            return shards
        later = [asset.name for asset in self.rest]
        state = self.state(discovery.versions)
        if set(state.shards) - set(discovery.unsettled) != set(discovery.versions):
            return later
        for position, asset in enumerate(self.rest):
            if self.is_stale(asset, state):
                return later[position:]
        return []

    def _recorded_by_shard(self, asset: ShardAsset, shards: set[str]) -> Mapping[str, Mapping[str, str]]:
        """The versions that the latest materialization of each shard recorded."""
        return latest_versions(
            self._instance,
            self._selection.key(asset.name),
            dg.DagsterEventType.ASSET_MATERIALIZATION,
            shards,
        )


def _is_current(header: OutputHeader, found: Mapping[str, str], expected: str | None) -> bool:
    """Whether what is stored, and what Dagster recorded of it, are what would be computed now.

    Both are asked: a store may be driven through several Dagster instances, and a process may be killed
    between writing a file and recording it.
    """
    return header.get("provenance") == found.get("provenance") == expected and header.get(
        "data_version"
    ) == found.get("data_version")


def contiguous_ranges(order: Sequence[str], wanted: set[str]) -> list[tuple[str, str]]:
    """The first and last key of each unbroken run of ``wanted`` keys in Dagster's partition ``order``."""
    ranges: list[tuple[str, str]] = []
    previous: str | None = None
    for key in order:
        if key in wanted:
            if ranges and ranges[-1][1] == previous:
                ranges[-1] = (ranges[-1][0], key)
            else:
                ranges.append((key, key))
        previous = key
    return ranges
