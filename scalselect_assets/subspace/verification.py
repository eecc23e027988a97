"""The comparison of the stored basis with one computed anew from the moments of all shards."""

import dagster as dg
import numpy as np

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.recording.records import RunRecords
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import pool_moments
from scalselect_assets.subspace.subspace_basis import NAME, read_basis

REBUILD_TOLERANCE = 1e-9


def verify_job(selection: Selection) -> dg.JobDefinition:
    """The comparison with a rebuild, which reads every shard's moments; started by hand.

    It is a job and not an asset check, because Dagster runs an asset's checks at every materialization.
    """

    @dg.op(name=selection.job_name("verify_basis_op"), description="Compare the basis with its rebuild.")
    def verify_basis_op(context: dg.OpExecutionContext, storage: StorageResource) -> None:
        difference = rebuild_difference(storage.artifacts(selection.store))
        RunRecords(context).log_event(dg.AssetObservation(selection.key(NAME), metadata=difference))
        if max(difference.values()) > REBUILD_TOLERANCE:
            raise dg.Failure(
                f"the basis differs from the one of all shards' moments by {difference}, allowed is "
                f"{REBUILD_TOLERANCE}; materialize {NAME} with rebuild: true",
                allow_retries=False,
            )

    @dg.job(
        name=selection.job_name("verify_basis"),
        executor_def=dg.in_process_executor,
        description="Compute the basis anew from the moments of all shards and compare; changes nothing.",
    )
    def verify_basis() -> None:
        verify_basis_op()

    return verify_basis


def rebuild_difference(artifacts: ArtifactStore) -> dict[str, float]:
    """The difference between the stored basis and one computed anew from the same moments.

    Returns:
        ``energies``: largest difference of the kept energies, relative to the largest;
        ``score_change``: bound on the mean absolute change of normalised scores.

    Raises:
        ArtifactMissingError: There is no basis, or some of the moments that it was fitted on are missing.
    """
    from scalselect_assets.method.subspace.basis import fit_subspace
    from scalselect_assets.method.subspace.drift import basis_drift
    from scalselect_assets.method.subspace.rank import described_rule

    stored, header = read_basis(artifacts)
    versions = {shard: held.data_version for shard, held in header.shards.items()}
    moments = pool_moments.rebuilt_totals(artifacts, versions).moments()
    rule = described_rule(header.rank_rule)
    rebuilt = fit_subspace(moments, rule, standardise=header.standardise)
    width = max(stored.rank, rebuilt.rank)
    energies = [np.pad(one.spectrum, (0, width - one.rank)) for one in (stored, rebuilt)]
    largest = max(float(energies[1].max(initial=0.0)), np.finfo(np.float64).tiny)
    return {
        "energies": float(np.abs(energies[0] - energies[1]).max(initial=0.0)) / largest,
        "score_change": float(basis_drift(stored, rebuilt, moments).score_change),
    }
