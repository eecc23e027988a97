"""Discovery, and materializing exactly what is stale: one process, the model loaded once.

`Refresh.run` is what `scalselect run` calls and what the ``<selection>_refresh`` job wraps. It finds the
shards, reports their versions to Dagster, compares the provenance that each asset would have now with the
recorded one, and runs what differs, as ordinary Dagster runs. Nothing stale means no run. It can be killed at
any point: the next call continues from what was committed. One refresh at a time per store, by a file lock.

Costs without work: one stat per shard file and per image, a few file headers per shard, and one event-log
query per asset.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import dagster as dg

from scalselect_assets.choice import lists, removed_samples, selected_subset
from scalselect_assets.dataset import training_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts, reuse
from scalselect_assets.operations.faults import RefreshError, error_cause, error_message
from scalselect_assets.operations.staleness import SHARD_ASSETS, Headers, is_current
from scalselect_assets.pool import raw_samples
from scalselect_assets.pool.discovery import Discovery, report_discovery, settled_discovery
from scalselect_assets.recording.data_versions import recorded
from scalselect_assets.recording.records import Records
from scalselect_assets.report import page_receipt
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError
from scalselect_assets.resources.embedding_store import EmbeddingTableError
from scalselect_assets.resources.progress import Log, Progress
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import embedding_moments, importance_scores, subspace_basis

REFRESH_TAG = "scalselect/refresh"


@dataclass(slots=True)
class RefreshReport:
    """What one refresh did.

    Attributes:
        added: Shards new to Dagster.
        removed: Shards that are gone from the pool.
        embedded: Shards whose vectors were materialized.
        computed_rows: Vectors among them that the model computed.
        reused_rows: Vectors among them that were there before.
        unsettled: Shards that are still being written, and were left as they are in the store.
        failed: Message by shard for those that could not be materialized.
        failed_checks: Asset checks of severity ERROR that failed, with what they saw.
        runs: Dagster runs that were made, in order: assets and shards.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    embedded: list[str] = field(default_factory=list)
    computed_rows: int = 0
    reused_rows: int = 0
    unsettled: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    failed_checks: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """One line for each shard and each check that failed; empty if all is well."""
        return [
            *(f"shard {shard} failed: {message}" for shard, message in self.failed.items()),
            *(f"check failed: {check} {seen}" for check, seen in self.failed_checks.items()),
        ]


class Refresh:
    """One refresh of one selection."""

    def __init__(
        self,
        selection: Selection,
        *,
        job: dg.JobDefinition,
        instance: dg.DagsterInstance,
        storage: StorageResource,
        vlm: VlmResource,
        progress: Progress,
        log: Log,
        log_level: str = "INFO",
        rebuild_basis: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare a refresh.

        Args:
            selection: What to refresh.
            job: The selection's asset job, with its resources.
            instance: Where runs and versions are recorded.
            storage: Opens pool and store.
            vlm: Loads the target model.
            progress: Told of the embedding work.
            log: For what the refresh itself has to say.
            log_level: Of the runs' console output.
            rebuild_basis: Add up the moments of all shards anew, even if nothing is stale.
            should_stop: Asked before every run.
        """
        self._selection, self._job, self._instance = selection, job, instance
        self._records = Records(instance)
        self._storage, self._vlm, self._progress, self._log = storage, vlm, progress, log
        self._run_config = {"loggers": {"console": {"config": {"log_level": log_level}}}}
        self._rebuild_basis = rebuild_basis
        self._should_stop = should_stop
        self._artifacts = storage.artifacts(selection.store)
        self._source = storage.samples(selection.source, selection.image_root, selection.store)
        self._report = RefreshReport()

    def run(self) -> RefreshReport:
        """Bring every asset of the selection up to date.

        Raises:
            StoreBusyError: Another refresh works on the store.
            RefreshError: The selection is driven otherwise, the pool has no shards, an asset over all shards
                failed, or the model changed meanwhile.
            FileNotFoundError: The pool does not exist.
        """
        if self._selection.is_declarative:
            name = self._selection.name
            raise RefreshError(
                f"the selection {name!r} declares `automation: {self._selection.automation}`: Dagster's own "
                f"automation brings it up to date, and a refresh beside it would do work twice; turn on the "
                f"sensors {name}_discovery and {name}_automation in the UI, or declare `automation: refresh`"
            )
        with self._storage.locks(self._selection.store).refreshing(), self._interrupted_runs_closed():
            discovery = settled_discovery(self._source, self._artifacts, self._selection.settle_seconds)
            self._report.unsettled = list(discovery.unsettled)
            if not discovery.versions:
                if discovery.unsettled:
                    raise RefreshError(
                        f"all shard files in {self._selection.source} are still being written; run again "
                        "when that has ended"
                    )
                raise RefreshError(
                    f"no shard files (*.json, *.jsonl, *.ndjson) in {self._selection.source}; a shard is a "
                    "JSON array or JSON Lines file of samples"
                )
            self._report.added, self._report.removed = report_discovery(
                self._selection, self._instance, discovery
            )
            for shard in self._report.removed:
                reuse.forget(self._artifacts, shard)
            self._refresh_shards(discovery)
            if self._model_fingerprint() != self._fingerprint:
                raise RefreshError("the target model's files changed during the refresh; run it again")
            self._refresh_whole()
            return self._report

    def pending(self, discovery: Discovery) -> list[str]:
        """What a run would compute now: shards, else assets over all shards; changes nothing.

        Where shards are pending, what follows from them cannot be known and is not listed.
        """
        if shards := list(self._stale_shards(discovery)):
            return shards
        pool = self._pool()
        if set(pool) - set(discovery.unsettled) != set(discovery.versions):
            return self._whole_assets
        inputs = self._basis_inputs(pool)
        for position, asset in enumerate(self._whole_assets):
            if self._is_stale(asset, pool, inputs):
                return self._whole_assets[position:]
        return []

    @property
    def _whole_assets(self) -> list[str]:
        """The assets after those by shard."""
        return [asset for asset in self._selection.assets if asset not in SHARD_ASSETS]

    def _pool(self) -> Sequence[str]:
        """The shards that Dagster knows, in its order."""
        return self._records.known_shards(self._selection.name)

    def _model_fingerprint(self) -> str:
        return str(self._vlm.card(self._artifacts, **self._selection.target)["fingerprint"])

    @cached_property
    def _fingerprint(self) -> str:
        return self._model_fingerprint()

    # Shards

    def _refresh_shards(self, discovery: Discovery) -> None:
        stale = self._stale_shards(discovery)
        embedding = [shard for shard, assets in stale.items() if receipts.NAME in assets]
        self._progress.planned(len(embedding), sum(discovery.n_rows[shard] or 0 for shard in embedding))
        if embedding:
            # A model that cannot be loaded is said once, before anything is touched.
            self._vlm.encoder(self._artifacts, **self._selection.target)
        for shard, assets in stale.items():
            if assets[0] == raw_samples.NAME and self._artifacts.exists(receipts.NAME, shard, suffix=".json"):
                # Where the rows turn out as they were, after a change of code say, their vectors stand.
                if not self._materialize_shard([raw_samples.NAME], shard):
                    continue
                alone = Discovery({shard: discovery.versions[shard]}, discovery.n_rows)
                assets = self._stale_shards(alone).get(shard, [])  # noqa: PLW2901
            if not assets or not self._materialize_shard(assets, shard):
                continue
            if receipts.NAME in assets:
                self._report.embedded.append(shard)

    def _stale_shards(self, discovery: Discovery) -> dict[str, list[str]]:
        """By shard, the assets that must run, in order: the first stale one and all after it."""
        versions = {asset: self.latest_versions(asset, set(discovery.versions)) for asset in SHARD_ASSETS}
        tables = self._storage.embeddings(self._selection.store).table_names()
        stale = {}
        for shard, shard_version in discovery.versions.items():
            expected = raw_samples.provenance(self._selection, shard_version)
            for position, asset in enumerate(SHARD_ASSETS):
                header = self._shard_header(asset, shard, tables)
                if not is_current(header, versions[asset].get(shard, {}), expected):
                    stale[shard] = list(SHARD_ASSETS[position:])
                    break
                expected = self._next_provenance(asset, header["data_version"])
        return stale

    def _shard_header(self, asset: str, shard: str, tables: set[str]) -> Mapping[str, str]:
        """What the shard's output says of itself; empty where any part of it is missing or damaged."""
        try:
            if asset != receipts.NAME:
                suffix = ".parquet" if asset == raw_samples.NAME else ".safetensors"
                return self._artifacts.read_header(asset, shard, suffix=suffix)
            table, header = receipts.recorded_table(self._artifacts, shard)
            rejected = self._artifacts.read_header(receipts.REJECTED, shard)
        except (ArtifactMissingError, ArtifactCorruptError):
            return {}
        whole = table.table in tables and rejected.get("provenance") == header["provenance"]
        return header if whole else {}

    def _next_provenance(self, asset: str, version: str) -> str:
        """What the asset after `asset` would be computed from."""
        if asset == raw_samples.NAME:
            return receipts.provenance(self._fingerprint, self._vlm.max_image_pixels, version)
        return embedding_moments.provenance(self._selection, version)

    def _materialize_shard(self, assets: Sequence[str], shard: str) -> bool:
        """Whether it succeeded; a shard that cannot be computed does not stop the others."""
        try:
            self._materialize(assets, partition_key=shard)
        except dg.Failure as failure:
            self._report.failed[shard] = failure.description or "failed"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this shard's, and it is reported
            self._report.failed[shard] = error_message(error)
            self._forget_unreadable(error)
        else:
            return True
        self._log.error(f"shard {shard}: {self._report.failed[shard]}")
        return False

    # All shards

    def _refresh_whole(self) -> None:
        pool = self._pool()
        inputs = self._basis_inputs(pool)
        if not inputs:
            raise RefreshError(f"no shard could be embedded: {'; '.join(self._report.problems())}")
        for asset in self._whole_assets:
            if asset == importance_scores.NAME:
                for shard_range in contiguous_ranges(pool, self._unscored_shards(inputs)):
                    self._materialize_or_raise([asset], shard_range)
            elif self._is_stale(asset, pool, inputs) or (
                self._rebuild_basis and asset == subspace_basis.NAME
            ):
                self._materialize_or_raise([asset])

    def _is_stale(self, asset: str, pool: Sequence[str], inputs: Headers) -> bool:
        """Whether an asset over all shards has to be computed, given those before it."""
        if asset == importance_scores.NAME:
            return bool(self._unscored_shards(inputs))
        basis = self._whole_header(subspace_basis.NAME)
        basis_version = basis.get("data_version", "")
        if asset == subspace_basis.NAME:
            expected = subspace_basis.provenance(
                self._selection, {shard: moments["data_version"] for shard, moments in inputs.items()}
            )
        elif asset == removed_samples.NAME:
            expected = removed_samples.provenance(self._selection, self._storage, basis_version)
        elif asset == selected_subset.NAME:
            expected = selected_subset.provenance(
                self._selection,
                basis_version,
                lists.Lists.read(self._selection, self._storage).version,
                self._whole_header(removed_samples.NAME).get("data_version", ""),
            )
        elif asset == page_receipt.NAME:
            expected = page_receipt.provenance(self._selection, self._whole_header(training_manifest.NAME))
        else:
            subset = self._whole_header(selected_subset.NAME)
            expected = training_manifest.provenance(
                self._selection,
                subset.get("provenance", ""),
                subset.get("data_version", ""),
                basis_version,
                sorted(set(pool) - set(json.loads(basis.get("shards", "{}")))),
            )
        found = recorded(self._records.latest_materialization(self._selection.key(asset)))
        return not is_current(self._whole_header(asset), found, expected)

    def _whole_header(self, asset: str) -> Mapping[str, str]:
        """What the output of an asset over all shards says of itself; empty where it is not whole."""
        try:
            if asset == training_manifest.NAME:
                manifest = training_manifest.read_manifest(self._artifacts)
                return manifest if training_manifest.is_complete(self._artifacts) else {}
            if asset == page_receipt.NAME:
                receipt = page_receipt.read_receipt(self._artifacts)
                return receipt if page_receipt.is_complete(self._artifacts) else {}
            suffix = ".safetensors" if asset == subspace_basis.NAME else ".parquet"
            return self._artifacts.read_header(asset, suffix=suffix)
        except (ArtifactMissingError, ArtifactCorruptError):
            return {}

    def _basis_inputs(self, pool: Sequence[str]) -> Headers:
        return subspace_basis.moments_headers(self._selection, self._artifacts, pool, self._fingerprint)

    def _unscored_shards(self, inputs: Headers) -> set[str]:
        """The shards of the basis without scores of the present basis."""
        basis_version = self._whole_header(subspace_basis.NAME).get("data_version", "")
        expected = importance_scores.provenance(basis_version)
        recorded_of = self.latest_versions(importance_scores.NAME, set(inputs))
        unscored = set()
        for shard in inputs:
            try:
                header = self._artifacts.read_header(importance_scores.NAME, shard)
            except (ArtifactMissingError, ArtifactCorruptError):
                header = {}
            if not is_current(header, recorded_of.get(shard, {}), expected):
                unscored.add(shard)
        return unscored

    def latest_versions(self, asset: str, shards: set[str]) -> dict[str, Mapping[str, str]]:
        """The versions that the latest materialization of each shard recorded."""
        return self._records.latest_versions(self._selection.key(asset), shards)

    def _materialize_or_raise(
        self, assets: Sequence[str], shard_range: tuple[str, str] | None = None
    ) -> None:
        tags = {}
        if shard_range:
            tags = {
                "dagster/asset_partition_range_start": shard_range[0],
                "dagster/asset_partition_range_end": shard_range[1],
            }
        try:
            self._materialize(assets, tags=tags)
        except dg.Failure as failure:
            told = [failure.description or f"{assets[0]} failed", *self._report.problems()]
            raise RefreshError("; ".join(told)) from failure
        except Exception as error:
            if remedy := self._forget_unreadable(error):
                raise RefreshError(f"{error_cause(error)}: {remedy}") from error
            raise RefreshError(f"{', '.join(assets)}: {error_message(error)}") from error

    def _forget_unreadable(self, error: Exception) -> str | None:
        """Remove what could not be read, so that the next run makes it again; returns how that is told."""
        cause = error_cause(error)
        if isinstance(cause, EmbeddingTableError):
            receipt = self._artifacts.path(receipts.NAME, cause.shard, suffix=".json")
            receipt.unlink(missing_ok=True)
            return "run again, which embeds the shard anew"
        if isinstance(cause, ArtifactCorruptError):
            cause.path.unlink(missing_ok=True)
            return "it is removed; run again, which makes it anew"
        return None

    # Runs

    def _materialize(
        self,
        assets: Sequence[str],
        *,
        partition_key: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """One Dagster run in this process; raises what the asset raises."""
        if self._should_stop():
            raise dg.DagsterExecutionInterruptedError
        result = self._records.execute(
            self._job,
            [self._selection.key(asset) for asset in assets],
            partition_key=partition_key,
            tags={REFRESH_TAG: self._selection.name, **(tags or {})},
            run_config=self._configuration(assets),
        )
        self._note_failed_checks(result, partition_key)
        self._note_embedded_rows(result)
        shards = partition_key or "..".join(
            (tags or {}).get(f"dagster/asset_partition_range_{end}", "") for end in ("start", "end")
        )
        self._report.runs.append(f"{'+'.join(assets)}[{shards}]" if shards != ".." else "+".join(assets))

    def _configuration(self, assets: Sequence[str]) -> dict[str, Any]:
        if not (self._rebuild_basis and subspace_basis.NAME in assets):
            return self._run_config
        op = self._selection.key(subspace_basis.NAME).to_python_identifier()
        return {**self._run_config, "ops": {op: {"config": {"rebuild": True}}}}

    def _note_embedded_rows(self, result: dg.ExecuteInProcessResult) -> None:
        for event in result.get_asset_materialization_events():
            if event.asset_key == self._selection.key(receipts.NAME):
                rows = event.step_materialization_data.materialization.metadata
                self._report.computed_rows += int(str(rows["computed_rows"].value))
                self._report.reused_rows += int(str(rows["reused_rows"].value))

    def _note_failed_checks(self, result: dg.ExecuteInProcessResult, shard: str | None) -> None:
        for check in result.get_asset_check_evaluations():
            if not check.passed and check.severity is dg.AssetCheckSeverity.ERROR:
                place = f"{check.asset_key.path[-1]}[{shard}]" if shard else check.asset_key.path[-1]
                seen = {name: value.value for name, value in check.metadata.items()}
                self._report.failed_checks[f"{place}: {check.check_name}"] = str(seen)

    @contextlib.contextmanager
    def _interrupted_runs_closed(self) -> Iterator[None]:
        """Close the runs that a killed refresh has left behind, and those of this one if it is stopped."""
        self._close_interrupted_runs()
        try:
            yield
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            self._close_interrupted_runs()
            raise

    def _close_interrupted_runs(self) -> None:
        """Close the runs of a stopped refresh, which would else stay unfinished for ever.

        The lock of this refresh shows that nobody works on them.
        """
        interrupted = dg.RunsFilter(
            job_name=self._job.name,
            tags={REFRESH_TAG: self._selection.name},
            statuses=[
                dg.DagsterRunStatus.NOT_STARTED,
                dg.DagsterRunStatus.STARTED,
                dg.DagsterRunStatus.STARTING,
                dg.DagsterRunStatus.CANCELING,
            ],
        )
        self._records.close_runs(interrupted, "The refresh that made this run was stopped.")


def contiguous_ranges(order: Sequence[str], wanted: set[str]) -> list[tuple[str, str]]:
    """The first and last key of each unbroken run of `wanted` keys in Dagster's partition `order`."""
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
