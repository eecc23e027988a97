"""Pools of candidates whose groups are known."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.candidates import Candidates, Labels


def candidates(
    leverage: Sequence[float] | NDArray[np.float64],
    *,
    text: Sequence[int] | None = None,
    image: Sequence[int] | None = None,
    tie_order: Sequence[int] | NDArray[np.int64] | None = None,
    **labels: Sequence[str],
) -> Candidates:
    n = len(leverage)
    return Candidates(
        np.array(leverage, dtype=np.float64),
        np.arange(n) if tie_order is None else np.array(tie_order, dtype=np.int64),
        np.ones(n, dtype=np.int64) if text is None else np.array(text, dtype=np.int64),
        np.ones(n, dtype=np.int64) if image is None else np.array(image, dtype=np.int64),
        {name: Labels.of(values) for name, values in labels.items()},
    )


def whitened(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of the same span whose Gram matrix is the identity."""
    left, strengths, _ = np.linalg.svd(z, full_matrices=False)
    kept = strengths > strengths[0] * 1e-10
    return left[:, kept]


def of_rows(u: NDArray[np.float64], **labels: Sequence[str]) -> Candidates:
    """The candidates that belong to rows of U_k."""
    return candidates(np.square(u).sum(axis=1) * len(u) / u.shape[1], **labels)


def blocks_of(u: NDArray[np.float64], rows: int = 64) -> Callable[[], Iterator[NDArray[np.float64]]]:
    return lambda: (u[start : start + rows] for start in range(0, len(u), rows))


def planted(
    sizes: Sequence[int], k: int, seed: int = 0, noise: float = 1e-3
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Near-duplicates of as many directions as there are sizes: rows of U_k (n, k), and their groups (n,)."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    directions = rng.normal(size=(len(sizes), k))
    return whitened(directions[groups] + noise * rng.normal(size=(len(groups), k))), groups
