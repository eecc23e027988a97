"""Gathering the content of the report from the store."""

import json
from collections.abc import Mapping
from typing import Any, Final

import dagster as dg

from scalselect_assets.charts import in_dagster
from scalselect_assets.charts.chart_data import Churn
from scalselect_assets.choice import selected_subset
from scalselect_assets.dataset import training_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.method.representation.rejection import MEANINGS, RejectionReason
from scalselect_assets.report import compared
from scalselect_assets.report.content import Counts, Fact, RejectedReason, ReportContent
from scalselect_assets.report.gallery import ReportRows, galleries
from scalselect_assets.report.gallery_sample import Overlay
from scalselect_assets.report.page_receipt import CODE_VERSION
from scalselect_assets.report.profile import ReportScores
from scalselect_assets.resources.artifacts import RECORD, ArtifactStore
from scalselect_assets.resources.pool_listing import in_words
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import rank_alternatives, subspace_basis
from scalselect_assets.subspace.basis_header import BasisHeader

_MANIFEST_SHARDS: Final = 40


def gather(
    storage: StorageResource,
    selection: Selection,
    *,
    churn: Churn | None = None,
    overlay: Overlay | None = None,
) -> ReportContent:
    """Everything that the report says of the present training dataset.

    Args:
        storage: Opens pool and store.
        selection: The selection.
        churn: Against the selection before, which the store does not keep.
        overlay: Gives the attention overlay of a sample; without it none is shown.

    Raises:
        ArtifactMissingError: Something is not materialized.
        dg.Failure: The stored results are not of one piece.
    """
    artifacts = storage.artifacts(selection.store)
    manifest = training_manifest.read_manifest(artifacts)
    subspace, basis = subspace_basis.read_basis(artifacts)
    subset, subset_header = artifacts.read_frame(
        selected_subset.NAME, columns=["shard", "row", "normalised_leverage"]
    )
    _require_one_piece(selection, manifest, subset_header, basis)
    shards = sorted(basis.shards)
    scores = ReportScores(artifacts, basis.data_version, shards, subspace.n)
    profile, picks = scores.profile_and_picks(subset)
    rows = ReportRows(storage, selection, subset, overlay, subspace.n)
    rows.read(shards, picks)
    return ReportContent(
        title=f"Selection report: {selection.name}",
        made_from=_made_from(manifest, subset_header),
        settings=_settings(selection, manifest),
        counts=Counts(manifest["rows"], subspace.n, sum(rows.rejected.values()), subset.height),
        energy=in_dagster.energy_points(
            subspace, rank_alternatives.rule_in_words(selection.rank_rule.describe())
        ),
        leverage=profile,
        composition=rows.composition(),
        comparison=compared.for_report(artifacts),
        churn=churn,
        rejected=tuple(
            RejectedReason(reason, n_rows, MEANINGS[RejectionReason(reason)])
            for reason, n_rows in sorted(rows.rejected.items(), key=lambda one: (-one[1], one[0]))
        ),
        galleries=galleries(picks, rows.items),
        **_shown_manifest(artifacts, manifest),
    )


def _require_one_piece(
    selection: Selection,
    manifest: Mapping[str, Any],
    subset_header: Mapping[str, str],
    basis: BasisHeader,
) -> None:
    """The dataset was written from the present selection and basis, under the present settings.

    Raises:
        dg.Failure: It was not.
    """
    expected = training_manifest.provenance(
        selection,
        subset_header["provenance"],
        subset_header["data_version"],
        basis.data_version,
        manifest["shards_left_out"],
    )
    if manifest["provenance"] != expected:
        raise dg.Failure(
            f"the training dataset's provenance is {manifest['provenance']}; of the present selection, basis "
            f"and settings it would be {expected}: materialize {training_manifest.NAME} first, or run the "
            "refresh",
            allow_retries=False,
        )


def _made_from(manifest: Mapping[str, Any], subset_header: Mapping[str, str]) -> tuple[Fact, ...]:
    """Versions, from the code to the file that a trainer reads."""
    model = manifest["model"]
    facts = {
        "scalselect-dagster": manifest["code"]["scalselect-dagster"],
        "model": model["model"],
        "model commit": model.get("commit"),
        "model fingerprint": model["fingerprint"],
        "basis version": manifest["basis_version"],
        "subset version": subset_header["data_version"],
        "dataset SHA-256": manifest["data_version"],
        "dataset provenance": manifest["provenance"],
        "report code version": CODE_VERSION,
    }
    return tuple(Fact(name, str(value)) for name, value in facts.items() if value is not None)


def _settings(selection: Selection, manifest: Mapping[str, Any]) -> tuple[Fact, ...]:
    """The declared settings, and the shards that were left out."""
    settings = {
        name.replace("_", " "): "default" if value is None else str(value)
        for name, value in selection.result_settings().items()
    }
    if left_out := manifest["shards_left_out"]:
        named = ", ".join(left_out[:10]) + (" …" if len(left_out) > 10 else "")
        settings["shards left out"] = f"{len(left_out):,}: {named}"
    if there := in_words(manifest.get("passed_over", {})):
        settings["files not read"] = there
    if unknown := manifest.get("unknown_listed"):
        settings["listed, not in the pool"] = f"{len(unknown):,}: {', '.join(unknown[:10])}"
    return tuple(Fact(name, value) for name, value in settings.items())


def _shown_manifest(artifacts: ArtifactStore, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The manifest for the page, with the lineage of the first shards only."""
    shards, left_out = manifest["shards"], manifest["shards_left_out"]
    shown = {
        **manifest,
        "shards": dict(list(shards.items())[:_MANIFEST_SHARDS]),
        "shards_left_out": left_out[:_MANIFEST_SHARDS],
    }
    path = artifacts.path(training_manifest.NAME, training_manifest.MANIFEST, suffix=RECORD)
    note = f"The file is {path}."
    if max(len(shards), len(left_out)) > _MANIFEST_SHARDS:
        note = f"Only the first {_MANIFEST_SHARDS} shards are shown; all {len(shards):,} are in {path}."
    return {"manifest": json.dumps(shown, ensure_ascii=False, indent=1), "manifest_note": note}
