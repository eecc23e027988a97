"""The dominant subspace of a pool: the fewest directions that hold a given share of its energy.

ScalSelect's step 4 (arXiv 2602.11636). The paper takes the SVD of the centred matrix X; here the same
directions come from the eigenvectors of its scatter matrix XᵀX, which adds up shard by shard.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.moments import Moments, NonFiniteError, stored_array

# arXiv 2602.11636: the subspace explains 90 % of the energy.
DEFAULT_ENERGY_THRESHOLD = 0.9

# An energy share that equals the threshold on paper may lie some roundings on either side of it; a pool must
# not gain a direction by the order in which its shards were added.
_TIE_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """Mean, leading directions and energies of n rows of width d.

    Attributes:
        n: Number of rows in the fit.
        mean: (d,) float64.
        directions: (d, k) float64, orthonormal columns, strongest first; in each, the component of largest
            magnitude is positive.
        singular_values: (k,) float64, those of the centred matrix, descending.
        spectrum: (rank,) float64, all squared singular values that are not zero numerically, descending.
    """

    n: int
    mean: NDArray[np.float64]
    directions: NDArray[np.float64]
    singular_values: NDArray[np.float64]
    spectrum: NDArray[np.float64]

    @property
    def d(self) -> int:
        """Width of the rows."""
        return len(self.mean)

    @property
    def k(self) -> int:
        """Number of directions kept."""
        return len(self.singular_values)

    @property
    def rank(self) -> int:
        """Numerical rank of the centred matrix."""
        return len(self.spectrum)

    @property
    def energy(self) -> float:
        """Share of the total energy that the k directions hold; 0.0 where there is no energy."""
        return float(self.energy_curve()[self.k - 1]) if self.k else 0.0

    def energy_curve(self) -> NDArray[np.float64]:
        """The share of the total energy held by the first 1, 2, ..., rank directions, (rank,) float64."""
        held = np.cumsum(self.spectrum)
        return held / held[-1] if self.rank else held

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays to store, named as the attributes, C-contiguous; ``n`` is () int64."""
        return {
            "n": np.array(self.n, dtype=np.int64),
            "mean": self.mean,
            "directions": self.directions,
            "singular_values": self.singular_values,
            "spectrum": self.spectrum,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Subspace":
        """Inverse of ``to_arrays``.

        Raises:
            ValueError: An array is missing, or has another shape or dtype than ``to_arrays`` gives it.
        """
        n = stored_array(arrays, "n", (), np.int64)
        mean = stored_array(arrays, "mean", (None,), np.float64)
        singular_values = stored_array(arrays, "singular_values", (None,), np.float64)
        spectrum = stored_array(arrays, "spectrum", (None,), np.float64)
        directions = stored_array(arrays, "directions", (len(mean), len(singular_values)), np.float64)
        if len(spectrum) < len(singular_values):
            raise ValueError(
                f"Got {len(spectrum)} energies for {len(singular_values)} directions; expected at least one "
                "each. Materialize the artifact again."
            )
        return cls(int(n), mean, directions, singular_values, spectrum)


def fit_subspace(moments: Moments, energy_threshold: float = DEFAULT_ENERGY_THRESHOLD) -> Subspace:
    """The fewest leading directions whose energy share reaches the threshold.

    k is the first count (from 1) whose cumulative share of Σs² is at least ``energy_threshold``, the
    published ``searchsorted(cumulative, threshold) + 1``, never above the numerical rank. A threshold of 1.0
    gives the rank. Rows without any energy (one row, or all identical) give k = 0.

    The scatter squares the condition number of X, which is harmless below a threshold of 1: the last kept
    direction and the at most d - k after it hold over 1 - threshold of the energy, so every kept direction
    holds at least (1 - threshold) / d of it, far above the rounding of the eigenvalues. At a threshold of
    1 the weakest directions have no such floor and their scores lose digits; energies at most
    max(n, d) · 2.2e-16 of the largest count as zero.

    Costs O(d³) time and a few (d, d) float64 matrices of memory.

    Args:
        moments: Moments of the whole pool.
        energy_threshold: Share in (0, 1].

    Raises:
        NonFiniteError: The scatter is not finite.
        ValueError: There are no rows, or the threshold is outside (0, 1].
    """
    if not 0 < energy_threshold <= 1:
        raise ValueError(
            f"Got energy threshold {energy_threshold}; allowed is above 0 and at most 1. "
            f"The paper uses {DEFAULT_ENERGY_THRESHOLD}."
        )
    if moments.n == 0:
        raise ValueError(
            "Got moments of 0 rows; a subspace needs at least 1. Embed at least one shard first."
        )
    if not np.isfinite(moments.scatter).all():
        raise NonFiniteError(
            "Got a scatter matrix with NaN or infinite entries; only finite ones are allowed. Compute the "
            "moments again; rows with values above 1e150 overflow when squared and must be rejected."
        )

    eigenvalues, eigenvectors = np.linalg.eigh(moments.scatter)
    energies = eigenvalues[::-1]
    rounding = max(moments.n, moments.d) * np.finfo(np.float64).eps * energies[0]
    rank = min(int(np.count_nonzero(energies > rounding)), moments.n - 1)
    spectrum = energies[:rank].copy()

    # Summed from the small end: what is left after the last direction is exactly zero, so a threshold of 1
    # needs no special case.
    held_from = np.cumsum(spectrum[::-1])[::-1]
    left_after = np.append(held_from[1:], 0.0)
    allowed_left = (1 - energy_threshold) * spectrum.sum() * (1 + _TIE_TOLERANCE)
    k = min(int(np.argmax(left_after <= allowed_left)) + 1, rank)

    # Copied to C order: safetensors stores other strides as if they were that, silently.
    directions = np.ascontiguousarray(eigenvectors[:, ::-1][:, :k])
    largest = np.abs(directions).argmax(axis=0)
    directions *= np.where(directions[largest, np.arange(k)] < 0, -1.0, 1.0)
    return Subspace(moments.n, moments.mean, directions, np.sqrt(spectrum[:k]), spectrum)
