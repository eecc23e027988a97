"""Drift: the change of a pool's scores when its basis is fitted again.

It is computed from the two bases and the moments of the new pool alone, so no row has to be scored twice to
learn that nothing changed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.subspace.basis import Subspace
from scalselect_assets.method.subspace.moments import Moments


@dataclass(frozen=True, slots=True)
class Drift:
    """The differences between a new basis and an old one.

    Attributes:
        score_change: Bound on the mean absolute change, over the rows of the new pool, of the normalised
            score n/k · leverage, whose mean over its own pool is 1. 0 for equal bases.
        largest_angle: Largest of the min(k) principal angles between the two spans, in degrees. Each span is
            taken in its own standardised coordinates, where a change of a column's scale is no rotation.
        energy_kept: Share in [0, 1] of the energy of the new directions that lies in the old span; 1.0 where
            there are no new directions.
    """

    score_change: float
    largest_angle: float
    energy_kept: float


def basis_drift(old: Subspace, new: Subspace, moments: Moments) -> Drift:
    """The change of the new pool's scores from the old basis to the new one.

    The normalised score of a row x under a basis is the quadratic form (x - μ)ᵀP(x - μ) with P = (n/k)·WWᵀ
    and W its whitening. Let C be the new pool's covariance, y = x - μ_new, δ = μ_new - μ_old and
    D = P_new - P_old. Then the two scores differ by yᵀDy - 2·δᵀP_old·y - δᵀP_old·δ, and over the rows

    - mean|yᵀDy| <= tr|C^½ D C^½|, because y = C^½z where z has covariance 1 on its span, and
      |zᵀGz| <= zᵀ|G|z for symmetric G with absolute value |G|;
    - mean|δᵀP_old·y| <= √(δᵀP_old·C·P_old·δ), because a mean is at most the root of the mean square.

    ``score_change`` is the sum of these bounds. The trace norm in whitened coordinates is the least bound of
    its kind: tr|TᵀDT|T⁻¹CT⁻ᵀ, which holds for every invertible T, is never below it (T = 1 gives tr|D|C). It
    depends on no choice of units, so outlier dimensions cost it no digits. For pools of normal rows that grew
    by 0.1 to 100 % it was 2 to 10 times the true change, the more the more directions there were.

    An empty basis (k = 0) scores every row 0. Against a basis that is not empty its angles are 90 degrees;
    two empty bases have angles of 0.

    Costs O(d²·k_old + d·k_old·k_new + (k_old + k_new)³) time and one (d, d) float64 matrix.

    Args:
        old: The basis that scores were computed from.
        new: The basis that replaces it.
        moments: The moments that ``new`` was fitted on.

    Raises:
        ValueError: The dimensions differ, or the moments are not those of the new basis.
    """
    if not old.d == new.d == moments.d:
        raise ValueError(
            f"Got bases of dimensions {old.d} and {new.d} and moments of dimension {moments.d}; only equal "
            "dimensions can be compared. Embeddings of another model or layer have no drift: score the pool "
            "again."
        )
    # Moments merged in another order differ in their last digits.
    if moments.n != new.n or not np.allclose(moments.mean, new.mean, rtol=1e-9, atol=1e-9):
        raise ValueError(
            f"Got moments of {moments.n} rows that the new basis, of {new.n} rows, was not fitted on; "
            "allowed are its own. Fit the basis on these moments first."
        )
    angles = np.degrees(_principal_angles(old.directions, new.directions))
    return Drift(
        score_change=_score_change(old, new, moments),
        largest_angle=float(angles.max(initial=0.0)),
        energy_kept=_energy_kept(old, new),
    )


def _score_change(old: Subspace, new: Subspace, moments: Moments) -> float:
    """The bound that ``basis_drift`` derives.

    C^½W_new has orthogonal columns, which serve as the first coordinates of G = C^½ D C^½. The old whitening
    is split into its part along them and the rest before anything is squared: for bases that are nearly equal
    the rest is nearly zero, and a difference of Gram matrices would know only half of its digits.
    """
    old_white = old.whitening * np.sqrt(old.n / max(old.k, 1))
    new_white = new.whitening * np.sqrt(new.n)  # C^½ of this is orthonormal

    # W_newᵀC without a product with C: the directions are eigenvectors of the scaled C.
    dual = new.directions * new.scale[:, None] * (new.singular_values / np.sqrt(new.n))
    along = dual.T @ old_white
    rest = old_white - new_white @ along
    gram = rest.T @ (moments.scatter() @ rest) / moments.n
    variances, axes = np.linalg.eigh(gram)
    beside = np.sqrt(np.maximum(variances, 0.0))[:, None] * axes.T

    # C^½W_old in the coordinates C^½W_new and, after them, those of the rest.
    old_rows = np.concatenate([along, beside])
    change = -old_rows @ old_rows.T
    own = np.arange(new.k)
    change[own, own] += 1 / max(new.k, 1)
    reshaped = np.abs(np.linalg.eigvalsh(change)).sum()

    shift = old_white.T @ (new.mean - old.mean)
    return float(reshaped + 2 * np.linalg.norm(old_rows @ shift) + shift @ shift)


def _principal_angles(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The principal angles between the spans of orthonormal columns, (min(k),) in radians.

    From the sines, which tell small angles apart; cosines are 1 below 1e-8.
    """
    few, many = sorted((a, b), key=lambda columns: columns.shape[1])
    if few.shape[1] == 0:
        return np.full(min(many.shape[1], 1), np.pi / 2)
    outside = few - many @ (many.T @ few)
    sines = np.sqrt(np.clip(np.linalg.eigvalsh(outside.T @ outside), 0.0, 1.0))
    angles: NDArray[np.float64] = np.arcsin(sines)
    return angles


def _energy_kept(old: Subspace, new: Subspace) -> float:
    if new.k == 0:
        return 1.0
    energies = np.square(new.singular_values)
    inside = np.square(old.directions.T @ new.directions).sum(axis=0)
    return min(float(energies @ inside / energies.sum()), 1.0)
