"""The distance between the basis and the last one that it can be compared with.

The number is only shown and has no effect: at every new basis all shards are scored again, which is one
matrix product over the pool. Costs: d² operations per direction, and one d × d matrix.
"""

from typing import TYPE_CHECKING

from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from scalselect_assets.subspace.basis_header import BASIS, BasisHeader, parse_basis_header

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace
    from scalselect_assets.method.subspace.moments import Moments


def drift_since_last(
    artifacts: ArtifactStore, subspace: "Subspace", moments: "Moments", header: BasisHeader
) -> dict[str, float]:
    """The drift from the stored basis to a new one, as plain numbers for the UI to plot over time.

    Args:
        artifacts: The store, which still holds the last basis.
        subspace: The new basis.
        moments: The moments of the pool that the new basis was fitted on.
        header: The header of the new basis: its version, model and preprocessing.

    Returns:
        ``score_change``, the bound on the mean absolute change of the normalised scores;
        ``largest_angle_degrees``, the largest principal angle; and ``energy_kept``, the share of the energy
        that lay in the old subspace. Empty where the store holds no basis that can be compared.
    """
    from scalselect_assets.method.subspace.drift import basis_drift

    last = _last_basis(artifacts)
    if last is None:
        return {}
    last_subspace, last_header = last
    if (last_header.model_fingerprint, last_header.unit_rows) != (header.model_fingerprint, header.unit_rows):
        return {}
    if last_header.data_version == header.data_version:
        # The same basis is computed again, after a crash or for a rebuild. It keeps its first drift.
        return dict(last_header.drift)
    moved = basis_drift(last_subspace, subspace, moments)
    return {
        "score_change": moved.score_change,
        "largest_angle_degrees": moved.largest_angle,
        "energy_kept": moved.energy_kept,
    }


def _last_basis(artifacts: ArtifactStore) -> tuple["Subspace", BasisHeader] | None:
    """The stored basis and its header; None if it is missing or damaged."""
    from scalselect_assets.method.subspace.basis import Subspace

    try:
        arrays, header = artifacts.read_arrays(BASIS)
        return Subspace.from_arrays(arrays), parse_basis_header(artifacts, header)
    except (ArtifactMissingError, ArtifactCorruptError, ValueError):
        return None
