"""Measures of a subset, however it was chosen: its span, its coverage and its repetition.

With at least k rows in general position every subset spans the whole dominant subspace exactly, so that the
share which it *contains* tells subsets apart below k rows only. Beyond k rows, they differ in how evenly
and strongly the directions are represented (`span_measures`), and how much of the pool's energy lies in the
directions that the subset, left to itself, would find dominant (`own_subspace_measures`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.candidates import Blocks, Labels, whole_stream
from scalselect_assets.method.subspace.basis import Subspace, principal_axes
from scalselect_assets.method.subspace.moments import Moments, check_same_dimension
from scalselect_assets.method.subspace.preprocessing import unit_rows

_COSINE_ROUNDING = 1e-9  # equal rows may have a cosine that much below 1
_QUERY_ROWS = 2048  # rows that are compared with a whole stream at once


@dataclass(frozen=True, slots=True)
class SpanMeasures:
    """The span of N chosen rows of U_k, by their Gram matrix G = Σ_S u uᵀ; the pool's is the identity.

    (n/N)·G is the identity for a subset that represents the pool in proportion, on average over random
    subsets. Its eigenvalues say how many times as strongly as in the pool a direction is represented.

    Attributes:
        leverage_share: tr G / k, the chosen rows' share of all leverage; in [0, 1], largest for top leverage.
        n_directions: Numerical rank of G, at most min(N, k).
        energy_contained: Share of the dominant subspace's energy Σ s_j² in directions that are combinations
            of the chosen rows, tr(P diag(s²)) / Σ s_j², where P projects on the span of their coordinates
            u_j·s_j in the basis of the subspace; in [0, 1], 1.0 once n_directions is k.
        smallest_eigenvalue: Smallest eigenvalue of (n/N)·G, that of the worst represented direction; 0.0 if a
            direction is missing.
        mean_log_eigenvalue: log det((n/N)·G) / k, the mean over directions; -inf where one is missing.
    """

    leverage_share: float
    n_directions: int
    energy_contained: float
    smallest_eigenvalue: float
    mean_log_eigenvalue: float


@dataclass(frozen=True, slots=True)
class OwnSubspaceMeasures:
    """The fit of the subset's own leading directions V_S (d, k) to the pool, whose scatter matrix is C.

    V_S are the right singular vectors of the subset's rows, centred on their own mean (and scaled as the
    pool's columns), as many as the pool's subspace has, or as the subset's rank if that is less. V are the
    pool's own.

    Attributes:
        energy_captured: tr(V_Sᵀ C V_S) / tr(Vᵀ C V), in [0, 1]: the share of the dominant subspace's energy
            in the directions that are dominant in the subset alone. 1.0 for the pool itself, and
            where the pool has no directions.
        projection_error: ‖X - X V_S V_Sᵀ‖ / ‖X‖ in Frobenius norms over the centred pool X: what is lost when
            the pool is projected on them; 0.0 where the pool has no energy.
    """

    energy_captured: float
    projection_error: float


def span_measures(
    projections: Blocks, chosen: NDArray[np.int64], n: int, singular_values: NDArray[np.float64]
) -> SpanMeasures:
    """The span of chosen rows of U_k; one pass, O(N·k² + k³) time, memory of a block and k × k matrices.

    Args:
        projections: The n rows of U_k (`candidates.projected`), in order.
        chosen: (N,) int64 distinct rows, N >= 1, in any order.
        n: Number of rows.
        singular_values: (k,) float64, of the subspace.

    Raises:
        ValueError: ``chosen`` is empty, repeats a row or names one that is not there; or the blocks are not n
            rows of width k.
    """
    mask, k = _chosen_mask(n, chosen), len(singular_values)
    gram = np.zeros((k, k))
    for start, u in whole_stream(projections, n):
        _check_width(u, k)
        rows = u[mask[start : start + len(u)]]
        gram += rows.T @ rows
    if k == 0:
        return SpanMeasures(0.0, 0, 1.0, 1.0, 0.0)
    eigenvalues = np.linalg.eigvalsh(gram) * (n / len(chosen))
    missing = eigenvalues <= eigenvalues[-1] * k * np.finfo(np.float64).eps
    complete = not missing.any()
    return SpanMeasures(
        leverage_share=float(np.trace(gram)) / k,
        n_directions=k - int(np.count_nonzero(missing)),
        energy_contained=1.0 if complete else _energy_contained(gram, singular_values),
        smallest_eigenvalue=float(eigenvalues[0]) if complete else 0.0,
        mean_log_eigenvalue=float(np.log(eigenvalues).mean()) if complete else -np.inf,
    )


def own_subspace_measures(pool: Moments, subset: Moments, subspace: Subspace) -> OwnSubspaceMeasures:
    """The fit of the subset's own leading directions to the pool; O(d³) time, some d × d matrices.

    Args:
        pool: Moments of all rows (prepared as for the subspace).
        subset: Moments of the chosen rows, made in the same way (`moments.MomentsAccumulator`); one pass over
            them, O(N·d²).
        subspace: Subspace of the pool; its k and its scale are used.

    Raises:
        ValueError: The dimensions differ, or the subset has no rows.
    """
    check_same_dimension(pool, subset)
    scale = subspace.scale
    own = principal_axes(_scaled(subset, scale))
    k = min(subspace.k, own.rank)
    directions = own.subspace(k).directions
    scatter = pool.scatter()
    total = float((scatter.diagonal() / np.square(scale)).sum())
    in_columns = directions / scale[:, None]
    captured = float(np.einsum("ij,ij->", in_columns, scatter @ in_columns))
    best = float(np.square(subspace.singular_values).sum())
    return OwnSubspaceMeasures(
        energy_captured=min(1.0, captured / best) if best else 1.0,
        projection_error=_root_of_rest(captured, total),
    )


def label_coverage(labels: Labels, chosen: NDArray[np.int64]) -> float:
    """The share of the pool's labels that have a chosen row; O(n).

    Args:
        labels: The labels of the pool's rows.
        chosen: (N,) int64 distinct rows, N >= 1.

    Raises:
        ValueError: ``chosen`` is empty, repeats a row or names one that is not there.
    """
    mask = _chosen_mask(len(labels.codes), chosen)
    n_covered, n_labels = (
        np.count_nonzero(np.bincount(codes)) for codes in (labels.codes[mask], labels.codes)
    )
    return float(n_covered / n_labels)


def near_duplicate_rate(
    rows: Blocks,
    n: int,
    *,
    threshold: float,
    exact_up_to: int = 20_000,
    sample: int = 2_000,
    seed: int = 0,
) -> float:
    """The share of the rows that have another row whose cosine with them reaches a threshold.

    Rows are compared as they are given: centre vectors before, since those of one model point much the same
    way. A row of zeros is near none. All n rows are examined up to ``exact_up_to``, beyond that a random
    sample of them, each against all n. n²·d multiplications, or sample·n·d; all rows are read twice for each
    2048 examined. Memory: 2048 rows and a block in float64, and the cosines between them.

    Args:
        rows: The chosen rows, in blocks of (m, d).
        n: Number of the rows, 1 or more.
        threshold: In (0, 1].
        exact_up_to: Number of rows up to which all are examined.
        sample: Number of rows that are examined of a longer stream; 1 or more.
        seed: Seed of the draw of these rows.

    Raises:
        ValueError: A number is out of range, or the blocks are not n rows.
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"Got cosine {threshold}; allowed is above 0 and at most 1. Near-duplicates have 0.95."
        )
    if n < 1 or sample < 1:
        raise ValueError(f"Got {n} rows and a sample of {sample}; allowed is 1 or more of each.")
    examined = np.arange(n)
    if n > max(exact_up_to, sample):
        examined = np.sort(np.random.default_rng(seed).choice(n, size=sample, replace=False))
    n_near = 0
    for first in range(0, len(examined), _QUERY_ROWS):
        n_near += _count_near(rows, n, examined[first : first + _QUERY_ROWS], threshold)
    return n_near / len(examined)


def shared_share(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """The share of the first choice's rows that the second holds, too; 1.0 where the first has none.

    Args:
        first: Positions of the rows in one pool; each once.
        second: Positions of the other choice's rows in the same pool; each once.

    Raises:
        ValueError: A choice names a row twice.
    """
    for name, positions in (("first", first), ("second", second)):
        if (n_distinct := len(np.unique(positions))) < len(positions):
            raise ValueError(
                f"Got {len(positions)} rows in the {name} choice, {n_distinct} of them distinct; each may be "
                "there once. Pass each position once."
            )
    return float(np.isin(first, second).mean()) if len(first) else 1.0


def _count_near(rows: Blocks, n: int, examined: NDArray[np.int64], threshold: float) -> int:
    """The number of examined rows with another row near them. The first of two passes collects them."""
    parts = []
    for start, x in whole_stream(rows, n):
        low, high = np.searchsorted(examined, [start, start + len(x)])
        parts.append(unit_rows(x[examined[low:high] - start]))
    queries = np.concatenate(parts)
    near = np.zeros(len(queries), dtype=bool)
    for start, x in whole_stream(rows, n):
        for first in range(0, len(x), _QUERY_ROWS):
            cosines = queries @ unit_rows(x[first : first + _QUERY_ROWS]).T
            here = examined - (start + first)
            inside = np.flatnonzero((here >= 0) & (here < cosines.shape[1]))
            cosines[inside, here[inside]] = -1.0
            near |= (cosines >= threshold - _COSINE_ROUNDING).any(axis=1)
    return int(np.count_nonzero(near))


def _energy_contained(gram: NDArray[np.float64], singular_values: NDArray[np.float64]) -> float:
    """tr(P diag(s²)) / Σ s², P the projection on the range of diag(s) G diag(s)."""
    k = len(singular_values)
    energies = np.square(singular_values)
    # The range of diag(s) G diag(s) is that of diag(s) times any basis of G's range, and G itself
    # separates the vectors of its range from rounding more safely.
    eigenvalues, vectors = np.linalg.eigh(gram)
    kept = eigenvalues > eigenvalues[-1] * k * np.finfo(np.float64).eps
    basis, _ = np.linalg.qr(singular_values[:, None] * vectors[:, kept])
    return float((np.square(basis).sum(axis=1) * energies).sum() / energies.sum())


def _scaled(moments: Moments, scale: NDArray[np.float64]) -> Moments:
    """The moments of the rows divided by ``scale`` by columns."""
    if (scale == 1.0).all():
        return moments
    scatter = moments.scatter() / scale[:, None] / scale
    return Moments(moments.n, moments.mean / scale, scatter[np.triu_indices(moments.d)])


def _root_of_rest(held: float, total: float) -> float:
    return float(np.sqrt(max(0.0, 1 - held / total))) if total else 0.0


def _chosen_mask(n: int, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(n, dtype=bool)
    inside = chosen[(chosen >= 0) & (chosen < n)]
    mask[inside] = True
    if not len(chosen) or np.count_nonzero(mask) < len(chosen):
        raise ValueError(
            f"Got {len(chosen)} chosen rows, {np.count_nonzero(mask)} of them distinct rows of {n}; "
            "expected one or more, each once. Pass positions in the pool."
        )
    return mask


def _check_width(u: NDArray[np.float64], k: int) -> None:
    if u.shape[1] != k:
        raise ValueError(
            f"Got projections of width {u.shape[1]} with {k} singular values; expected one each. Take both "
            "from one subspace."
        )
