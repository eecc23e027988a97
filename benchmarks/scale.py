"""A pool of the size of LLaVA-665K through the real assets: seconds, bytes, flops, memory, and is it right?

``python -m benchmarks.scale --folder DIR`` writes synthetic vectors as `attention_embeddings` would (tables,
receipts, the model's card, Dagster's partitions and events), which is the only asset that it stands in for.
Then the selection's own job materializes the rest through Dagster as the refresh does: `embedding_moments`
shard by shard, `subspace_basis`, `importance_scores` as one range, `selected_subset`. With ``--changed`` some
shards are then replaced and the path runs again, as a nightly refresh would. `training_dataset` is left out:
its time goes into the rows' text, which is synthetic here.

The vectors are generated in one process and the assets run in another, whose peak resident memory is the
memory figure. Libraries are imported before the clock starts. Bytes are those that the process asked the
system for (``/proc/self/io``), Dagster's own included; what the page cache served is shown apart. A third
process takes the loops apart on one shard; `benchmarks.simulate` extrapolates from its rates.

At the default size the store takes some 20 GB below ``--folder``, deleted at the end unless ``--keep`` says
otherwise.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.machine import MIB
from scalselect_assets.choice import selected_subset
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.embedding import receipts
from scalselect_assets.method.choice.budget import budget_size
from scalselect_assets.method.subspace.basis import Subspace, principal_axes
from scalselect_assets.method.subspace.leverage import LeverageScorer
from scalselect_assets.method.subspace.moments import Moments, accumulate
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.columns import IMPORTANCE_SCORES, polars_schema
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingTable
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import CARDS, VlmResource, model_signature
from scalselect_assets.subspace import embedding_moments, importance_scores, pool_moments, subspace_basis

FINGERPRINT = digest("synthetic")
MEASURED = (embedding_moments.NAME, subspace_basis.NAME, importance_scores.NAME, selected_subset.NAME)

_SPECTRUM = 1.4  # exponent of the decay; 90 % of the energy is then some hundred directions
_LEADING = 256  # directions that every row has coordinates of its own in
_TAIL_ROWS = 4096  # rows of the weak directions, which all others take theirs from
_SVD_ROWS = 20_000  # up to which all scores are compared with a float64 SVD
_SPOT_ROWS = 2000
_SPOT_SHARDS = 8
_ROUNDS = 3  # of the loops that are taken apart; the best counts


@dataclass(frozen=True, slots=True)
class ScalePool:
    """A synthetic pool and where it lies."""

    folder: Path
    rows: int
    dim: int
    shard_rows: int
    seed: int
    device: str

    @property
    def sizes(self) -> dict[str, int]:
        """Rows by shard; the last one has what is left."""
        starts = range(0, self.rows, self.shard_rows)
        return {
            f"shard-{number:06d}.jsonl": min(self.shard_rows, self.rows - start)
            for number, start in enumerate(starts)
        }

    @property
    def selection(self) -> Selection:
        """What a deployment would declare for it."""
        return Selection(
            name="scale",
            source=str(self.folder / "pool"),
            store=str(self.folder / "store"),
            target_model="synthetic",
        )

    @property
    def artifacts(self) -> ArtifactStore:
        """The store's files."""
        return StorageResource().artifacts(self.selection.store)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One asset over all shards that it ran for; bytes are the process's, memory is in bytes.

    Attributes:
        asset: Its name.
        runs: Dagster runs.
        rows: Samples that it worked on.
        seconds: From the first run's start to the last one's end.
        asset_seconds: What the assets themselves report; the rest is Dagster's and, for ranges, what is done
            once for all shards.
        read: Asked of the system.
        read_from_disk: Of ``read``, what the page cache did not have.
        written: Given to the system.
        flops: By the formula that `flops` states.
        resident_before: When the asset began.
        peak: While it ran.
        metadata: Of its last materialization, the plain numbers.
        failed_checks: Asset checks that did not pass.
    """

    asset: str
    runs: int
    rows: int
    seconds: float
    asset_seconds: float
    read: int
    read_from_disk: int
    written: int
    flops: float
    resident_before: int
    peak: int
    metadata: Mapping[str, float]
    failed_checks: tuple[str, ...]


# --- Data ---------------------------------------------------------------------------------------------------


class MadeUpVectors:
    """Rows of a power-law spectrum with outlier columns, at a few operations per value.

    The strong directions are drawn for each row, the weak ones taken from a fixed block of rows, since
    drawing those, too, would cost n·d² operations. Shards differ in their mean, as the sources of a pool do,
    and rows in their length. Four columns have means from 1e3 to 1e4, as the massive activations of language
    models.
    """

    def __init__(self, d: int, seed: int) -> None:
        """The directions; the same for all shards of a pool."""
        generator = np.random.default_rng(seed)
        strengths = np.arange(1, d + 1) ** (-_SPECTRUM / 2)
        strengths *= np.sqrt(d / np.square(strengths).sum())
        n_leading = min(_LEADING, d // 2)
        directions = generator.standard_normal((d, d), dtype=np.float32)
        directions *= (strengths / np.sqrt(d)).astype(np.float32)[:, None]
        self._leading = directions[:n_leading].copy()
        coordinates = generator.standard_normal((_TAIL_ROWS, d - n_leading), dtype=np.float32)
        self._tail = coordinates @ directions[n_leading:]
        self._mean = generator.standard_normal(d, dtype=np.float32)
        self._outliers = generator.permutation(d)[:4]
        self._mean[self._outliers] = np.geomspace(1e3, 1e4, 4)[: len(self._outliers)]
        self._seed = seed

    def rows(self, shard: str, generation: int, n: int) -> NDArray[np.float32]:
        """The vectors of one shard, (n, d); another ``generation`` gives others."""
        generator = np.random.default_rng([self._seed, generation, *shard.encode()])
        shape = (n, len(self._leading))
        coordinates = generator.standard_normal(shape, dtype=np.float32)
        coordinates += generator.normal(0, 0.3, shape[1]).astype(np.float32)
        x = coordinates @ self._leading
        x += self._tail[generator.integers(0, len(self._tail), n)]
        x *= np.exp(generator.normal(0, 0.25, (n, 1))).astype(np.float32)
        x += self._mean
        return x


def generate(pool: ScalePool, shards: Sequence[str], generation: int) -> float:
    """Write what `attention_embeddings` leaves of these shards, and tell Dagster; returns the seconds.

    One shard is in memory at a time.
    """
    os.environ.setdefault("LANCEDB_LOG", "error")  # Lance warns of each table that is new
    start = time.perf_counter()
    selection, artifacts, vectors = pool.selection, pool.artifacts, MadeUpVectors(pool.dim, pool.seed)
    store = StorageResource().embeddings(selection.store)
    # What the later assets ask of the model is its card's fingerprint, and they ask the store first.
    card = {"fingerprint": FINGERPRINT, "dimension": pool.dim}
    artifacts.write_json(CARDS, card, model_signature(**selection.target))
    with open_instance(selection) as instance:
        instance.add_dynamic_partitions(selection.partitions.name or "", list(pool.sizes))
        for shard in shards:
            n = pool.sizes[shard]
            keys = [hashlib.sha256(f"{shard} {generation} {row}".encode()).hexdigest() for row in range(n)]
            table = store.replace(
                FINGERPRINT,
                shard,
                dimension=pool.dim,
                rows=range(n),
                sample_keys=[key[:32] for key in keys],
                source_ids=[str(row) for row in range(n)],
                vectors=vectors.rows(shard, generation, n),
                attributes=_attributes(keys),
            )
            header = data_versions.header(
                digest(FINGERPRINT, table.content_sha256),
                digest("provenance", shard, generation),
                raw_samples=digest("raw", shard, generation),
                raw_rows=str(n),
                container="lines",
            )
            artifacts.write_json(receipts.NAME, {"table": table.to_json(), "header": header}, shard)
            # Dagster looks for the events of what an asset depends on; that has to cost what it does.
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    selection.key(receipts.NAME),
                    partition=shard,
                    tags={data_versions.DATA_VERSION_TAG: header["data_version"]},
                    metadata=data_versions.recorded_versions(header["data_version"], header["provenance"]),
                )
            )
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return time.perf_counter() - start


def _attributes(keys: Sequence[str]) -> dict[str, pa.Array]:
    """The columns beside the vector, with short text."""
    n = len(keys)
    counts = {"n_tokens": 640, "n_vision_tokens": 576, "n_dominant_tokens": 400, "n_instruction_tokens": 60}
    return {
        **{name: pa.array([count] * n, pa.int32()) for name, count in counts.items()},
        "vision_attention": pa.array([0.5] * n, pa.float32()),
        "image_sha256": pa.array([[key] for key in keys], pa.list_(pa.string())),
        "images": pa.array([["images/0.jpg"]] * n, pa.list_(pa.string())),
        "text": pa.array(["{}"] * n, pa.string()),
    }


# --- The assets ---------------------------------------------------------------------------------------------


def flops(asset: str, n: int, d: int, k: int) -> float:
    """Floating-point operations that an asset needs, a multiplication and an addition counted apart.

    - `embedding_moments`: n·d·(d + 1), the upper triangle of XᵀX;
    - `subspace_basis`: 4/3·d³ for the tridiagonal form and 2·d²·k for the directions; adding up moments and
      comparing ranks on a sample are not counted;
    - `importance_scores`: 2·n·d·k;
    - `selected_subset`: none.
    """
    return {
        embedding_moments.NAME: float(n) * d * (d + 1),
        subspace_basis.NAME: 4 / 3 * float(d) ** 3 + 2.0 * d**2 * k,
        importance_scores.NAME: 2.0 * n * d * k,
    }.get(asset, 0.0)


class Job:
    """The selection's asset job, run in this process as the refresh runs it."""

    def __init__(self, pool: ScalePool, instance: dg.DagsterInstance) -> None:
        """Build the graph and import what it needs."""
        import lancedb  # noqa: F401 - seconds that are not the first asset's
        import scipy.linalg  # noqa: F401

        self._pool, self._instance, self._selection = pool, instance, pool.selection
        vlm = VlmResource(device=pool.device)  # type: ignore[arg-type]
        vlm.array_device()
        self._job = build_defs([self._selection], {"vlm": vlm}).resolve_job_def(
            self._selection.job_name("assets")
        )

    def measure(self, asset: str, shards: Sequence[str] = ()) -> Measurement:
        """Materialize an asset: once, or for each of the ``shards`` in a run of its own."""
        machine.forget_peak()
        before, read, read_from_disk, written = machine.resident_bytes(), *_io_bytes()
        start = time.perf_counter()
        results = [self._run(asset, shard) for shard in shards] or [self._run(asset, None)]
        seconds = time.perf_counter() - start
        read_after, read_from_disk_after, written_after = _io_bytes()
        events = [
            event.step_materialization_data.materialization.metadata
            for result in results
            for event in result.get_asset_materialization_events()
        ]
        rows = sum(self._pool.sizes[shard] for shard in shards) or self._pool.rows
        k = 0 if shards else subspace_basis.read_basis(self._pool.artifacts)[0].k
        return Measurement(
            asset=asset,
            runs=len(results),
            rows=rows,
            seconds=seconds,
            asset_seconds=sum(float(event["seconds"].value) for event in events),  # type: ignore[arg-type, misc]
            read=read_after - read,
            read_from_disk=read_from_disk_after - read_from_disk,
            written=written_after - written,
            flops=flops(asset, rows, self._pool.dim, k),
            resident_before=before,
            peak=machine.peak_bytes(),
            metadata={
                name: value.value
                for name, value in events[-1].items()
                if isinstance(value.value, int | float)
            },
            failed_checks=tuple(
                check.check_name
                for result in results
                for check in result.get_asset_check_evaluations()
                if not check.passed
            ),
        )

    def _run(self, asset: str, shard: str | None) -> dg.ExecuteInProcessResult:
        tags = {}
        if asset == importance_scores.NAME:
            order = self._instance.get_dynamic_partitions(self._selection.partitions.name or "")
            tags = {
                "dagster/asset_partition_range_start": order[0],
                "dagster/asset_partition_range_end": order[-1],
            }
        return self._job.execute_in_process(
            instance=self._instance,
            asset_selection=[self._selection.key(asset)],
            partition_key=shard,
            tags=tags,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )


def measure_path(pool: ScalePool, changed: Sequence[str]) -> list[Measurement]:
    """The assets after `attention_embeddings`, the first of them for the changed shards only."""
    with open_instance(pool.selection) as instance:
        job = Job(pool, instance)
        return [job.measure(asset, changed if asset == MEASURED[0] else ()) for asset in MEASURED]


def measure_selection(pool: ScalePool) -> Measurement:
    """`selected_subset` alone, on made-up scores, for its memory at sizes whose vectors would not fit."""
    selection, artifacts = pool.selection, pool.artifacts
    basis_version = digest("basis", pool.seed)
    fitted = Subspace(pool.rows, np.zeros(1), np.ones(1), np.ones((1, 1)), np.ones(1), np.ones(1))
    artifacts.write_arrays(
        subspace_basis.NAME,
        fitted.to_arrays(),
        data_versions.header(
            basis_version,
            basis_version,
            shards=json.dumps({shard: {} for shard in pool.sizes}),
            drift=json.dumps({}),
        ),
    )
    for number, (shard, n) in enumerate(pool.sizes.items()):
        normalised = np.random.default_rng([pool.seed, number]).exponential(size=n)
        normalised *= n / normalised.sum()
        keys = [hashlib.sha256(f"{shard} {row}".encode()).hexdigest()[:32] for row in range(n)]
        columns = {
            "row": np.arange(n),
            "sample_key": keys,
            "source_id": [str(row) for row in range(n)],
            "leverage": normalised / pool.rows,
            "normalised_leverage": normalised,
        }
        header = data_versions.header(basis_version, basis_version, subspace_basis=basis_version)
        frame = pl.DataFrame(columns, schema=polars_schema(IMPORTANCE_SCORES))
        artifacts.write_frame(importance_scores.NAME, frame, header, shard)
    with open_instance(selection) as instance:
        instance.add_dynamic_partitions(selection.partitions.name or "", list(pool.sizes))
    return machine.fresh_process(_selection_alone, pool)


def measure_raw(pool: ScalePool) -> Measurement:
    """`raw_samples` of one generated shard file, whose rows are as long as those of LLaVA-665K."""
    selection = pool.selection
    images = Path(selection.source) / "images"
    images.mkdir(parents=True)
    (shard,) = pool.sizes
    with (images.parent / shard).open("w") as file:
        for row in range(pool.rows):
            (images / f"{row}.jpg").write_bytes(b"-")  # this asset asks for its size and time only
            turns = [f"<image>\nWhat is number {row}?", "It is a picture of something. " * 40]
            messages = [
                {"role": role, "content": turn}
                for role, turn in zip(("user", "assistant"), turns, strict=True)
            ]
            line = {"id": row, "messages": messages, "images": [f"images/{row}.jpg"]}
            file.write(json.dumps(line) + "\n")
    with open_instance(selection) as instance:
        instance.add_dynamic_partitions(selection.partitions.name or "", [shard])
    return machine.fresh_process(_raw_alone, pool)


def _raw_alone(pool: ScalePool) -> Measurement:
    with open_instance(pool.selection) as instance:
        return Job(pool, instance).measure(raw_samples.NAME, list(pool.sizes))


def _selection_alone(pool: ScalePool) -> Measurement:
    with open_instance(pool.selection) as instance:
        return Job(pool, instance).measure(selected_subset.NAME)


def _io_bytes() -> tuple[int, int, int]:
    """Asked for, taken from the disk, and given, by this process since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
    return counts["rchar"], counts["read_bytes"], counts["wchar"]


# --- The loops, taken apart ---------------------------------------------------------------------------------


def measure_parts(pool: ScalePool) -> dict[str, float]:
    """The rates of what the assets do, on the first shards; files are in the page cache after a first round.

    Rates are per second; what is said of a shard is its cost beside its rows.
    """
    artifacts, selection = pool.artifacts, pool.selection
    store = StorageResource().embeddings(selection.store)
    shards = list(pool.sizes)
    table, _ = receipts.recorded_table(artifacts, shards[0])
    subspace, header = subspace_basis.read_basis(artifacts)
    n, d, k = table.n_rows, pool.dim, subspace.k
    batches = [batch.vector for batch in store.read(table)]
    scorer = LeverageScorer(subspace, device=pool.device)
    arrays = artifacts.read_arrays(embedding_moments.NAME, shards[0])[0]
    moments = Moments.from_arrays(arrays)
    few = dict.fromkeys(shards[:_SPOT_SHARDS])
    headers = json.loads(header["shards"])
    versions = {shard: headers[shard]["data_version"] for shard in few}
    scores, _ = artifacts.read_frame(importance_scores.NAME, shards[0])
    scratch = "parts"

    opening = _best(lambda: store.take(table, [0]))
    reading = _best(lambda: [None for _ in store.read(table)])
    rows = _best(lambda: accumulate(batches, d, device=pool.device))
    shard = _best(lambda: accumulate([batches[0][:1]], d, device=pool.device))
    writing = _best(lambda: artifacts.write_arrays(scratch, arrays, {}))
    hashing = _best(lambda: hashlib.sha256(arrays["scatter_upper"].tobytes()))
    adding = _best(lambda: pool_moments.rebuilt_totals(artifacts, versions))
    taking = _best(lambda: pool_moments.rebuilt_totals(artifacts, dict([next(iter(versions.items()))])))
    eigen = _best(lambda: principal_axes(moments).subspace(min(k, moments.n - 1)))
    scoring = _best(lambda: [scorer.scores(batch) for batch in batches])
    keeping = _best(lambda: artifacts.write_frame(scratch, scores, {}))
    column = _best(
        lambda: artifacts.read_frame(importance_scores.NAME, shards[0], columns=["normalised_leverage"])
    )
    image = _best(_prepare_image())
    judging = _best(lambda: subspace_basis.moments_headers(selection, artifacts, list(few), FINGERPRINT))
    shutil.rmtree(str(artifacts.root / scratch))
    per_added = (adding - taking) / (len(few) - 1) if len(few) > 1 else taking
    return {
        "dimension": d,
        "directions": k,
        "image_seconds": image,
        "open_seconds_per_shard": opening,
        "read_bytes_per_second": 4 * n * d / max(reading - opening, 1e-9),
        "moments_flops_per_second": n * d * (d + 1) / max(rows - shard, 1e-9),
        "moments_seconds_per_shard": shard,
        "hash_bytes_per_second": arrays["scatter_upper"].nbytes / hashing,
        "write_bytes_per_second": arrays["scatter_upper"].nbytes / writing,
        "totals_seconds_per_value": per_added / len(arrays["scatter_upper"]),
        "headers_seconds_per_shard": judging / len(few),
        "eigen_seconds": eigen,
        "scores_flops_per_second": 2 * n * d * k / scoring,
        "scores_write_seconds_per_row": keeping / n,
        "scores_read_seconds_per_row": column / n,
    }


def _prepare_image() -> Callable[[], object]:
    """From the bytes of a 640 × 480 JPEG to what LLaVA-1.5's vision tower takes, on one core."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    from scalselect_assets.method.representation.images import DEFAULT_MAX_PIXELS, decode_image

    blocks = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((640, 480)).save(file, "JPEG", quality=90)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    data = file.getvalue()
    return lambda: processor(images=[decode_image(data, DEFAULT_MAX_PIXELS)], return_tensors="pt")


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# --- Is it right? -------------------------------------------------------------------------------------------


def evidence(pool: ScalePool) -> dict[str, float]:
    """What the store holds, against what it should: the scores' sum, the choice, and single rows in float64.

    Rows are scored again from their vectors and the stored basis. Small pools are compared with an SVD, which
    knows nothing of that basis.
    """
    artifacts, selection = pool.artifacts, pool.selection
    subspace, _ = subspace_basis.read_basis(artifacts)
    scores = {
        shard: artifacts.read_frame(importance_scores.NAME, shard)[0].sort("row") for shard in pool.sizes
    }
    chosen, _ = artifacts.read_frame(selected_subset.NAME)
    every = np.concatenate([frame["normalised_leverage"].to_numpy() for frame in scores.values()])
    size = budget_size(selection.budget, pool.rows)
    highest = np.partition(every, pool.rows - size)[pool.rows - size :]
    leverage_sum = sum(float(frame["leverage"].sum()) for frame in scores.values())
    found = {
        "k": subspace.k,
        "energy": subspace.energy,
        "leverage_sum": leverage_sum,
        "leverage_sum_error": abs(leverage_sum / subspace.k - 1),
        "selected": chosen.height,
        "budget": size,
        "selected_are_the_highest": float(
            np.array_equal(np.sort(highest), np.sort(chosen["normalised_leverage"].to_numpy()))
        ),
        **_spot_check(pool, subspace, scores),
    }
    if pool.rows <= _SVD_ROWS:
        found |= _against_svd(
            pool, np.concatenate([frame["leverage"].to_numpy() for frame in scores.values()])
        )
    return found


def _spot_check(pool: ScalePool, subspace: Subspace, scores: Mapping[str, pl.DataFrame]) -> dict[str, float]:
    generator = np.random.default_rng(pool.seed)
    shards = generator.permutation(np.array(list(scores), dtype=object))[:_SPOT_SHARDS]
    errors = []
    for shard in shards:
        x = _vectors(pool, shard)
        wanted = generator.permutation(len(x))[: -(-_SPOT_ROWS // len(shards))]
        centred = x[wanted].astype(np.float64) - subspace.mean
        expected = np.square(centred @ subspace.directions / subspace.singular_values).sum(axis=1)
        errors.append(np.abs(scores[shard]["leverage"].to_numpy()[wanted] / expected - 1))
    found = np.concatenate(errors)
    return {"spot_rows": len(found), "spot_shards": len(shards), "spot_error": float(found.max())}


def _against_svd(pool: ScalePool, leverage: NDArray[np.float64]) -> dict[str, float]:
    x = np.concatenate([_vectors(pool, shard) for shard in pool.sizes]).astype(np.float64)
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    energy = np.cumsum(s**2) / np.square(s).sum()
    k = int(np.searchsorted(energy, pool.selection.energy)) + 1
    expected = np.square(u[:, :k]).sum(axis=1)
    return {"svd_k": k, "svd_error": float(np.abs(leverage / expected - 1).max())}


def _vectors(pool: ScalePool, shard: str) -> NDArray[np.float32]:
    """All vectors of a shard, in row order."""
    table: EmbeddingTable = receipts.recorded_table(pool.artifacts, shard)[0]
    x = np.empty((table.n_rows, table.dimension), np.float32)
    for batch in StorageResource().embeddings(pool.selection.store).read(table):
        x[batch.row] = batch.vector
    return x


def disk_bytes(folder: Path) -> dict[str, int]:
    """Size on disk by folder of the store."""
    return {
        part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }


# --- Report -------------------------------------------------------------------------------------------------


def print_measurements(title: str, measurements: Sequence[Measurement], pool: ScalePool) -> None:
    """One stage of the path."""
    print(f"\n## {title}\n")
    print(
        "| asset | runs | seconds | Dagster's | s per 10^6 rows | read GB | from disk GB | written GB "
        "| TFLOP | GFLOP/s | before MiB | peak MiB | failed checks |"
    )
    print("|---|" + "---:|" * 11 + "---|")
    for one in measurements:
        cells = (
            f"{one.runs}",
            f"{one.seconds:.2f}",
            f"{one.seconds - one.asset_seconds:.2f}",
            f"{one.seconds / one.rows * 1e6:.1f}",
            f"{one.read / 1e9:.3f}",
            f"{one.read_from_disk / 1e9:.3f}",
            f"{one.written / 1e9:.3f}",
            f"{one.flops / 1e12:.3f}" if one.flops else "",
            f"{one.flops / 1e9 / one.asset_seconds:.1f}" if one.flops else "",
            f"{one.resident_before / MIB:.0f}",
            f"{one.peak / MIB:.0f}",
            ", ".join(one.failed_checks),
        )
        print(f"| {one.asset} | " + " | ".join(cells) + " |")
    peak, matrix = max(one.peak for one in measurements), machine.matrix_bytes(pool.rows, pool.dim)
    print(
        f"\n{sum(one.seconds for one in measurements):.1f} s in all; peak resident memory "
        f"{peak / MIB:.0f} MiB, where all vectors are {matrix / MIB:.0f} MiB. Dagster's: wall time less the "
        "assets' own `seconds`; that of `importance_scores` holds reading the basis once. Flops: n·d·(d+1); "
        "4/3·d³ + 2·d²·k; 2·n·d·k."
    )


def print_numbers(title: str, numbers: Mapping[str, float]) -> None:
    """A table of names and values."""
    print(f"\n## {title}\n\n| | |\n|---|---:|")
    for name, value in numbers.items():
        print(f"| {name.replace('_', ' ')} | {value:.6g} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate, measure, compare, print as Markdown, and delete what was generated."""
    options = parse_options(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=options.folder))
    try:
        results = run(options, folder)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        if options.keep:
            print(f"\nKept: {folder}")
        else:
            shutil.rmtree(folder)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All that the options ask for, printed; returns the numbers."""
    pool = ScalePool(
        folder / "path", options.rows, options.dim, options.shard_rows, options.seed, options.device
    )
    shards = list(pool.sizes)
    header = machine.fresh_process(machine.describe)
    header["storage"] = ", ".join(f"{name} {version(name)}" for name in ("dagster", "lancedb", "polars"))
    print("# Scale\n")
    for name, value in header.items():
        print(f"- {name}: {value}")
    print(f"- pool: {pool.rows} rows of {pool.dim} in {len(shards)} shards, seed {pool.seed}, {pool.device}")
    print(f"- generated in {machine.fresh_process(generate, pool, shards, 0):.1f} s")
    path = machine.fresh_process(measure_path, pool, shards)
    print_measurements("All shards are new", path, pool)
    again: list[Measurement] = []
    if options.changed:
        replaced = shards[: options.changed]
        machine.fresh_process(generate, pool, replaced, 1)
        again = machine.fresh_process(measure_path, pool, replaced)
        print_measurements(f"{len(replaced)} shards have changed", again, pool)
    parts = machine.fresh_process(measure_parts, pool)
    print_numbers("Taken apart", parts)
    found = machine.fresh_process(evidence, pool)
    print_numbers("Is it right?", found)
    disk = disk_bytes(Path(pool.selection.store))
    print_numbers("Bytes on disk", disk)
    alone = ScalePool(folder / "raw", pool.shard_rows, pool.dim, pool.shard_rows, options.seed, "cpu")
    raw = measure_raw(alone)
    print_measurements("Reading raw rows alone", [raw], alone)
    selection = None
    if options.selection_rows:
        alone = ScalePool(folder / "selection", options.selection_rows, 1, 200_000, options.seed, "cpu")
        selection = measure_selection(alone)
        print_measurements(f"Selection alone, of {alone.rows} made-up scores", [selection], alone)
    return {
        "header": header,
        "pool": {**asdict(pool), "folder": "", "shards": len(shards)},
        "path": [asdict(one) for one in path],
        "again": [asdict(one) for one in again],
        "parts": parts,
        "evidence": found,
        "disk": disk,
        "raw": asdict(raw),
        "selection": asdict(selection) if selection else None,
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=int, default=665_000)
    add("--dim", type=int, default=4096)
    add("--shard-rows", type=int, default=5000)
    add("--changed", type=int, default=0, help="shards to replace for a second pass (0)")
    add("--selection-rows", type=int, default=0, help="also select from so many made-up scores (0)")
    add("--folder", type=Path, required=True, help="where a folder for the store is made")
    add("--keep", action="store_true", help="do not delete the store")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="for the products (cpu)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write all numbers there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
