"""What a changed shard costs: the pool's totals updated, against all shards' moments added up anew.

``python -m benchmarks.basis_update --folder DIR`` writes synthetic moments of many shards as
`embedding_moments` does, and times `pool_moments.update` with shards changed, added and removed, each
followed at once by ``rebuild=True`` of the same pool, so that a busy machine slows both. Then comes the basis
(`principal_axes` and the directions), which costs the same either way. Also timed: finding out which shards
belong into the basis, which reads two small files per shard and is part of the asset.

The basis of the updated totals is compared with that of the rebuilt ones, after one update and after many:
the largest difference of an energy relative to the largest energy, and the bound on the mean absolute change
of the normalised scores, whose mean is 1.

The files of a thousand shards of dimension 1024 take 4.2 GB below ``--folder``, deleted at the end. Where
they fit in memory, the page cache serves them; ``--cold`` drops them from it before each measurement, as at
sizes that do not fit.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import machine
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.method.subspace.basis import Subspace, principal_axes
from scalselect_assets.method.subspace.drift import basis_drift
from scalselect_assets.method.subspace.moments import Moments
from scalselect_assets.method.subspace.rank import DEFAULT_RANK_RULE
from scalselect_assets.recording import data_versions
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingTable
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import embedding_moments, pool_moments, subspace_basis

FINGERPRINT = digest("synthetic")
SELECTION = Selection(name="synthetic", source="pool", store="store", target_model="synthetic")
KINDS = ("changed", "added", "removed")
REBUILT = "rebuilt"

_SPECTRUM = 1.4


@dataclass(frozen=True, slots=True)
class Timing:
    """One new basis.

    Attributes:
        kind: What happened to the shards before it, or ``REBUILT``.
        totals: Seconds of `pool_moments.update`: reading, adding, taking out, writing the totals.
        basis: Seconds of the eigendecomposition and the directions.
        n_read: Files of shard moments that were read.
        rebuilt: Whether everything was added up.
    """

    kind: str
    totals: float
    basis: float
    n_read: int
    rebuilt: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """Of an updated basis from the rebuilt one, after so many updates."""

    updates: int
    energies: float
    score_change: float


class BasisPool:
    """Shards with moments in a store, which come, change and go."""

    def __init__(self, artifacts: ArtifactStore, d: int, rows: int, seed: int) -> None:
        """No shards yet; those that come have ``rows`` rows of width ``d``."""
        self.artifacts, self.d, self._rows = artifacts, d, rows
        self._generator = np.random.default_rng(seed)
        strengths = np.arange(1, d + 1) ** (-_SPECTRUM / 2)
        self._directions = strengths[:, None] * self._generator.standard_normal((d, d))
        self._mean = 100 * self._generator.standard_normal(d)
        self._numbers = count()
        self.versions: dict[str, str] = {}

    def add(self) -> None:
        """Another shard comes."""
        self._write(f"shard-{next(self._numbers):06d}.jsonl")

    def change(self) -> None:
        """Some shard has other vectors now."""
        self._write(str(self._generator.choice(list(self.versions))))

    def remove(self) -> None:
        """Some shard is gone; like the refresh, nothing deletes its files."""
        del self.versions[str(self._generator.choice(list(self.versions)))]

    def headers(self) -> dict[str, dict[str, str]]:
        """What the asset finds out before it adds anything up."""
        return subspace_basis.moments_headers(SELECTION, self.artifacts, list(self.versions), FINGERPRINT)

    def forget_cached_files(self) -> None:
        """Make the next reads come from the disk."""
        for asset in (embedding_moments.NAME, pool_moments.NAME, pool_moments.RETIRED):
            for path in self.artifacts.paths(asset, suffix=".safetensors"):
                file = os.open(str(path), os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)

    def _write(self, shard: str) -> None:
        """A shard's receipt and moments, those before set aside, as the assets leave them."""
        rows = self._generator.standard_normal((self._rows, self.d)) @ self._directions
        moments = Moments.of(rows + self._mean + self._generator.standard_normal(self.d))
        embeddings_version = digest(shard, str(self._generator.bit_generator.random_raw()))
        version = digest(embeddings_version)
        table = EmbeddingTable(FINGERPRINT, shard, shard, 1, self._rows, self.d, embeddings_version)
        header = data_versions.header(embeddings_version, embeddings_version)
        self.artifacts.write_json(receipts.NAME, {"table": table.to_json(), "header": header}, shard)
        pool_moments.retire(self.artifacts, shard, version)
        self.artifacts.write_arrays(
            embedding_moments.NAME,
            moments.to_arrays(),
            data_versions.header(
                version,
                embedding_moments.provenance(SELECTION, embeddings_version),
                attention_embeddings=embeddings_version,
                model_fingerprint=FINGERPRINT,
                lance_table=table.table,
                lance_version=str(table.version),
            ),
            shard,
        )
        self.versions[shard] = version


def new_basis(pool: BasisPool, kind: str, *, cold: bool) -> tuple[Timing, Subspace, Moments]:
    """Bring the totals up to date, or rebuild them, and fit the basis.

    Raises:
        ValueError: The pool has no shards.
    """
    if cold:
        pool.forget_cached_files()
    start = time.perf_counter()
    updated = pool_moments.update(pool.artifacts, pool.versions, rebuild=kind == REBUILT)
    added = time.perf_counter()
    if updated is None:
        raise ValueError("Got a pool without shards; a basis needs at least 1. Begin with more of them.")
    axes = principal_axes(updated.moments)
    subspace = axes.subspace(DEFAULT_RANK_RULE.rank(axes.spectrum, axes.n, axes.d))
    timing = Timing(kind, added - start, time.perf_counter() - added, updated.n_read, updated.rebuilt)
    return timing, subspace, updated.moments


def difference(updates: int, updated: Subspace, rebuilt: Subspace, moments: Moments) -> Difference:
    """How far the basis of the updated totals is from the rebuilt one, of these moments."""
    width = max(updated.rank, rebuilt.rank)
    energies = [np.pad(one.spectrum, (0, width - one.rank)) for one in (updated, rebuilt)]
    apart = float(np.abs(energies[0] - energies[1]).max()) / float(energies[1].max())
    return Difference(updates, apart, basis_drift(updated, rebuilt, moments).score_change)


def happen(pool: BasisPool, kind: str, n_shards: int) -> None:
    """Something happens to some shards."""
    act = {"changed": pool.change, "added": pool.add, "removed": pool.remove}[kind]
    for _ in range(n_shards):
        act()


def compare(pool: BasisPool, options: argparse.Namespace) -> Iterator[tuple[Timing, Timing, Difference]]:
    """In turns: something happens, the totals are updated, and the same pool is rebuilt."""
    for _ in range(options.rounds):
        for kind in KINDS:
            happen(pool, kind, options.changed)
            timing, updated, _ = new_basis(pool, kind, cold=options.cold)
            rebuilding, rebuilt, moments = new_basis(pool, REBUILT, cold=options.cold)
            yield timing, rebuilding, difference(1, updated, rebuilt, moments)


def drift_of_many(pool: BasisPool, options: argparse.Namespace) -> Difference:
    """Many updates in succession, without a rebuild between them."""
    for kind in islice(cycle(KINDS), options.updates):
        happen(pool, kind, options.changed)
        pool_moments.update(pool.artifacts, pool.versions, rebuild=False)
    # Nothing has changed since, so this is the basis of the totals as they are.
    _, updated, _ = new_basis(pool, "unchanged", cold=False)
    _, rebuilt, moments = new_basis(pool, REBUILT, cold=False)
    return difference(options.updates, updated, rebuilt, moments)


def print_timings(timings: Sequence[Timing]) -> None:
    """One line per kind, best and median of the rounds; the ratio is of the best totals and best sums."""
    rebuilds = [timing for timing in timings if timing.kind == REBUILT]
    slowest = _best(rebuilds)
    print(
        "\n| shards | moment files read | totals s | median | basis s | median | together s "
        "| rebuild/update, totals | rebuild/update, together |"
    )
    print("|---|" + "---:|" * 8)
    for kind in (*KINDS, REBUILT):
        of_kind = [timing for timing in timings if timing.kind == kind]
        totals, basis = _best(of_kind)
        cells = (
            f"{max(timing.n_read for timing in of_kind)}",
            f"{totals:.3f}",
            f"{median(timing.totals for timing in of_kind):.3f}",
            f"{basis:.3f}",
            f"{median(timing.basis for timing in of_kind):.3f}",
            f"{totals + basis:.3f}",
            f"{slowest[0] / totals:.1f}",
            f"{sum(slowest) / (totals + basis):.1f}",
        )
        print(f"| {kind} | " + " | ".join(cells) + " |")
    if any(timing.rebuilt for timing in timings if timing.kind != REBUILT):
        print("\nSome updates were rebuilds: with so few shards, adding up anew reads no more files.")


def _best(timings: Sequence[Timing]) -> tuple[float, float]:
    return min(timing.totals for timing in timings), min(timing.basis for timing in timings)


def print_differences(differences: Sequence[Difference]) -> None:
    """The largest difference for each number of updates."""
    print("\n| updates since the last rebuild | energies, relative | score change |\n|---:|---:|---:|")
    for updates in sorted({one.updates for one in differences}):
        alike = [one for one in differences if one.updates == updates]
        energies = max(one.energies for one in alike)
        print(f"| {updates} | {energies:.1e} | {max(one.score_change for one in alike):.1e} |")


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Generate, compare, print; returns the numbers."""
    header = machine.fresh_process(machine.describe)
    pool = BasisPool(StorageResource().artifacts(str(folder)), options.dim, options.rows, options.seed)
    start = time.perf_counter()
    for _ in range(options.shards):
        pool.add()
    print("# Updating the basis\n")
    for name, value in header.items():
        print(f"- {name}: {value}")
    size = options.dim * (options.dim + 1) // 2 * 8
    print(
        f"- pool: {options.shards} shards, d = {options.dim}, {size / 1e6:.1f} MB of moments each, "
        f"{options.rows} rows each; {options.changed} come, change or go at a time; seed {options.seed}"
    )
    print(f"- files: {'from the disk' if options.cold else 'from the page cache where they fit'}")
    print(f"- generated in {time.perf_counter() - start:.1f} s")

    new_basis(pool, REBUILT, cold=False)
    compared = list(compare(pool, options))
    timings = [timing for update, rebuild, _ in compared for timing in (update, rebuild)]
    start = time.perf_counter()
    judged = len(pool.headers())
    judging = time.perf_counter() - start
    differences = [apart for _, _, apart in compared]
    differences.append(drift_of_many(pool, options))
    print_timings(timings)
    print(f"\nReading headers and receipts of {judged} shards, in either case: {judging:.3f} s.")
    print_differences(differences)
    return {
        "header": header,
        "shards": options.shards,
        "dimension": options.dim,
        "changed": options.changed,
        "cold": options.cold,
        "headers_seconds": judging,
        "timings": [asdict(timing) for timing in timings],
        "differences": [asdict(one) for one in differences],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print as Markdown, and delete what was generated."""
    options = parse_options(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="basis-update-", dir=options.folder))
    try:
        results = run(options, folder)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.basis_update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shards", type=int, default=1000)
    add("--dim", type=int, default=1024)
    add("--rows", type=int, default=64, help="in each shard; the times do not depend on it (64)")
    add("--changed", type=int, default=1, help="shards that change, come or go at a time (1)")
    add("--rounds", type=int, default=3, help="of all three kinds and their rebuilds (3)")
    add("--updates", type=int, default=50, help="in succession, before the last comparison (50)")
    add("--cold", action="store_true", help="read files from the disk instead of the page cache")
    add("--folder", type=Path, required=True, help="where a folder for the files is made")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write all numbers there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
