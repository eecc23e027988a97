"""The loss curve for the UI: a picture inside Markdown metadata, so that the page sends no requests."""

import base64
import io
from collections.abc import Sequence

import dagster as dg


def loss_curve(losses: Sequence[tuple[int, float]], resumed_from: int) -> dg.MarkdownMetadataValue:
    """Training loss by optimizer step, with a mark where this run resumed from a checkpoint."""
    from matplotlib.figure import Figure

    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="#1f6feb", marker="o" if len(steps) < 50 else None, markersize=3)
    if resumed_from:
        axes.axvline(resumed_from, color="#d1242f", linestyle="--", linewidth=1, label="resumed here")
        axes.legend()
    axes.set(xlabel="optimizer step", ylabel="loss per answer token")
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    encoded = base64.b64encode(picture.getvalue()).decode()
    text = f"loss {values[0]:.3f} at step {steps[0]}, {values[-1]:.3f} at step {steps[-1]}"
    return dg.MetadataValue.md(f"![{text}](data:image/png;base64,{encoded})\n\n{text}.")
