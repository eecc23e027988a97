"""A pool, a store and a refresh in one hand, for tests of the whole path."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np

from scalselect_assets import ASSET_MODULES
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.deployment import build_defs, open_instance, opened_instance
from scalselect_assets.embedding import receipts
from scalselect_assets.operations.refresh import Refresh, RefreshReport
from scalselect_assets.resources import verified_files
from scalselect_assets.resources.progress import LogProgress
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource

_JOBS: dict[str, dg.JobDefinition] = {}
_N_JOBS = 16


class Bench:
    """A pool, its store, and a refresh at hand."""

    def __init__(self, pool: Path, store: Path, model: Path) -> None:
        self.pool, self.store = pool, store
        self.options: dict[str, Any] = {
            "name": "bench",
            "source": str(pool),
            "store": str(store),
            "target_model": str(model),
            "budget": 0.5,
            "settle_seconds": 0,
            # What tests of them turn on.
            "compare": None,
            "report": False,
        }
        self.storage = StorageResource()
        self.vlm = VlmResource(device="cpu", batch_tokens=512)
        self.artifacts = self.storage.artifacts(str(store))

    @property
    def selection(self) -> Selection:
        return Selection(**self.options)

    def refresh(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        rebuild_basis: bool = False,
        accept_missing_images: bool = False,
    ) -> RefreshReport:
        selection = self.selection
        with opened_instance(selection) as instance:
            return Refresh(
                selection,
                job=self._job(),
                instance=instance,
                storage=self.storage,
                vlm=self.vlm,
                progress=LogProgress(),
                log=logging.getLogger("scalselect.test"),
                log_level="CRITICAL",
                rebuild_basis=rebuild_basis,
                accept_missing_images=accept_missing_images,
                should_stop=should_stop,
            ).run()

    def _job(self) -> dg.JobDefinition:
        """The job of all assets, made once for all benches of the same declaration and resources."""
        declared = repr((self.selection, self.storage, self.vlm, list(ASSET_MODULES)))
        if declared not in _JOBS:
            defs = build_defs([self.selection], {"storage": self.storage, "vlm": self.vlm})
            _JOBS[declared] = defs.resolve_job_def(self.selection.job_name("assets"))
            if len(_JOBS) > _N_JOBS:
                _JOBS.pop(next(iter(_JOBS)))
        return _JOBS[declared]

    def first_refresh(self) -> None:
        """``refresh`` of a pool that stands as it was made; what it leaves is made once, and copied.

        Places are part of what a dataset is made from, and times of what a shard is known by, so a store is
        copied to where it was only, and for a pool of the same files only.
        """
        assert not self.store.exists()
        files = sorted((str(path), path.stat().st_mtime_ns) for path in self.pool.rglob("*"))
        state = hashlib.sha256(repr((files, self.options, self.vlm)).encode()).hexdigest()
        kept = self.store.parent.with_name(state)
        if kept.exists():
            shutil.copytree(kept, self.store)
        else:
            self.refresh()
            shutil.copytree(self.store, kept)

    def vectors(self) -> dict[str, np.ndarray]:
        """Every embedded vector by shard and row."""
        store, found = self.storage.embeddings(str(self.store)), {}
        for shard in json.loads(self.artifacts.read_arrays("subspace_basis")[1]["shards"]):
            table, _ = receipts.recorded_table(self.artifacts, shard)
            for batch in store.read(table):
                for row, vector in zip(batch.row, batch.vector, strict=True):
                    found[f"{shard}#{row}"] = vector
        return found

    def scores(self) -> dict[str, float]:
        """Every leverage score by shard and row."""
        return {
            f"{shard}#{row}": leverage
            for shard in json.loads(self.artifacts.read_arrays("subspace_basis")[1]["shards"])
            for row, leverage in self.artifacts.read_frame("importance_scores", shard)[0]
            .select("row", "leverage")
            .iter_rows()
        }

    def files(self) -> dict[str, str]:
        """Content of every result file."""
        return {
            str(path.relative_to(self.store)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.store.rglob("*")
            if path.is_file()
            and not {"dagster", verified_files.NAME} & set(path.parts)
            and path.suffix != ".lock"
        }

    def metadata(self, asset: str) -> dict[str, Any]:
        """Of the last materialization."""
        with open_instance(self.selection) as instance:
            event = instance.get_latest_materialization_event(self.selection.key(asset))
            assert event is not None
            assert event.asset_materialization is not None
            return {name: value.value for name, value in event.asset_materialization.metadata.items()}

    def events(self, asset: str) -> int:
        """How often an asset was materialized, over all partitions."""
        with open_instance(self.selection) as instance:
            return len(instance.fetch_materializations(self.selection.key(asset), limit=1000).records)


SHARD = "raw_samples+attention_embeddings+embedding_moments"
WHOLE = ["subspace_basis", "importance_scores", "selected_subset", "training_dataset"]


def ran(report: RefreshReport) -> list[str]:
    return [run.split("[")[0] if run.startswith("importance") else run for run in report.runs]
