"""Rows that the tests of several methods share."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def rows(n: int, d: int, seed: int = 0) -> NDArray[np.float64]:
    """Rows of full rank along no axis, about a mean that is not zero."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.geomspace(1, 0.05, d) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def with_outlier_dimensions(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """What hidden states look like: one wide dimension far from zero, one far from zero only."""
    x = x.copy()
    x[:, 1] = x[:, 1] * 1e3 + 1e4
    x[:, 2] += 1e6
    return x


@dataclass(frozen=True, slots=True, eq=False)
class VectorsInMemory:
    """The `near_duplicates.Vectors` of a matrix, compared exactly.

    Attributes:
        matrix: (n, d) float32 unit vectors.
    """

    matrix: NDArray[np.float32]

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Vectors`."""
        return self.matrix[positions]

    def near(
        self,
        queries: NDArray[np.float32],  # noqa: ARG002 - all rows are candidates
        cosine: float,  # noqa: ARG002
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """See `Vectors`."""
        yield np.arange(len(self.matrix)), self.matrix
