"""The charts, as a picture for Dagster's UI or as SVG that takes its colours from the page.

The colours are blue and orange of Okabe and Ito's palette, which people with any common colour blindness
can distinguish; no chart relies on colour alone.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import ceil, floor, inf, log2
from typing import TYPE_CHECKING, Final, TypeAlias
from xml.dom import minidom

from scalselect_assets.charts.chart_data import EnergyCurve, LeverageProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 420, 250
"""Size in CSS pixels. A phone shows a chart at four fifths of it, where its text is still readable."""

_POINTS_PER_INCH = 72.0  # the unit of matplotlib's SVG
_TEXT_SIZE = 12.5
_REFERENCE = re.compile(r"url\(#([^)]*)\)")


@dataclass(frozen=True, slots=True)
class Palette:
    """A colour for each role."""

    ink: str
    grid: str
    series: str
    rest: str
    mark: str


PRINTED: Final = Palette(ink="#24292f", grid="#d0d7de", series="#0072b2", rest="#a7b1ba", mark="#c4500a")
"""Colours of pictures, on a white ground."""

# Colours that no chart uses otherwise; in the SVG the page's variable for the role replaces each of them.
_STANDING_IN: Final = Palette(ink="#010203", grid="#010204", series="#010205", rest="#010206", mark="#010207")

Draw: TypeAlias = Callable[["Axes", Palette], None]


def energy_chart(curve: EnergyCurve) -> Draw:
    """Cumulative energy by number of directions, with k marked."""

    def draw(axes: "Axes", palette: Palette) -> None:
        steps = "steps-post" if len(curve.directions) < 50 else "default"
        axes.plot(curve.directions, curve.energy, color=palette.series, drawstyle=steps, linewidth=2)
        axes.axvline(curve.k, color=palette.mark, linestyle="--", linewidth=1.2)
        axes.plot([curve.k], [curve.k_energy], "o", color=palette.mark)
        axes.annotate(
            f"k = {curve.k:,}\n{curve.k_energy:.1%}",
            (curve.k, curve.k_energy),
            xytext=(8, -10) if curve.k < 0.7 * curve.rank else (-8, -10),
            textcoords="offset points",
            verticalalignment="top",
            horizontalalignment="left" if curve.k < 0.7 * curve.rank else "right",
            color=palette.ink,
        )
        axes.set(xlabel="directions", ylabel="share of the energy", ylim=(0, 1.05))
        axes.set_xlim(0, max(curve.rank, 1))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _whole_numbers(axes.xaxis)

    return draw


def leverage_chart(profile: LeverageProfile) -> Draw:
    """Samples by normalised leverage, the selected ones at the bottom of each bar."""

    def draw(axes: "Axes", palette: Palette) -> None:
        # A bin that begins at 0 or has no end is drawn as wide as the others.
        step = 2**0.25
        lows = [one.low or one.high / step for one in profile.bins]
        widths = [
            (one.high if one.high != inf else low * step) - low
            for one, low in zip(profile.bins, lows, strict=True)
        ]
        selected = [one.selected for one in profile.bins]
        others = [one.pool - one.selected for one in profile.bins]
        for counts, bottom, colour, label in (
            (selected, 0, palette.series, "selected"),
            (others, selected, palette.rest, "not selected"),
        ):
            axes.bar(lows, counts, widths, bottom, align="edge", linewidth=0, color=colour, label=label)
        axes.set_xscale("log", base=2)
        if profile.cut:
            axes.axvline(profile.cut, color=palette.mark, linestyle="--", linewidth=1.2, label="budget")
        axes.set(xlabel="normalised leverage (mean 1)", ylabel="samples")
        _powers_of_two(axes, "x", lows[0], lows[-1] + widths[-1])
        _whole_numbers(axes.yaxis)
        _legend(axes, palette)

    return draw


def rank_chart(profile: LeverageProfile, selected: int) -> Draw:
    """Normalised leverage by rank, with the budget marked if it alone cut the ranking."""

    def draw(axes: "Axes", palette: Palette) -> None:
        axes.plot(profile.ranks, profile.values, color=palette.series, linewidth=2, label="samples")
        axes.axhline(1, color=palette.ink, linewidth=1, linestyle=":", label="mean")
        if profile.cut is not None:
            axes.axvline(selected, color=palette.mark, linestyle="--", linewidth=1.2, label="budget")
        axes.set_yscale("log", base=2)
        axes.set(xlabel="rank", ylabel="normalised leverage")
        axes.set_xlim(0, profile.ranks[-1])
        _powers_of_two(axes, "y", min(*profile.values, 1.0), max(*profile.values, 1.0))
        _whole_numbers(axes.xaxis)
        _legend(axes, palette)

    return draw


def png(draw: Draw) -> bytes:
    """A chart as a picture on a white ground, for places that cannot pass their colours to it."""
    figure = _drawn(draw, PRINTED)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=140, metadata={"Software": None})
    return picture.getvalue()


def themed_svg(draw: Draw, name: str, label: str) -> str:
    """A chart as an SVG element for an HTML page, the same bytes every time.

    Its colours are the page's CSS variables ``--ink``, ``--grid``, ``--series``, ``--rest`` and ``--mark``,
    and its text is text, in the page's font. Its ids begin with ``name``, so that several charts can be in
    one page.

    Args:
        draw: The chart.
        name: Name of the chart: letters, digits and hyphens.
        label: Description of the chart in words, for people who cannot see it.
    """
    import matplotlib as mpl

    # By default matplotlib salts ids at random and draws text as outlines.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure, written = _drawn(draw, _STANDING_IN), io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue(), name, label)


def _drawn(draw: Draw, palette: Palette) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / _POINTS_PER_INCH, HEIGHT / _POINTS_PER_INCH), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, palette)
    axes.set_axisbelow(True)
    axes.grid(color=palette.grid, linewidth=0.8)
    axes.tick_params(colors=palette.ink, labelsize=_TEXT_SIZE, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label, *axes.texts):
        label.set(color=palette.ink, fontsize=_TEXT_SIZE)
    for side, spine in axes.spines.items():
        spine.set(color=palette.ink, visible=side in ("left", "bottom"))
    return figure


def _whole_numbers(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _legend(axes: "Axes", palette: Palette) -> None:
    axes.legend(frameon=False, labelcolor=palette.ink, fontsize=_TEXT_SIZE - 1, loc="best", handlelength=1.4)


def _powers_of_two(axes: "Axes", side: str, low: float, high: float) -> None:
    """Ticks at powers of two, seven at most, written as plain numbers."""
    first, last = ceil(log2(low)), floor(log2(high))
    stride = max(1, ceil((last - first + 1) / 7))
    # Counted from 1, the mean, in both directions.
    powers = [power for power in range(first, last + 1) if power % stride == 0]
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_ticks([2.0**power for power in powers], labels=[f"{2.0**power:.3g}" for power in powers])
    axis.set_ticks([], minor=True)


def _inline(svg: str, name: str, label: str) -> str:
    """The part of matplotlib's file that a page needs, with unique ids and in the page's colours."""
    document = minidom.parseString(svg)  # noqa: S318 - matplotlib's own output
    root = document.documentElement
    if root is None:
        raise ValueError("matplotlib wrote an SVG file without an element")
    for tag in ("metadata", "style"):
        for element in root.getElementsByTagName(tag):
            if element.parentNode is not None:
                element.parentNode.removeChild(element)
    for attribute in ("width", "height", "version", "xmlns", "xmlns:xlink"):
        root.removeAttribute(attribute)
    elements = root.getElementsByTagName("*")
    referred = {
        reference
        for element in elements
        for value in _values(element, ("clip-path", "xlink:href"))
        for reference in (*_REFERENCE.findall(value), value.removeprefix("#"))
    }
    for element in elements:
        if element.hasAttribute("id"):
            kept = element.getAttribute("id") in referred
            (_prefix if kept else _without)(element, "id", name)
        if element.hasAttribute("clip-path"):
            clip = _REFERENCE.sub(rf"url(#{name}-\1)", element.getAttribute("clip-path"))
            element.setAttribute("clip-path", clip)
        if element.hasAttribute("xlink:href"):
            element.setAttribute("href", f"#{name}-{element.getAttribute('xlink:href').removeprefix('#')}")
            element.removeAttribute("xlink:href")
        if element.hasAttribute("style"):
            element.setAttribute("style", _themed(element.getAttribute("style")))
    root.setAttribute("role", "img")
    root.setAttribute("aria-label", label)
    return re.sub(r">\s+<", "><", root.toxml())


def _values(element: minidom.Element, attributes: Sequence[str]) -> list[str]:
    return [element.getAttribute(name) for name in attributes if element.hasAttribute(name)]


def _prefix(element: minidom.Element, attribute: str, name: str) -> None:
    element.setAttribute(attribute, f"{name}-{element.getAttribute(attribute)}")


def _without(element: minidom.Element, attribute: str, _: str) -> None:
    element.removeAttribute(attribute)


def _themed(style: str) -> str:
    """A style attribute in the page's colours and font."""
    declarations = [part.strip() for part in style.split(";")]
    kept = "; ".join(part for part in declarations if part and not part.startswith("font-family"))
    for role in fields(Palette):
        kept = kept.replace(getattr(_STANDING_IN, role.name), f"var(--{role.name})")
    return kept
