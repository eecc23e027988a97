"""Charts for the UI: pictures inside Markdown metadata, so that nothing is requested from anywhere."""

import base64
import io
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np

if TYPE_CHECKING:
    from scalselect_assets.method.subspace import Subspace


def energy_curve(subspace: "Subspace", rule: str) -> dg.MarkdownMetadataValue:
    """Cumulative energy by number of directions, with k marked; the text beside it says the same."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    curve = np.concatenate([[0.0], subspace.energy_curve()])
    axes.plot(
        np.arange(len(curve)), curve, color="#1f6feb", drawstyle="steps-post" if len(curve) < 50 else None
    )
    axes.axvline(subspace.k, color="#d1242f", linestyle="--", linewidth=1)
    axes.plot([subspace.k], [subspace.energy], "o", color="#d1242f")
    axes.annotate(
        f"k = {subspace.k}\n{subspace.energy:.1%}",
        (subspace.k, subspace.energy),
        xytext=(8, -8),
        textcoords="offset points",
        verticalalignment="top",
    )
    axes.set(xlabel="directions", ylabel="share of the energy", ylim=(0, 1.05), title=rule)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    encoded = base64.b64encode(picture.getvalue()).decode()
    text = f"{subspace.k} of {subspace.rank} directions hold {subspace.energy:.2%} of the energy ({rule})"
    return dg.MetadataValue.md(f"![{text}](data:image/png;base64,{encoded})\n\n{text}.")
