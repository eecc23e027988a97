"""Storage locations: every location is a URI, resolved here and nowhere else.

Pools and stores on the local disk and on object stores differ in configuration only: files go through
fsspec (``UPath``), tables through LanceDB's own URIs.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from pydantic import Field
from upath import UPath

from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingStore
from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.locks import StoreLocks
from scalselect_assets.resources.pool_listing import ignore_patterns
from scalselect_assets.resources.sample_source import SampleSource


class StorageResource(dg.ConfigurableResource):
    """Opens the pools and stores that selections name."""

    fsspec_options: dict[str, str] = Field(
        default={}, description="Storage options of fsspec for pools and stores that are not local."
    )
    lance_options: dict[str, str] = Field(
        default={}, description="Storage options of LanceDB for stores that are not local."
    )

    def path(self, uri: str) -> UPath:
        """The location that ``uri`` names; local paths are made absolute."""
        path = UPath(uri)
        if is_local(path):
            return UPath(path.path).expanduser().absolute()
        return UPath(uri, **self.fsspec_options)

    def artifacts(self, store: str) -> ArtifactStore:
        """The files of the store at ``store``."""
        return ArtifactStore(self.path(store))

    def embeddings(self, store: str) -> EmbeddingStore:
        """The LanceDB tables of the store at ``store``."""
        folder = self.path(store) / "lance"
        return EmbeddingStore(folder, {} if is_local(folder) else self.lance_options)

    def locks(self, store: str) -> StoreLocks:
        """The locks of the store at ``store``; a remote store is locked for this user on this machine."""
        root = self.path(store)
        if is_local(root):
            return StoreLocks(Path(root.path) / ".locks")
        private = Path(tempfile.gettempdir()) / f"scalselect-{os.geteuid()}-{digest(str(root))}"
        return StoreLocks(private, private=True)

    def samples(
        self, source: str, image_root: str | None, store: str, ignore: Sequence[str] = ()
    ) -> SampleSource:
        """The pool at ``source``; a store that lies inside it is not part of it.

        Args:
            source: Folder or file of the shards.
            image_root: Folder that image paths are relative to; None for the folder of each shard.
            store: The selection's store.
            ignore: Patterns of files that are no shards, as a declaration has them; for listing the pool.
        """
        return SampleSource(
            source=self.path(source),
            image_root=None if image_root is None else self.path(image_root),
            exclude=(self.path(store),),
            ignore=ignore_patterns(ignore),
        )
