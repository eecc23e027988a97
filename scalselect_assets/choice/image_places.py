"""Questions that stand before their image, and how far the basis and the choice follow that.

A model whose tokens see only what stands before them cannot look at an image from a question before it. Such
rows have vectors of another kind, and they may crowd the choice for that alone. Costs: the vectors of these
rows, or of all others where those are fewer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.choice.pool_rows import PoolRows

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace

CHECK: Final = "questions_follow_their_images"
COLUMN: Final = "asks_before_image"
_DIRECTIONS = 3  # the strongest ones
_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class ImagePlaces:
    """The places of images in a pool.

    Attributes:
        asked_before: Rows whose question stands wholly before its image in the prompt.
        embedded: All rows.
        asked_before_chosen: Rows of the first kind that are chosen.
        chosen: All rows that are chosen.
        unknown: Rows that were embedded by an earlier release, which did not record it.
        followed: Of the strongest directions, the share in [0, 1] of their variance that lies between the
            rows of the first kind and the others.
    """

    asked_before: int
    embedded: int
    asked_before_chosen: int
    chosen: int
    unknown: int
    followed: tuple[float, ...]

    def metadata(self) -> dict[str, int | float]:
        """Plain numbers for the UI."""
        return {
            "asked_before_image": self.asked_before,
            "asked_before_image_share": self.asked_before / self.embedded,
            "asked_before_image_share_of_choice": self.asked_before_chosen / max(1, self.chosen),
            **{
                f"direction_{number}_follows_image_place": share
                for number, share in enumerate(self.followed, start=1)
            },
        }

    def check(self) -> dg.AssetCheckResult:
        """A warning where any question stands before its image."""
        return dg.AssetCheckResult(
            check_name=CHECK,
            passed=not self.asked_before,
            severity=dg.AssetCheckSeverity.WARN,
            description="" if not self.asked_before else self._description(),
            metadata={**self.metadata(), "embedded": self.embedded, "unknown": self.unknown},
        )

    def _description(self) -> str:
        strongest = f"; {max(self.followed):.0%} of a strongest direction is that" if self.followed else ""
        return (
            f"in {self.asked_before:,} of {self.embedded:,} rows no question follows the last image, so that "
            f"none can attend to it; they are {self.asked_before_chosen:,} of the {self.chosen:,} that are "
            f"chosen{strongest}. Write the mark before the question, declare image_place: first, or leave "
            "them out"
        )


def image_places(
    rows: pl.DataFrame,
    chosen: NDArray[np.int64],
    pool: PoolRows,
    subspace: "Subspace",
    *,
    unit_rows: bool,
) -> ImagePlaces:
    """Count the rows of a pool by the place of their images, and compare the strongest directions with it.

    Args:
        rows: ``pool.all()``.
        chosen: Places of the chosen rows in it.
        pool: Reads the vectors.
        subspace: The basis.
        unit_rows: Whether the basis is of rows of unit length.
    """
    asks_before = rows[COLUMN].fill_null(value=False)
    n_before = int(asks_before.sum())
    followed: tuple[float, ...] = ()
    if 0 < n_before < rows.height and subspace.k:
        from scalselect_assets.method.subspace.directions import variance_between

        # Coordinates sum to zero over the pool: the sums of both kinds of rows differ in their sign only.
        fewer = rows.filter(asks_before if 2 * n_before <= rows.height else ~asks_before)
        total = _sum_of_coordinates(fewer, pool, subspace, unit_rows=unit_rows)
        followed = tuple(variance_between(total, n_before, rows.height).tolist())
    return ImagePlaces(
        asked_before=n_before,
        embedded=rows.height,
        asked_before_chosen=int(asks_before.gather(chosen).sum()),
        chosen=len(chosen),
        unknown=rows[COLUMN].null_count(),
        followed=followed,
    )


def _sum_of_coordinates(
    rows: pl.DataFrame, pool: PoolRows, subspace: "Subspace", *, unit_rows: bool
) -> NDArray[np.float64]:
    """The sum of the rows' coordinates in the strongest directions."""
    from scalselect_assets.method.subspace.directions import coordinates
    from scalselect_assets.method.subspace.preprocessing import prepared_rows

    directions = np.arange(min(_DIRECTIONS, subspace.k))
    total = np.zeros(len(directions))
    for (shard,), part in rows.group_by("shard", maintain_order=True):
        table = pool.table(str(shard))
        for block in part.iter_slices(_BLOCK_ROWS):
            x = pool.embeddings.read_vectors(table, block["row"].to_list())
            x = prepared_rows(x, to_unit_length=unit_rows)
            total += coordinates(subspace, x, directions).sum(axis=0)
    return total
