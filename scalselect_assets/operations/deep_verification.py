"""Deep verification: it reads the whole store and computes its scores anew, to find unnoticed damage.

A refresh reads only the files that it needs. The deep verification compares every file and every table with
its hash, computes the basis anew from the vectors, and compares the stored scores and chosen rows with it.
Nothing is changed. Costs: reading the whole store, one pass over all vectors for the basis and one for the
scores.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from upath import UPath

from scalselect_assets.choice import selected_subset
from scalselect_assets.dataset import training_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.report import page_receipt
from scalselect_assets.resources.artifacts import (
    ARRAYS,
    FRAME,
    RECORD,
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStore,
)
from scalselect_assets.resources.embedding_store import EmbeddingTable, EmbeddingTableError
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import importance_scores, pool_moments, subspace_basis
from scalselect_assets.subspace.basis_header import BasisHeader

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace
    from scalselect_assets.method.subspace.leverage import LeverageScorer

SCORE_TOLERANCE = 5e-5
"""The allowed error of normalised scores (mean 1). It exceeds their expected error, 1e-5 and rounding."""

_NOT_ARTIFACTS = {"dagster", "lance", ".locks"}


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault in a part of a store.

    Attributes:
        message: Description of the fault.
        remove: The files to remove, so that a refresh makes them again.
    """

    message: str
    remove: tuple[UPath, ...]


def deep_problems(selection: Selection, storage: StorageResource) -> list[Problem]:
    """All faults of a store: files that changed after writing, and results that do not match the rest."""
    artifacts = storage.artifacts(selection.store)
    problems = [*_damaged_files(artifacts), *_damaged_outputs(artifacts)]
    try:
        subspace, basis = subspace_basis.read_basis(artifacts)
    except (ArtifactMissingError, ArtifactCorruptError):
        return problems  # without a basis nothing can be compared; damage is listed already
    tables, damaged_tables = _tables(artifacts, storage, basis)
    problems += damaged_tables
    if not damaged_tables:
        problems += _wrong_scores(selection, storage, subspace, basis, tables)
        problems += _wrong_choice(artifacts, basis)
    return problems


def _damaged_files(artifacts: ArtifactStore) -> Iterator[Problem]:
    """The files that do not match the hash inside them."""
    for path in sorted(artifacts.root.rglob("*"), key=str):
        parts = path.path.removeprefix(f"{artifacts.root.path}/").split("/")
        in_exports = parts[0] == training_manifest.NAME and len(parts) > 2
        if parts[0] in _NOT_ARTIFACTS or in_exports or parts[-1].startswith("."):
            continue
        if path.suffix not in (FRAME, ARRAYS, RECORD) or not path.is_file() or parts[-1] == "train.json":
            continue
        try:
            artifacts.check_file(path)
        except ArtifactCorruptError as error:
            yield Problem(str(error), (path,))
        except ArtifactMissingError:
            continue  # the file was removed during the search


def _damaged_outputs(artifacts: ArtifactStore) -> Iterator[Problem]:
    """The files that do not match their description in the manifest or in a receipt."""
    folder = artifacts.root / training_manifest.NAME
    manifest_path = artifacts.path(training_manifest.NAME, training_manifest.MANIFEST, suffix=RECORD)
    try:
        described = {
            folder / name: str(file["sha256"])
            for name, file in training_manifest.read_manifest(artifacts)["files"].items()
        }
    except (ArtifactMissingError, ArtifactCorruptError):
        described = {}
    try:
        page = page_receipt.page_path(artifacts)
        described[page] = str(page_receipt.read_receipt(artifacts)["data_version"])
    except (ArtifactMissingError, ArtifactCorruptError):
        pass  # there is no page, or its receipt is listed as damaged
    for path, sha256 in described.items():
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            yield Problem(f"{path} is not there", (manifest_path,))
            continue
        if found != sha256:
            message = f"{path} has SHA-256 {found[:12]}..., recorded was {sha256[:12]}..."
            yield Problem(message, (path, manifest_path))


def _tables(
    artifacts: ArtifactStore, storage: StorageResource, basis: BasisHeader
) -> tuple[dict[str, EmbeddingTable], list[Problem]]:
    """The table of each shard in the basis, and a problem for each table that does not match its record."""
    embeddings = storage.embeddings(str(artifacts.root))
    tables, problems = {}, []
    for shard in basis.shards:
        receipt = artifacts.path(receipts.NAME, shard, suffix=RECORD)
        try:
            tables[shard], _ = receipts.fitted_table(artifacts, shard, basis.vectors_of(shard))
            embeddings.verify(tables[shard])
        except EmbeddingTableError as error:
            problems.append(Problem(str(error), (receipt,)))
        except ArtifactCorruptError:
            continue  # the file is listed as damaged already
        except ArtifactMissingError as error:
            problems.append(Problem(str(error), ()))
    return tables, problems


def _wrong_scores(
    selection: Selection,
    storage: StorageResource,
    stored: "Subspace",
    basis: BasisHeader,
    tables: dict[str, EmbeddingTable],
) -> Iterator[Problem]:
    """The faults in the stored basis and scores, compared with those computed from the vectors."""
    from scalselect_assets.method.subspace.basis import fit_subspace
    from scalselect_assets.method.subspace.leverage import LeverageScorer
    from scalselect_assets.method.subspace.moments import MomentsAccumulator
    from scalselect_assets.method.subspace.preprocessing import prepared_rows
    from scalselect_assets.method.subspace.rank import described_rule

    artifacts, embeddings = storage.artifacts(selection.store), storage.embeddings(selection.store)
    accumulator = MomentsAccumulator(stored.d)
    for table in tables.values():
        for batch in embeddings.read(table):
            accumulator.add(prepared_rows(batch.vector, to_unit_length=basis.unit_rows))
    anew = fit_subspace(accumulator.moments(), described_rule(basis.rank_rule), standardise=basis.standardise)
    made_from_it = (
        artifacts.path(subspace_basis.NAME, suffix=ARRAYS),
        artifacts.path(pool_moments.NAME, suffix=ARRAYS),
    )
    if (stored.n, stored.k) != (anew.n, anew.k):
        found = f"{stored.n} samples and rank {stored.k}, of its vectors it has {anew.n} and {anew.k}"
        yield Problem(f"{subspace_basis.NAME} has {found}", made_from_it)
        return
    scorers = {"anew": LeverageScorer(anew), "stored": LeverageScorer(stored)}
    for shard, table in tables.items():
        scores = {name: _scores(storage, selection, table, scorer) for name, scorer in scorers.items()}
        if (off := _difference(scores["stored"], scores["anew"])) > SCORE_TOLERANCE:
            message = f"the scores of {shard} are off by {off:.2g} with the stored {subspace_basis.NAME}"
            yield Problem(message, made_from_it)
            return
        place = artifacts.path(importance_scores.NAME, shard, suffix=FRAME)
        try:
            frame, _ = artifacts.read_frame(importance_scores.NAME, shard)
        except (ArtifactMissingError, ArtifactCorruptError):
            continue  # a refresh makes the scores
        if (off := _difference(frame, scores["anew"])) > SCORE_TOLERANCE:
            yield Problem(f"{importance_scores.NAME}[{shard}] is off by {off:.2g} ({place})", (place,))


def _scores(
    storage: StorageResource, selection: Selection, table: EmbeddingTable, scorer: "LeverageScorer"
) -> pl.DataFrame:
    from scalselect_assets.method.subspace.preprocessing import prepared_rows

    schema = pl.Schema({"sample_key": pl.String(), "normalised_leverage": pl.Float64()})
    frames = [pl.DataFrame(schema=schema)]
    for batch in storage.embeddings(selection.store).read(table):
        x = prepared_rows(batch.vector, to_unit_length=selection.unit_rows)
        values = scorer.scores(x) * scorer.normalisation
        columns = {"sample_key": batch.sample_key, "normalised_leverage": values}
        frames.append(pl.DataFrame(columns, schema=schema))
    return pl.concat(frames)


def _difference(found: pl.DataFrame, wanted: pl.DataFrame) -> float:
    """The largest difference of a score; infinite if the two tables hold different samples."""
    both = wanted.join(found, on="sample_key", suffix="_found")
    if both.height != wanted.height or found.height != wanted.height:
        return float("inf")
    if not both.height:
        return 0.0
    columns = both.select("normalised_leverage", "normalised_leverage_found").to_numpy()
    off = np.abs(columns[:, 0] - columns[:, 1]) / np.maximum(1.0, np.abs(columns[:, 0]))
    return float("inf") if np.isnan(off).any() else float(off.max())


def _wrong_choice(artifacts: ArtifactStore, basis: BasisHeader) -> Iterator[Problem]:
    """The faults in the chosen rows: scores that differ from those of their shards."""
    try:
        chosen, stated = artifacts.read_frame(selected_subset.NAME)
    except (ArtifactMissingError, ArtifactCorruptError):
        return
    if stated.get("subspace_basis") != basis.data_version:
        return  # the choice is of an earlier basis; a refresh chooses anew
    path = artifacts.path(selected_subset.NAME, suffix=FRAME)
    for (shard,), rows in chosen.group_by("shard"):
        try:
            scores, _ = artifacts.read_frame(importance_scores.NAME, str(shard))
        except (ArtifactMissingError, ArtifactCorruptError):
            continue
        held = scores.select("sample_key", "normalised_leverage")
        of_chosen = held.join(rows.select("sample_key"), on="sample_key", how="semi")
        off = _difference(rows.select("sample_key", "normalised_leverage"), of_chosen)
        if off > SCORE_TOLERANCE:
            yield Problem(f"the chosen rows of {shard} are off their scores by {off:.2g} ({path})", (path,))
