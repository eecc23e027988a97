"""The report as one self-contained HTML page.

Everything is in the page: style, charts, pictures. It has no scripts, and its Content-Security-Policy
forbids them and every request, so that texts of the pool, which come from anywhere, can do nothing but be
read; they are escaped besides. It is for phones and for dark mode, too, and every chart has its numbers in a
table beside it.
"""

import base64
from functools import cache
from math import inf, isfinite
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scalselect_assets.charts import captions, figures
from scalselect_assets.charts.chart_data import EnergyCurve
from scalselect_assets.report.content import Picture, ReportContent

_TEMPLATE: Final = "report.html.jinja"
_TABLE_ROWS = 40  # of a chart's numbers; the chart shows the rest

# Neither HTML nor UTF-8 has these: control characters but tab and line feed, lone surrogates, noncharacters.
_UNPRINTABLE: Final = dict.fromkeys(
    (*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF),
    "\N{REPLACEMENT CHARACTER}",
)


def render(content: ReportContent) -> str:
    """The page, as text in UTF-8; equal contents give equal text."""
    page = _environment().get_template(_TEMPLATE)
    return page.render(
        content=content,
        energy_svg=_energy_svg(content.energy),
        leverage_svg=_leverage_svg(content),
        rank_svg=_rank_svg(content),
        energy_caption=captions.energy(content.energy),
        leverage_caption=captions.leverage(content.leverage, content.counts.selected),
        rank_caption=captions.ranks(content.leverage),
        churn_caption=None if content.churn is None else captions.churn(content.churn),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters |= {
        "count": _count,
        "share": _share,
        "number": _number,
        "data_uri": _data_uri,
        "thinned": _thinned,
    }
    return environment


def _printable(value: Any) -> Any:
    """The text that the page shows, with a mark in place of characters that a page cannot hold."""
    return value.translate(_UNPRINTABLE) if isinstance(value, str) else value


def _count(value: int) -> str:
    return f"{value:,}"


def _share(part: float, whole: float = 1.0) -> str:
    """A share in per cent; of nothing, there is none."""
    return f"{part / whole:.1%}" if whole else "–"


def _number(value: float | None) -> str:
    """Four digits that count; whole numbers whole."""
    if value is None:
        return "–"
    if not isfinite(value):
        return {inf: "∞", -inf: "−∞"}.get(value, "–")
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:,.4g}"


def _data_uri(picture: Picture) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture.data or b'').decode()}"


def _thinned(rows: list[Any], keep: Any = None) -> list[Any]:
    """At most some 40 of a chart's rows: evenly spread, with the first, the last and ``keep``."""
    if len(rows) <= _TABLE_ROWS:
        return rows
    step = (len(rows) - 1) / (_TABLE_ROWS - 1)
    wanted = {round(index * step) for index in range(_TABLE_ROWS)}
    return [row for index, row in enumerate(rows) if index in wanted or (keep is not None and row[0] == keep)]


def _energy_svg(curve: EnergyCurve) -> Markup | None:
    if not curve.rank:
        return None
    return _chart(figures.energy_chart(curve), "energy", captions.energy(curve))


def _leverage_svg(content: ReportContent) -> Markup | None:
    if not any(one.low for one in content.leverage.bins):
        return None
    label = captions.leverage(content.leverage, content.counts.selected)
    return _chart(figures.leverage_chart(content.leverage), "leverage", label)


def _rank_svg(content: ReportContent) -> Markup | None:
    if not content.leverage.ranks:
        return None
    draw = figures.rank_chart(content.leverage, content.counts.selected)
    return _chart(draw, "rank", captions.ranks(content.leverage))


def _chart(draw: figures.Draw, name: str, label: str) -> Markup:
    return Markup(figures.themed_svg(draw, name, label))  # noqa: S704 - made of numbers, by us
