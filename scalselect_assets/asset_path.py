"""The protocol of the path's assets, and the state of a store that they are compared with.

An asset module ends with one `ShardAsset` or `PoolAsset` named ``ASSET``, and `ASSET_MODULES` lists the
module. Refresh, automation, cleaning, manifest and lineage know the assets of the path from here alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

import dagster as dg

from scalselect_assets import ASSET_MODULES
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.resources.artifacts import (
    ARRAYS,
    FRAME,
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStore,
)
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.verified_files import VerifiedFiles
from scalselect_assets.resources.vlm import VlmResource

OutputHeader: TypeAlias = Mapping[str, Any]
"""The header of an output: data version, provenance and more; empty where the output is not whole."""

_T = TypeVar("_T")


def _always(selection: Selection) -> bool:  # noqa: ARG001
    return True


@dataclass(frozen=True, kw_only=True)
class _PathAsset:
    """One step of the path.

    Attributes:
        name: The last part of the asset key, and the name of the asset's folder in a store.
        code_version: The version of the code that computes it; a new one makes every output stale.
        build: Builds Dagster's asset for one selection.
        is_declared: Whether a selection has the asset.
        shard_files: Folder and suffix of the files that a store keeps of each shard, a receipt before the
            files that it refers to. Cleaning removes them in this order when the shard has left the pool.
        error_checks: Names of its checks of severity ERROR: an output is out of date while one has failed.
    """

    name: str
    code_version: str
    build: Callable[[Selection], dg.AssetsDefinition]
    is_declared: Callable[[Selection], bool] = _always
    shard_files: tuple[tuple[str, str], ...] = ()
    error_checks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardAsset(_PathAsset):
    """A step with one output for each shard.

    Attributes:
        expected: The provenance that a shard's output would have now, given that all before it is up to
            date; none where there is nothing to make it from.
        header: The header of a shard's output.
    """

    expected: "Callable[[StoreState, str], str | None]"
    header: "Callable[[StoreState, str], OutputHeader]"


@dataclass(frozen=True, kw_only=True)
class PoolAsset(_PathAsset):
    """A step with one output for all shards.

    Attributes:
        expected: The provenance that the output would have now, given that all before it is up to date.
        header: The header of the output.
    """

    expected: "Callable[[StoreState], str]"
    header: "Callable[[StoreState], OutputHeader]"


PathAsset: TypeAlias = ShardAsset | PoolAsset


def all_assets() -> list[PathAsset]:
    """Every asset that a path may have, in order."""
    return [import_module(module).ASSET for module in ASSET_MODULES.values()]


def path_of(selection: Selection) -> list[PathAsset]:
    """The assets of one selection's path, in order."""
    return [asset for asset in all_assets() if asset.is_declared(selection)]


@dataclass(frozen=True)
class StoreState:
    """A store at one moment, as assets compare it with what they would be made from.

    Every header is read once; `forget` an asset whose output was written.

    Attributes:
        selection: The selection that the store belongs to.
        storage: Opens pool and store.
        vlm: Loads the target model.
        model_fingerprint: Gives the target model's fingerprint; called where an asset needs it.
        shards: The shards that Dagster knows, in its order.
        shard_versions: The fingerprint of each shard file that discovery read.
        verified_files: The known state of the store's files; read anew where it is not given.
    """

    selection: Selection
    storage: StorageResource
    vlm: VlmResource
    model_fingerprint: Callable[[], str]
    shards: Sequence[str] = ()
    shard_versions: Mapping[str, str] = field(default_factory=dict)
    verified_files: VerifiedFiles | None = None
    _headers: dict[tuple[str, str | None], OutputHeader] = field(default_factory=dict)
    _results: dict[Callable[["StoreState"], Any], Any] = field(default_factory=dict)

    @cached_property
    def artifacts(self) -> ArtifactStore:
        """The store's files."""
        return self.storage.artifacts(self.selection.store)

    @cached_property
    def verified(self) -> VerifiedFiles:
        """Which of its files hold what was written to them."""
        return self.verified_files or VerifiedFiles(self.artifacts)

    @cached_property
    def table_names(self) -> set[str]:
        """The names of the store's LanceDB tables."""
        return self.storage.embeddings(self.selection.store).table_names()

    def header(self, asset: PathAsset, shard: str | None = None) -> OutputHeader:
        """The header of an asset's output; ``shard`` names the shard of a `ShardAsset`."""
        place = (asset.name, shard)
        if place not in self._headers:
            if isinstance(asset, ShardAsset):
                self._headers[place] = asset.header(self, shard or "")
            else:
                self._headers[place] = asset.header(self)
        return self._headers[place]

    def forget(self, asset: PathAsset) -> None:
        """Read the headers of an asset anew the next time, since its output was written."""
        for place in [place for place in self._headers if place[0] == asset.name]:
            del self._headers[place]

    def version(self, asset: PathAsset, shard: str | None = None) -> str:
        """The data version that an asset's output states; empty where the output is not whole."""
        return str(self.header(asset, shard).get("data_version", ""))

    def once(self, compute: "Callable[[StoreState], _T]") -> _T:
        """The result of a function of this state, which is called once."""
        if compute not in self._results:
            self._results[compute] = compute(self)
        result: _T = self._results[compute]
        return result

    def frame_header(self, name: str, shard: str | None = None) -> OutputHeader:
        """The header of a Parquet file; empty where it is missing or damaged."""
        return self._file_header(name, shard, FRAME)

    def arrays_header(self, name: str, shard: str | None = None) -> OutputHeader:
        """The header of a safetensors file; empty where it is missing or damaged."""
        return self._file_header(name, shard, ARRAYS)

    def _file_header(self, name: str, shard: str | None, suffix: str) -> OutputHeader:
        try:
            if not self.verified.is_whole(self.artifacts.path(name, shard, suffix=suffix)):
                return {}
            return self.artifacts.read_header(name, shard, suffix=suffix)
        except (ArtifactMissingError, ArtifactCorruptError):
            return {}
