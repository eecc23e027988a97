"""The input of a choice: one array per property of the pool's rows, and labels to set quotas by."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.subspace.basis import Subspace

_LEVEL = 2.0**-16
"""Relative: four steps of the rounding of scores."""

Blocks = Callable[[], Iterable[NDArray[Any]]]
"""Gives the same rows again at every call, in the order of the candidates, as (m, width) blocks, m >= 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """A label for every row, as a number.

    Attributes:
        codes: (n,) int64, positions in ``values``.
        values: The labels; sorted and distinct.

    Raises:
        ValueError: The values are not sorted and distinct, or a code is not a position in them.
    """

    codes: NDArray[np.int64]
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if list(self.values) != sorted(set(self.values)):
            raise ValueError(
                f"Got labels {list(self.values)[:10]}; they have to be sorted and distinct. Use Labels.of."
            )
        wrong = np.flatnonzero((self.codes < 0) | (self.codes >= len(self.values)))
        if wrong.size:
            raise ValueError(
                f"Got label code {self.codes[wrong[0]]} in row {wrong[0]} (counted from 0); allowed is 0 to "
                f"{len(self.values) - 1}. Give rows without a label a label of their own."
            )

    @classmethod
    def of(cls, labels: Iterable[str]) -> "Labels":
        """The labels of the rows, in their order."""
        of_rows = list(labels)
        values = tuple(sorted(set(of_rows)))
        code_of = {value: code for code, value in enumerate(values)}
        return cls(np.array([code_of[value] for value in of_rows], dtype=np.int64), values)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The rows of a pool. Every array has shape (n,); a row is its position in them.

    Attributes:
        normalised_leverage: float64, finite and >= 0; n·leverage/k, 1 on average over the pool.
        tie_order: int64, each of 0 to n - 1 once: the row's place when all are sorted by sample key, then
            shard. It breaks every tie, so that the order in which the rows are given does not.
        n_text_tokens: int64, >= 0.
        n_image_tokens: int64, >= 0.
        labels: Columns to set quotas by or to stratify by, by name.

    Raises:
        ValueError: There are no rows, an array has another shape or dtype, or a value is inadmissible.
    """

    normalised_leverage: NDArray[np.float64]
    tie_order: NDArray[np.int64]
    n_text_tokens: NDArray[np.int64]
    n_image_tokens: NDArray[np.int64]
    labels: Mapping[str, Labels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("Got 0 candidates; a choice needs at least 1. Embed and score a shard first.")
        for name, dtype in (
            ("normalised_leverage", np.float64),
            ("tie_order", np.int64),
            ("n_text_tokens", np.int64),
            ("n_image_tokens", np.int64),
        ):
            array = getattr(self, name)
            if array.shape != (self.n,) or array.dtype != dtype:
                raise ValueError(
                    f"Got {name} of shape {array.shape} and dtype {array.dtype}; expected ({self.n},) and "
                    f"{np.dtype(dtype)}. Give every candidate one."
                )
            wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
            if wrong.size:
                raise ValueError(
                    f"Got {name} {array[wrong[0]]} in row {wrong[0]} (counted from 0); allowed are finite "
                    "values from 0. Compute that row again."
                )
        if not (np.bincount(self.tie_order, minlength=self.n) == 1).all():
            raise ValueError(
                f"Got a tie order that is no order of {self.n} rows; expected each of 0 to {self.n - 1} "
                "once. Take the places of the rows when they are sorted by sample key, then shard."
            )
        for name, labels in self.labels.items():
            if labels.codes.shape != (self.n,):
                raise ValueError(
                    f"Got {labels.codes.shape[0]} labels of {name!r} for {self.n} candidates; give each one."
                )

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.normalised_leverage)

    def by(self, score: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """``rows``, highest score first, ties by ``tie_order``.

        Args:
            score: (n,) float64, without NaN.
            rows: (m,) int64.
        """
        ordered: NDArray[np.int64] = rows[np.lexsort((self.tie_order[rows], -score[rows]))]
        return ordered


def levelled(score: NDArray[np.float64], copies: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores in which all copies of a sample have the same score, the highest among them.

    Copies that were embedded apart have scores that differ by rounding; without this, rounding would decide
    which of them is chosen. Rows with the same number whose scores differ by more are different samples,
    and keep their scores.

    Args:
        score: (n,) float64, finite and >= 0, rounded by `leverage.ranked`.
        copies: (n,) int64, 0 to n - 1; rows that may be copies of each other have the same number.
    """
    highest = np.zeros(len(score))
    np.maximum.at(highest, copies, score)
    of_row = highest[copies]
    level: NDArray[np.float64] = np.where(score >= of_row * (1 - _LEVEL), of_row, score)
    return level


def projected(x: NDArray[Any], subspace: Subspace) -> NDArray[np.float64]:
    """The rows of U_k that belong to the rows ``x`` of the fitted pool, (m, k) float64; O(m·d·k) time.

    Over the whole pool their Gram matrix is the identity, and the squared length of each is its leverage.

    Args:
        x: (m, d) rows of any real dtype.
        subspace: Fitted on a pool that holds them. ``subspace.whitening`` is computed at each call, in
            O(d·k): pass blocks of many rows.
    """
    u: NDArray[np.float64] = (np.asarray(x, dtype=np.float64) - subspace.mean) @ subspace.whitening
    return u


def whole_stream(blocks: Blocks, n: int) -> Iterable[tuple[int, NDArray[np.float64]]]:
    """The blocks in float64, each with the row that it begins at; nothing is held but one block.

    Raises:
        ValueError: A block is no matrix, is not as wide as the one before, or holds a value that is not
            finite; or the blocks do not hold ``n`` rows together.
    """
    start, width = 0, -1
    for block in blocks():
        if block.ndim != 2 or width not in {-1, block.shape[1]}:
            raise ValueError(
                f"Got a block of shape {block.shape} at row {start} (counted from 0); expected (rows, "
                f"{'width' if width < 0 else width}). Project all rows with one subspace."
            )
        rows, width = np.asarray(block, dtype=np.float64), block.shape[1]
        if not np.isfinite(rows).all():
            row, column = np.argwhere(~np.isfinite(rows))[0]
            raise ValueError(
                f"Got {rows[row, column]} in row {start + row} (counted from 0), column {column}; only "
                "finite values are allowed. Embed that sample again."
            )
        if start + len(rows) <= n:
            yield start, rows
        start += len(rows)
    if start != n:
        raise ValueError(
            f"Got {start} rows in the blocks for {n} candidates; expected one each, in the same order, at "
            "every pass. Stream the rows that were scored."
        )
