"""The dominant subspace of a pool: the leading directions that a rank rule keeps.

ScalSelect's step 4 (arXiv 2602.11636). The paper takes the SVD of the centred matrix X; here the same
directions come from the eigenvectors of its scatter matrix XᵀX, which adds up shard by shard.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, eigh_tridiagonal, eigvalsh_tridiagonal, lapack

from scalselect_assets.method.subspace.moments import Moments, NonFiniteError, stored_array
from scalselect_assets.method.subspace.rank import DEFAULT_RANK_RULE, RankRule

# Products of different directions above this are no rounding.
_ORTHOGONAL = 1e-13


@dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """Mean, scale, leading directions and energies of n rows of width d.

    Attributes:
        n: Number of rows in the fit.
        mean: (d,) float64.
        scale: (d,) float64, the divisors of the centred columns; all ones unless standardised.
        directions: (d, k) float64, orthonormal columns, strongest first; in each, the component of largest
            magnitude is positive.
        singular_values: (k,) float64, those of the centred and scaled matrix, descending.
        spectrum: (rank,) float64, all squared singular values that are not zero numerically, descending.
    """

    n: int
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
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
    def whitening(self) -> NDArray[np.float64]:
        """The matrix that maps a centred row to its row of U_k, (d, k) float64, computed at each access.

        The leverage of a row x is ‖(x - mean) · whitening‖².
        """
        return self.directions / self.scale[:, None] / self.singular_values

    @property
    def energy(self) -> float:
        """Share of the total energy that the k directions hold; 0.0 where there is no energy."""
        return float(self.energy_curve()[self.k - 1]) if self.k else 0.0

    def energy_curve(self) -> NDArray[np.float64]:
        """The share of the total energy held by the first 1, 2, ..., rank directions, (rank,) float64."""
        return _energy_curve(self.spectrum)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays to store, named as the attributes, C-contiguous; ``n`` is () int64."""
        return {
            "n": np.array(self.n, dtype=np.int64),
            "mean": self.mean,
            "scale": self.scale,
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
        scale = stored_array(arrays, "scale", (len(mean),), np.float64)
        singular_values = stored_array(arrays, "singular_values", (None,), np.float64)
        spectrum = stored_array(arrays, "spectrum", (None,), np.float64)
        directions = stored_array(arrays, "directions", (len(mean), len(singular_values)), np.float64)
        if len(spectrum) < len(singular_values):
            raise ValueError(
                f"Got {len(spectrum)} energies for {len(singular_values)} directions; expected at least one "
                "each. Materialize the artifact again."
            )
        return cls(int(n), mean, scale, directions, singular_values, spectrum)


@dataclass(frozen=True, slots=True, eq=False)
class PrincipalAxes:
    """All energies of a pool, and a factorisation that gives any number of its leading directions.

    It holds one (d, d) float64 matrix.

    Attributes:
        n: Number of rows in the fit.
        mean: (d,) float64.
        scale: (d,) float64, the divisors of the centred columns.
        spectrum: (rank,) float64, all squared singular values that are not zero numerically, descending.
        diagonal: (d,) float64, of the tridiagonal form T = QᵀSQ of the scatter matrix S.
        off_diagonal: (d - 1,) float64, of T.
        reflectors: (d, d) float64 in Fortran order; below the subdiagonal, the Householder vectors of Q.
        reflector_weights: (d - 1,) float64, LAPACK's tau.
    """

    n: int
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    spectrum: NDArray[np.float64]
    diagonal: NDArray[np.float64]
    off_diagonal: NDArray[np.float64]
    reflectors: NDArray[np.float64]
    reflector_weights: NDArray[np.float64]

    @property
    def d(self) -> int:
        """Width of the rows."""
        return len(self.mean)

    @property
    def rank(self) -> int:
        """Numerical rank of the centred matrix."""
        return len(self.spectrum)

    def energy_curve(self) -> NDArray[np.float64]:
        """See ``Subspace.energy_curve``."""
        return _energy_curve(self.spectrum)

    def subspace(self, k: int) -> Subspace:
        """The k leading directions, in O(d²·k) time and O(d·k) memory.

        Args:
            k: 0 to ``rank``.

        Raises:
            ValueError: ``k`` is outside that range.
        """
        if not 0 <= k <= self.rank:
            raise ValueError(
                f"Got {k} directions; allowed is 0 to {self.rank}, the numerical rank of these {self.n} "
                "rows. Ask for fewer, or take k from a rank rule."
            )
        # Copied to C order: safetensors stores other strides as if they were that, silently.
        directions = np.ascontiguousarray(self._eigenvectors(k)[:, ::-1])
        largest = np.abs(directions).argmax(axis=0)
        directions *= np.where(directions[largest, np.arange(k)] < 0, -1.0, 1.0)
        energies = self.spectrum
        return Subspace(self.n, self.mean, self.scale, directions, np.sqrt(energies[:k]), energies)

    def _eigenvectors(self, k: int) -> NDArray[np.float64]:
        """The eigenvectors of the k largest eigenvalues, weakest first, (d, k)."""
        d = self.d
        if k == 0:
            return np.empty((d, 0))
        vectors = self._tridiagonal_eigenvectors(k)
        if d > 1:
            # Q leaves the first component alone. Its vectors lie one row further down than those of the QR
            # factorisation that dormqr expects; reading the same memory one number further on moves them
            # up without a copy, and puts what dormqr does not read into the last row.
            flat = self.reflectors.ravel(order="K")
            shifted = flat[1 : 1 + d * (d - 1)].reshape((d, d - 1), order="F")
            rest = np.asfortranarray(vectors[1:])
            _, work, _ = lapack.dormqr("L", "N", shifted, self.reflector_weights, rest, -1)
            rest, _, info = lapack.dormqr(
                "L", "N", shifted, self.reflector_weights, rest, int(work[0]), overwrite_c=1
            )
            _check("dormqr", info)
            vectors[1:] = rest
        return vectors

    def _tridiagonal_eigenvectors(self, k: int) -> NDArray[np.float64]:
        """The eigenvectors of the k largest eigenvalues of T, ascending, (d, k); always orthonormal."""
        d = self.d
        vectors: NDArray[np.float64]
        try:
            _, vectors = eigh_tridiagonal(
                self.diagonal,
                self.off_diagonal,
                select="i",
                select_range=(d - k, d - 1),
                lapack_driver="stemr",
            )
        except LinAlgError:
            # Where many energies are equal but for rounding, MRRR may not converge. QR does, for all at once.
            _, vectors = eigh_tridiagonal(self.diagonal, self.off_diagonal, lapack_driver="stev")
            vectors = np.asfortranarray(vectors[:, d - k :])
        # For the same reason its vectors may not be orthogonal; one step of Newton and Schulz makes them so.
        excess = vectors.T @ vectors
        excess[np.diag_indices(k)] -= 1.0
        if np.abs(excess).max() > _ORTHOGONAL:
            vectors -= vectors @ (0.5 * excess)
        return vectors


def fit_subspace(
    moments: Moments, rule: RankRule = DEFAULT_RANK_RULE, *, standardise: bool = False
) -> Subspace:
    """The leading directions of a pool, as many as the rule says; see ``principal_axes`` for the cost.

    Rows without any energy (one row, or all identical) give k = 0 under every rule.

    Args:
        moments: Moments of the whole pool.
        rule: Chooses k from the energies.
        standardise: Whether columns are divided by their standard deviation.

    Raises:
        NonFiniteError: The scatter is not finite.
        ValueError: There are no rows, or the rule cannot judge this pool.
    """
    axes = principal_axes(moments, standardise=standardise)
    return axes.subspace(rule.rank(axes.spectrum, axes.n, axes.d))


def principal_axes(moments: Moments, *, standardise: bool = False) -> PrincipalAxes:
    """All energies of a pool, ready for the directions of any rank rule.

    The scatter matrix is reduced to tridiagonal form once; the eigenvalues come from that alone, and so do
    the leading eigenvectors when they are asked for: about half of the time of a full decomposition for the
    few directions that a pool usually keeps; all of them cost half as much again as a full one.

    The scatter squares the condition number of X: eigenvalues and directions are exact to about 1e-15 of the
    largest energy, so energies at most max(n, d) · 2.2e-16 of the largest count as zero, and there are never
    more than n - 1 others.

    Costs O(d³) time and one (d, d) float64 matrix, which the result holds.

    Args:
        moments: Moments of the whole pool.
        standardise: Whether columns are divided by their population standard deviation, so that directions
            are those of the correlation matrix and no outlier dimension rules them. A column that never
            varies keeps scale 1, as in scikit-learn's ``StandardScaler``.

    Raises:
        NonFiniteError: The scatter is not finite.
        ValueError: There are no rows.
        numpy.linalg.LinAlgError: LAPACK found no eigenvalues.
    """
    n, d = moments.n, moments.d
    if n == 0:
        raise ValueError(
            "Got moments of 0 rows; a subspace needs at least 1. Embed at least one shard first."
        )
    if not np.isfinite(moments.scatter_upper).all():
        raise NonFiniteError(
            "Got a scatter matrix with NaN or infinite entries; only finite ones are allowed. Compute the "
            "moments again; rows with values above 1e150 overflow when squared and must be rejected."
        )

    scatter = moments.scatter()
    scale = np.ones(d)
    if standardise:
        scale = _column_scales(scatter.diagonal() / n, n, moments.mean)
        scatter /= scale[:, None]
        scatter /= scale

    # The transpose of the symmetric matrix has the memory order that LAPACK overwrites without a copy.
    work, _ = lapack.dsytrd_lwork(d, lower=1)
    reflectors, diagonal, off_diagonal, weights, info = lapack.dsytrd(
        scatter.T, lower=1, lwork=int(work), overwrite_a=1
    )
    _check("dsytrd", info)

    energies = eigvalsh_tridiagonal(diagonal, off_diagonal, lapack_driver="sterf")[::-1]
    rounding = max(n, d) * np.finfo(np.float64).eps * energies[0]
    rank = min(int(np.count_nonzero(energies > rounding)), n - 1)
    return PrincipalAxes(
        n, moments.mean, scale, energies[:rank].copy(), diagonal, off_diagonal, reflectors, weights
    )


def _energy_curve(spectrum: NDArray[np.float64]) -> NDArray[np.float64]:
    held: NDArray[np.float64] = np.cumsum(spectrum)
    return held / held[-1] if len(held) else held


def _column_scales(variance: NDArray[np.float64], n: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard deviations, with 1 for every column whose variance is 0 but for rounding of its mean."""
    constant = variance <= np.square(n * np.finfo(np.float64).eps * mean)
    scales: NDArray[np.float64] = np.sqrt(np.where(constant, 1.0, variance))
    return scales


def _check(routine: str, info: int) -> None:
    if info != 0:
        raise np.linalg.LinAlgError(
            f"Got info {info} from LAPACK's {routine}; expected 0. Report this with the moments that "
            "caused it."
        )
