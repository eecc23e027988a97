"""A report with something in every section, much of it hostile."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from scalselect_assets.charts.chart_data import Churn, EnergyCurve, LeverageProfile
from scalselect_assets.report.content import (
    ComparedStrategy,
    Counts,
    Fact,
    Gallery,
    GalleryItem,
    Measure,
    Picture,
    RejectedReason,
    ReportContent,
    SourceCounts,
    StrategyTable,
)
from scalselect_assets.report.distribution import LeverageCounts
from scalselect_assets.report.pictures import thumbnail

SCRIPT = '<script>alert("pool")</script><img src="http://evil.example/x" onerror="alert(1)">'
ATTRIBUTE = '" onmouseover="alert(1)" style="background:url(http://evil.example)\' autofocus'
TEMPLATE = "{{ content.title }} {% raw %} {# comment #}"
HOSTILE = (
    SCRIPT,
    ATTRIBUTE,
    TEMPLATE,
    "</td></table></main></html>",
    "&lt;b&gt; &amp; <!-- ",
    "שאלה: מה רואים בתמונה? \u202eoverride",
    "请问这张图片里一共有多少个红色的圆形?",
    "👩‍👩‍👧‍👦 🏳️‍🌈 how many?",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 6,
)


def picture(seed: int, alt: str = "Image 1 of 1", size: tuple[int, int] = (640, 480)) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return thumbnail(buffer.getvalue(), alt)


def item(rank: int, question: str, **more: Any) -> GalleryItem:
    values: dict[str, Any] = {
        "sample_key": f"{rank:032x}",
        "place": f"shard-{rank % 3}.jsonl#{rank}",
        "source_id": f"id-{rank}",
        "source": "counting",
        "question": question,
        "answer": "Two.",
        "leverage": 0.5 / rank,
        "normalised_leverage": 20 / rank,
        "rank": rank,
        "percentile": 100 * (1000 - rank) / 999,
        "is_selected": rank <= 160,
        "pictures": (picture(rank),),
    }
    return GalleryItem(**{**values, **more})


def profile(n: int = 1000, n_selected: int = 160) -> LeverageProfile:
    scores = np.sort(np.random.default_rng(0).lognormal(-0.5, 1.0, n))
    pool, selected = LeverageCounts(), LeverageCounts()
    pool.add(scores)
    selected.add(scores[-n_selected:])
    ranks, values = pool.rank_curve()
    share = float(scores[-n_selected:].sum() / scores.sum())
    return LeverageProfile(pool.bins(selected), ranks, values, float(scores[-n_selected]), share)


def full_content() -> ReportContent:
    directions = tuple(range(129))
    energy = tuple(1 - float(np.exp(-one / 20)) for one in directions)
    gone = Picture("Image 1 of 1 of row 7", problem=f"image {SCRIPT} does not exist; add the file")
    hostile = tuple(
        item(rank, text, answer=text, source=text, source_id=text, place=text, note=text)
        for rank, text in enumerate(HOSTILE, start=1)
    )
    return ReportContent(
        title=f"Selection report: {SCRIPT}",
        made_from=(Fact("basis version", "36a19911b635d7f0b5cbd99e86953035"), Fact("model", ATTRIBUTE)),
        settings=(Fact("budget", "0.16"), Fact("source", "/pool/" + "very-long-folder-name/" * 12)),
        counts=Counts(1020, 1000, 20, 160),
        energy=EnergyCurve(directions, energy, 46, energy[46], 128, 4096, "energy 0.9"),
        leverage=profile(),
        composition=(
            SourceCounts("llava_instruct", 600, 590, 60),
            *(SourceCounts(text, 40, 40, 10) for text in HOSTILE),
            SourceCounts("ocr_vqa", 60, 50, 10),
        ),
        comparison=StrategyTable(
            (
                Measure("Leverage share", "The chosen rows' share of all leverage."),
                Measure("Energy captured", "The share of the dominant subspace's energy."),
                Measure("Near-duplicates", "Chosen rows with another chosen row near them."),
                Measure("Worst direction", "The smallest eigenvalue."),
            ),
            (
                ComparedStrategy("top_leverage", "", (0.52, 0.998, 0.124, 0.11), is_selection=True),
                ComparedStrategy("random", "0, 1, 2, 3, 4", (0.16, 0.934, 0.02, 0.87)),
                ComparedStrategy("longest_text", "", (0.21, 0.951, 0.041, None)),
                ComparedStrategy("spanning", "", (0.43, 1.0, 0.0, float("-inf"))),
            ),
            "Means over the seeds.",
        ),
        churn=Churn(131, 29, 24, 24 / 155),
        rejected=(
            RejectedReason("missing_image", 12, "the image is not there or cannot be read"),
            RejectedReason("malformed_row", 8, "not JSON, not an object, no turns, or no answer"),
        ),
        galleries=(
            Gallery("Highest leverage", "The samples on which the kept directions rest most.", hostile),
            Gallery(
                "Median leverage",
                "The samples nearest to the middle.",
                (
                    item(500, "What is this?", overlay=picture(99, "Attention over the image of row 500")),
                    item(501, "And these?", pictures=tuple(picture(one) for one in range(3))),
                    item(502, "Which one is it?", pictures=(picture(5, size=(200, 900)),)),
                ),
            ),
            Gallery("Lowest leverage", "Redundant.", (item(1000, "Gone?", pictures=(gone,)),)),
        ),
        manifest='{\n "note": "</code></pre><script>alert(2)</script>"\n}',
        manifest_note="Only the first 40 shards are shown.",
    )


def bare_content() -> ReportContent:
    """A report of a pool of equal samples, of which nothing is known beside."""
    counts = LeverageCounts()
    counts.add(np.zeros(3))
    return replace(
        full_content(),
        title="Selection report: bare",
        made_from=(),
        settings=(),
        counts=Counts(3, 3, 0, 1),
        energy=EnergyCurve((0,), (0.0,), 0, 0.0, 0, 16, "energy 0.9"),
        leverage=LeverageProfile(counts.bins(LeverageCounts()), (), (), None, 0.0),
        composition=(),
        comparison=None,
        churn=None,
        rejected=(),
        galleries=(Gallery("Highest leverage", "Those.", ()),),
        manifest="{}",
        manifest_note="",
    )
