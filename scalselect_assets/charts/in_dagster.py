"""Charts for the UI: pictures inside Markdown metadata, so that the page sends no requests."""

import base64
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np

from scalselect_assets.charts import captions, figures
from scalselect_assets.charts.chart_data import EnergyCurve

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace

_POINTS = 200  # of a curve; more cannot be distinguished


def picture(draw: figures.Draw, text: str) -> dg.MarkdownMetadataValue:
    """A chart, with its caption as text below it."""
    encoded = base64.b64encode(figures.png(draw)).decode()
    return dg.MetadataValue.md(f"![{text}](data:image/png;base64,{encoded})\n\n{text}.")


def energy_curve(subspace: "Subspace", rule: str) -> dg.MarkdownMetadataValue:
    """Cumulative energy by number of directions, with k marked."""
    return energy_picture(energy_points(subspace, rule))


def energy_picture(curve: EnergyCurve) -> dg.MarkdownMetadataValue:
    """The chart of an energy curve whose points are computed already."""
    return picture(figures.energy_chart(curve), captions.energy(curve))


def energy_points(subspace: "Subspace", rule: str) -> EnergyCurve:
    """The energy curve of a basis, thinned to some 200 points that include k and both ends.

    Args:
        subspace: The basis.
        rule: The rule that chose k, in words.
    """
    curve = np.concatenate([[0.0], subspace.energy_curve()])
    wanted = np.linspace(0, subspace.rank, _POINTS), np.linspace(0, subspace.k, _POINTS // 4)
    at = np.unique(np.concatenate([*wanted, [subspace.k]]).astype(np.int64))
    return EnergyCurve(
        tuple(int(directions) for directions in at),
        tuple(float(energy) for energy in curve[at]),
        subspace.k,
        subspace.energy,
        subspace.rank,
        subspace.d,
        rule,
    )
