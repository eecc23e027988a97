"""Staleness: which outputs of a selection are out of date.

An output is current if its own header and Dagster's record of it both state the provenance that it would have
now, and if none of its checks of severity ERROR failed when it was last evaluated. Each asset of the path
computes that provenance (`asset_path`); this module knows no asset by name.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import dagster as dg

from scalselect_assets.asset_path import OutputHeader, PathAsset, PoolAsset, ShardAsset, StoreState, path_of
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.pool.discovery import Discovery
from scalselect_assets.recording import checks
from scalselect_assets.recording.data_versions import recorded
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.verified_files import VerifiedFiles
from scalselect_assets.resources.vlm import VlmResource


class Staleness:
    """Compares the provenances in a store and in Dagster's records with the present ones; changes nothing.

    Attributes:
        path: The assets of the selection, in order.
        first: The assets by shard that come before the first asset over the pool.
        rest: All further assets.
        verified: The store's files that are known to be unchanged since they were written.
    """

    def __init__(
        self, selection: Selection, storage: StorageResource, vlm: VlmResource, instance: dg.DagsterInstance
    ) -> None:
        self._selection, self._storage, self._vlm = selection, storage, vlm
        self._records = Records(instance)
        self.path = path_of(selection)
        self.verified = VerifiedFiles(storage.artifacts(selection.store))
        n_first = next(i for i, asset in enumerate(self.path) if isinstance(asset, PoolAsset))
        self.first = [asset for asset in self.path[:n_first] if isinstance(asset, ShardAsset)]
        self.rest: list[PathAsset] = self.path[n_first:]

    @cached_property
    def model_fingerprint(self) -> str:
        """The target model's fingerprint, as it was at the first use of this attribute."""
        return self.model_fingerprint_now()

    def model_fingerprint_now(self) -> str:
        """The target model's fingerprint, computed from its files as they are now."""
        artifacts = self._storage.artifacts(self._selection.store)
        return str(self._vlm.card(artifacts, **self._selection.target)["fingerprint"])

    def state(self, shard_versions: Mapping[str, str] | None = None) -> StoreState:
        """The store as it is now."""
        return StoreState(
            self._selection,
            self._storage,
            self._vlm,
            lambda: self.model_fingerprint,
            self._records.known_shards(self._selection.name),
            shard_versions or {},
            self.verified,
        )

    def stale_shards(self, shard_versions: Mapping[str, str]) -> dict[str, list[str]]:
        """The assets that must run for each stale shard: the first stale one and all after it.

        Assets over the pool and the assets after them are not included.

        Args:
            shard_versions: The fingerprint of each shard file to look at.
        """
        state = self.state(shard_versions)
        failed = {asset.name: self._failed_by_shard(asset) for asset in self.first}
        found = {asset.name: self._recorded_by_shard(asset, set(shard_versions)) for asset in self.first}
        stale = {}
        for shard in shard_versions:
            for position, asset in enumerate(self.first):
                if shard in failed[asset.name] or not _is_current(
                    state.header(asset, shard),
                    found[asset.name].get(shard, {}),
                    asset.expected(state, shard),
                ):
                    stale[shard] = [later.name for later in self.first[position:]]
                    break
        return stale

    def stale_shards_of(self, asset: ShardAsset, state: StoreState) -> set[str]:
        """The shards for which an asset that comes after one over the pool must be computed."""
        expected = {shard: asset.expected(state, shard) for shard in state.shards}
        wanted = {shard: provenance for shard, provenance in expected.items() if provenance is not None}
        found = self._recorded_by_shard(asset, set(wanted))
        return {
            shard
            for shard, provenance in wanted.items()
            if not _is_current(state.header(asset, shard), found.get(shard, {}), provenance)
        }

    def is_stale(self, asset: PathAsset, state: StoreState) -> bool:
        """Whether an asset, or any shard of it, must be computed, if everything before it is up to date."""
        if isinstance(asset, ShardAsset):
            return bool(self.stale_shards_of(asset, state))
        found = recorded(self._records.latest_materialization(self._selection.key(asset.name)))
        is_current = _is_current(state.header(asset), found, asset.expected(state))
        return not is_current or bool(self._failed_checks(asset))

    def problems(self) -> list[str]:
        """A sentence for each check of severity ERROR that failed when it was last evaluated."""
        return [
            f"check failed: {place}: {seen}"
            for asset in self.path
            for place, seen in (
                {f"{asset.name}[{shard}]": seen for shard, seen in self._failed_by_shard(asset).items()}
                if isinstance(asset, ShardAsset)
                else {f"{asset.name}: {name}": seen for name, seen in self._failed_checks(asset).items()}
            ).items()
        ]

    def pending(self, discovery: Discovery) -> list[str]:
        """The names of the shards, or else of the assets over the pool, that a refresh would compute now.

        If shards are pending, the assets after them are not listed, since it is unknown whether they change.
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

    def _failed_checks(self, asset: PoolAsset) -> Mapping[str, str]:
        key = self._selection.key(asset.name)
        return checks.failed_checks(self._records, key, asset.error_checks)

    def _failed_by_shard(self, asset: ShardAsset) -> Mapping[str, str]:
        """The findings of failed checks, by shard, for shards that are still in the pool."""
        key = self._selection.key(asset.name)
        failed = checks.shards_with_failed_checks(self._records, key, asset.error_checks)
        known = set(self._records.known_shards(self._selection.name)) if failed else set()
        return {shard: seen for shard, seen in failed.items() if shard in known}

    def _recorded_by_shard(self, asset: ShardAsset, shards: set[str]) -> Mapping[str, Mapping[str, str]]:
        """The versions that the latest materialization of each shard recorded."""
        return self._records.latest_versions(self._selection.key(asset.name), shards)


def _is_current(header: OutputHeader, found: Mapping[str, str], expected: str | None) -> bool:
    """Whether the stored output and Dagster's record of it both have the expected provenance.

    Neither is enough alone, since several Dagster instances may work on one store, and a process may be
    killed between writing a file and recording it.
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
