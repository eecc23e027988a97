"""Beside the path, all shards: the selection as a page for people.

Holds: one self-contained HTML page, see `scalselect_assets.report`, and a receipt that names its versions.
Costs: four or five passes over the scores, of one or two columns mostly; one pass over the pool's texts; some
dozen images. Memory: one shard, the places of the selected rows, and what the page shows.
"""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from upath import UPath

from scalselect_assets.asset_path import OutputHeader, PoolAsset, StoreState
from scalselect_assets.charts import captions, figures, in_dagster
from scalselect_assets.charts.chart_data import Churn
from scalselect_assets.choice import selected_subset
from scalselect_assets.dataset import training_dataset, training_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.embedding.device_pool import DEVICE_POOL
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.checks import require_passed
from scalselect_assets.recording.columns import COMPOSITION, column_schema
from scalselect_assets.recording.materialization import Output, at_work
from scalselect_assets.recording.records import Records
from scalselect_assets.report.content import (
    ReportContent,
)
from scalselect_assets.report.gathering import gather
from scalselect_assets.report.overlays import AttentionOverlays
from scalselect_assets.report.page_receipt import (
    CODE_VERSION,
    NAME,
    RECEIPT,
    is_complete,
    labels_version,
    page_path,
    provenance,
    read_receipt,
)
from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import importance_scores, subspace_basis

COUNTS_CHECK = "report_counts_every_row"


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        pool=DEVICE_POOL,  # overlays are drawn with the model
        deps=[
            selection.key(name)
            for name in (
                training_manifest.NAME,
                selected_subset.NAME,
                importance_scores.NAME,
                subspace_basis.NAME,
                receipts.NAME,
            )
        ],
        kinds={"html"},
        code_version=data_versions.shown_code_version(CODE_VERSION, additions=labels_version(selection)),
        metadata={"dagster/column_schema": column_schema(COMPOSITION)},
        check_specs=[
            dg.AssetCheckSpec(
                COUNTS_CHECK,
                asset=selection.key(NAME),
                description="The report's counts by source add up to the manifest's.",
            ),
            dg.AssetCheckSpec(
                "gallery_pictures_open",
                asset=selection.key(NAME),
                description="Every picture that the report is to show can be opened.",
            ),
        ],
    )
    def selection_report(
        context: dg.AssetExecutionContext, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """The selection as one page to open in a browser: curves, composition, rejected rows, galleries."""
        with at_work(context, storage.locks(selection.store)):
            churn = last_churn(context.instance, selection)
            return write_report(selection, storage, vlm, churn=churn).result()

    return selection_report


def write_report(
    selection: Selection, storage: StorageResource, vlm: VlmResource, *, churn: Churn | None
) -> Output:
    """Write the page and its receipt.

    Args:
        selection: The selection that is reported.
        storage: Opens pool and store.
        vlm: Loads the target model, which the overlays of attention need.
        churn: The change from the selection before; none if that is not known.

    Raises:
        ArtifactMissingError: Something that the page shows is not materialized.
        dg.Failure: The stored results are not of one piece.
    """
    from scalselect_assets.report.render import render

    start = time.monotonic()
    artifacts = storage.artifacts(selection.store)
    manifest = training_manifest.read_manifest(artifacts)
    overlays = AttentionOverlays(selection, storage, vlm)
    content = gather(storage, selection, churn=churn, overlay=overlays.of)
    require_passed(counted := _counts_check(content, manifest))
    page = render(content)
    overlays.forget_others()
    n_bytes = artifacts.write_text(path := page_path(artifacts), [page])
    data_version = hashlib.sha256(page.encode()).hexdigest()
    made_from = provenance(selection, manifest)
    receipt = {**data_versions.header(data_version, made_from), "bytes": n_bytes}
    artifacts.write_json(NAME, receipt, RECEIPT)
    return Output(
        data_version,
        made_from,
        {
            "report": dg.MetadataValue.url(_link(path)),
            **_numbers(content),
            **_inline_plots(content),
            "seconds": time.monotonic() - start,
            "bytes": n_bytes,
            "dagster/uri": str(path),
        },
        (counted, _pictures_check(content)),
    )


def last_churn(instance: dg.DagsterInstance, selection: Selection) -> Churn | None:
    """The change from the selection before, as the present one recorded it; none for the first selection."""
    made = Records(instance).latest_materialization(selection.key(selected_subset.NAME))
    numbers = {name: value.value for name, value in made.metadata.items()} if made else {}
    if "churn" not in numbers:
        return None
    stayed, came, went = (int(str(numbers[name])) for name in ("stayed", "came", "went"))
    return Churn(stayed, came, went, float(str(numbers["churn"])))


def _link(path: UPath) -> str:
    """A URL that a browser opens."""
    return Path(path.path).as_uri() if is_local(path) else str(path)


def _numbers(content: ReportContent) -> dict[str, Any]:
    """Plain numbers that people watch over time; the UI plots them."""
    counts, churn = content.counts, content.churn
    return {
        "rank": content.energy.k,
        "energy": content.energy.k_energy,
        "rows": counts.rows,
        "embedded": counts.embedded,
        "selected": counts.selected,
        "rejected": counts.rejected,
        "leverage_share": content.leverage.leverage_share,
        "sources": len(content.composition),
        **(
            {"churn": churn.share, "stayed": churn.stayed, "came": churn.came, "went": churn.went}
            if churn
            else {}
        ),
    }


def _inline_plots(content: ReportContent) -> dict[str, Any]:
    """The key plots, for the UI."""
    leverage, selected = content.leverage, content.counts.selected
    drawn = {"energy_curve": in_dagster.energy_picture(content.energy)}
    if any(one.low for one in leverage.bins):
        drawn["leverage_distribution"] = in_dagster.picture(
            figures.leverage_chart(leverage), captions.leverage(leverage, selected)
        )
    if leverage.ranks:
        drawn["rank_curve"] = in_dagster.picture(
            figures.rank_chart(leverage, selected), captions.ranks(leverage)
        )
    composition = [
        dg.TableRecord(
            {"source": one.source, "pool": one.pool, "embedded": one.embedded, "selected": one.selected}
        )
        for one in content.composition
    ]
    return {
        **drawn,
        "composition": dg.MetadataValue.table(composition, schema=column_schema(COMPOSITION)),
        "rejected_by_reason": {one.reason: one.rows for one in content.rejected},
    }


def _counts_check(content: ReportContent, manifest: Mapping[str, Any]) -> dg.AssetCheckResult:
    shown = {
        name: sum(getattr(one, attribute) for one in content.composition)
        for name, attribute in (("rows", "pool"), ("embedded", "embedded"), ("selected", "selected"))
    }
    expected = {name: manifest[name] for name in shown}
    rejected = {one.reason: one.rows for one in content.rejected}
    return dg.AssetCheckResult(
        check_name=COUNTS_CHECK,
        passed=shown == expected and rejected == manifest["rejected"],
        metadata={"report": shown, "manifest": expected},
    )


def _pictures_check(content: ReportContent) -> dg.AssetCheckResult:
    pictures = [
        (item.place, one)
        for gallery in content.galleries
        for item in gallery.items
        for one in (*item.pictures, *([item.overlay] if item.overlay else []))
    ]
    problems = {place: one.problem for place, one in pictures if one.problem}
    return dg.AssetCheckResult(
        check_name="gallery_pictures_open",
        passed=not problems,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"pictures": len(pictures), "missing": len(problems), "problems": problems},
    )


def is_declared(selection: Selection) -> bool:
    """Whether a selection has a report."""
    return selection.report


def expected(state: StoreState) -> str:
    """The provenance that the page would have now."""
    return provenance(state.selection, state.header(training_dataset.ASSET))


def header(state: StoreState) -> OutputHeader:
    """The receipt of the page; empty where it or the page is missing or damaged."""
    complete = is_complete(state.artifacts, state.verified.sha256)
    return read_receipt(state.artifacts) if complete else {}


ASSET = PoolAsset(
    name=NAME,
    code_version=CODE_VERSION,
    build=build,
    is_declared=is_declared,
    expected=expected,
    header=header,
    error_checks=(COUNTS_CHECK,),
)
