"""What the report says is what the store holds, and it stands where it was made, made again only when due."""

import base64
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import dagster as dg
import polars as pl
import pytest
from PIL import Image

from scalselect_assets.dataset import training_manifest
from scalselect_assets.deployment import open_instance
from scalselect_assets.method.representation.rejection import MEANINGS, RejectionReason
from scalselect_assets.report import gallery, overlays, profile, selection_report
from scalselect_assets.report.content import ReportContent
from scalselect_assets.report.gallery_sample import GallerySample, Overlay
from scalselect_assets.report.gathering import gather
from scalselect_assets.report.page_receipt import is_complete, page_path, provenance, read_receipt
from scalselect_assets.report.render import render
from tests.bench import Bench
from tests.conftest import SHARED_DATA, png_bytes, sharegpt_row, write_lines, write_pool_shard
from tests.report.page import Page

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


def materialized(bench: Bench) -> dg.ExecuteInProcessResult:
    """The asset beside the others, which are materialized already."""
    asset = selection_report.build(bench.selection)
    with open_instance(bench.selection) as instance:
        return dg.materialize(
            [asset], instance=instance, resources={"storage": bench.storage, "vlm": bench.vlm}
        )


def told(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    (event,) = result.get_asset_materialization_events()
    metadata = event.step_materialization_data.materialization.metadata
    return {name: value.value for name, value in metadata.items()}


def gathered(bench: Bench, overlay: Overlay | None = None) -> ReportContent:
    return gather(bench.storage, bench.selection, overlay=overlay)


def all_scores(bench: Bench) -> pl.DataFrame:
    """Every score in the order of ranks, which the test works out for itself."""
    shards = json.loads(bench.artifacts.read_arrays("subspace_basis")[1]["shards"])
    frames = [
        bench.artifacts.read_frame("importance_scores", shard)[0].with_columns(shard=pl.lit(shard))
        for shard in shards
    ]
    return (
        pl.concat(frames)
        .sort(["normalised_leverage", "sample_key", "shard"], descending=[True, False, False])
        .with_row_index("rank", offset=1)
    )


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory, demo_vlm: Path, one_torch_thread: None, quick_dagster: None
) -> Bench:
    """A selection of 30 rows in three shards, four rows beside them rejected; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("report")
    pool = folder / "pool"
    write_pool_shard(pool, "web/a.jsonl", 14, seed=0)
    write_pool_shard(pool, "b.jsonl", 10, seed=1000)
    rows: list[Any] = [
        sharegpt_row(f"images/{index}.png", f"<image>\nIs it {index}?", id=index, source="<b>ours</b>")
        for index in range(6)
    ]
    rows[0] = sharegpt_row(
        [f"images/{index}.png" for index in range(5)], "<image>" * 5 + "\nWhat differs? 请说明", "Colours."
    )
    rows[1]["messages"] += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    bad = [sharegpt_row("gone.png"), sharegpt_row("gone.png", "<image>\nAgain?"), "{broken"]
    write_lines(pool / "c.jsonl", [*rows, *bad, sharegpt_row(None, "Hi?", source="<b>ours</b>")])
    bench = Bench(pool, folder / "store", demo_vlm)
    bench.refresh()
    return bench


@pytest.fixture(scope="module")
def made(kept: Bench) -> dg.ExecuteInProcessResult:
    return materialized(kept)


@pytest.fixture(scope="module")
def content(kept: Bench) -> ReportContent:
    return gathered(kept)


def test_numbers_that_people_watch_are_plain_and_those_of_the_manifest(
    kept: Bench, made: dg.ExecuteInProcessResult
) -> None:
    metadata, manifest = told(made), training_manifest.read_manifest(kept.artifacts)
    for name in ("rank", "energy", "rows", "embedded", "selected"):
        assert metadata[name] == manifest[name]
        assert type(metadata[name]) in (int, float)
    assert metadata["rejected"] == sum(manifest["rejected"].values()) == 4
    assert metadata["rejected_by_reason"] == manifest["rejected"]
    assert "churn" not in metadata


def test_key_plots_are_pictures_in_the_metadata(made: dg.ExecuteInProcessResult) -> None:
    metadata = told(made)
    for name in ("energy_curve", "leverage_distribution", "rank_curve"):
        encoded = metadata[name].partition("data:image/png;base64,")[2].partition(")")[0]
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            assert picture.format == "PNG"
    assert sum(record.data["pool"] for record in metadata["composition"].records) == metadata["rows"]


def test_the_link_leads_to_the_page(kept: Bench, made: dg.ExecuteInProcessResult) -> None:
    path = Path(unquote(urlparse(told(made)["report"]).path))
    assert path == Path(str(page_path(kept.artifacts)))
    page = Page(path.read_text())
    assert page.all("h1")[0].text == "Selection report: bench"


def test_checks_pass(made: dg.ExecuteInProcessResult) -> None:
    checks = {one.check_name: one.passed for one in made.get_asset_check_evaluations()}
    assert checks == {"report_counts_every_row": True, "gallery_pictures_open": True}


def test_the_page_is_what_its_versions_say(kept: Bench, made: dg.ExecuteInProcessResult) -> None:
    receipt = read_receipt(kept.artifacts)
    page = page_path(kept.artifacts).read_bytes()
    assert receipt["data_version"] == hashlib.sha256(page).hexdigest()
    assert receipt["bytes"] == len(page)
    assert receipt["provenance"] == provenance(
        kept.selection, training_manifest.read_manifest(kept.artifacts)
    )
    assert told(made)["scalselect/provenance"] == receipt["provenance"]
    assert is_complete(kept.artifacts)


def test_the_same_selection_gives_the_same_bytes(kept: Bench, content: ReportContent) -> None:
    assert render(content) == render(gathered(kept))
    before = page_path(kept.artifacts).read_bytes()
    materialized(kept)
    assert page_path(kept.artifacts).read_bytes() == before


def test_where_attention_lies_is_drawn_once_and_forgotten_when_it_is_not_shown(
    kept: Bench, made: dg.ExecuteInProcessResult, content: ReportContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {item.place for gallery in content.galleries for item in gallery.items}
    folder = kept.store / overlays.FOLDER
    drawn = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(drawn) == len(shown)
    (folder / "of-another-night.png").write_bytes(b"")

    def refuse(*_: object) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(overlays, "attention_of", refuse)
    materialized(kept)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == drawn
    assert page_path(kept.artifacts).read_text().count('class="overlay"') == sum(
        len(gallery.items) for gallery in content.galleries
    )


def test_an_image_that_is_replaced_has_another_overlay(
    make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path
) -> None:
    bench = Bench(pool := make_pool({"a.jsonl": 3}), tmp_path / "store", demo_vlm)

    def drawn() -> set[str]:
        bench.refresh()
        materialized(bench)
        return {path.name for path in (bench.store / overlays.FOLDER).iterdir()}

    before = drawn()
    (pool / "images" / "0.png").write_bytes(png_bytes(77))
    after = drawn()
    assert (len(before), len(after), len(before & after)) == (3, 3, 2)


def test_rows_are_counted_by_source_before_and_after(kept: Bench, content: ReportContent) -> None:
    chosen = kept.artifacts.read_frame("selected_subset")[0]
    by_shard = {str(shard): rows.height for (shard,), rows in chosen.group_by("shard")}
    from_c = chosen.filter(shard="c.jsonl")["row"].to_list()
    counts = {one.source: (one.pool, one.embedded, one.selected) for one in content.composition}
    assert counts == {
        "web": (14, 14, by_shard.get("web/a.jsonl", 0)),
        "b": (10, 10, by_shard.get("b.jsonl", 0)),
        "<b>ours</b>": (6, 5, sum(row != 0 for row in from_c)),
        "c": (4, 1, sum(row == 0 for row in from_c)),
    }
    assert [one.pool for one in content.composition] == [14, 10, 6, 4]


def test_rejected_rows_are_told_by_reason_with_what_it_means(content: ReportContent) -> None:
    assert [(one.reason, one.rows) for one in content.rejected] == [
        ("missing_image", 2),
        ("malformed_row", 1),
        ("text_only", 1),
    ]
    assert all(one.meaning for one in content.rejected)


def test_every_reason_has_a_meaning() -> None:
    assert set(MEANINGS) == set(RejectionReason)


def test_energy_and_leverage_are_those_of_the_basis_and_the_scores(
    kept: Bench, content: ReportContent
) -> None:
    subspace, _ = selection_report.subspace_basis.read_basis(kept.artifacts)
    curve = dict(zip(content.energy.directions, content.energy.energy, strict=True))
    assert curve[0] == 0
    assert curve[subspace.k] == content.energy.k_energy == subspace.energy
    for directions, energy in curve.items():
        assert directions == 0 or energy == subspace.energy_curve()[directions - 1]
    scores, chosen = all_scores(kept), kept.artifacts.read_frame("selected_subset")[0]
    leverage, normalised = content.leverage, scores["normalised_leverage"]
    assert sum(one.pool for one in leverage.bins) == scores.height
    assert sum(one.selected for one in leverage.bins) == chosen.height
    assert leverage.cut == chosen["normalised_leverage"][-1]
    assert leverage.leverage_share == pytest.approx(
        chosen["normalised_leverage"].sum() / normalised.sum(), rel=1e-12
    )
    assert (leverage.ranks[0], leverage.values[0]) == (1, normalised[0])
    assert (leverage.ranks[-1], leverage.values[-1]) == (scores.height, normalised[-1])


def test_galleries_show_the_ends_and_the_middle_with_exact_ranks(kept: Bench, content: ReportContent) -> None:
    scores = all_scores(kept)
    n, values = scores.height, scores["normalised_leverage"]
    highest, median, lowest = ([item.rank for item in gallery.items] for gallery in content.galleries)
    assert highest == list(range(1, 9))
    assert lowest == list(range(n - 7, n + 1))
    middle = values[(n + 1) // 2 - 1]
    assert median == sorted(sorted(range(1, n + 1), key=lambda rank: abs(values[rank - 1] - middle))[:8])
    chosen = set(kept.artifacts.read_frame("selected_subset")[0].select("shard", "row").iter_rows())
    for shown_gallery in content.galleries:
        for item in shown_gallery.items:
            row = scores.row(item.rank - 1, named=True)
            assert item.place == f"{row['shard']}#{row['row']}"
            assert item.sample_key == row["sample_key"]
            assert (item.leverage, item.normalised_leverage) == (row["leverage"], row["normalised_leverage"])
            assert item.percentile == pytest.approx(100 * (n - item.rank) / (n - 1))
            assert item.is_selected == ((row["shard"], row["row"]) in chosen)


def shown(content: ReportContent, place: str) -> Any:
    return next(item for gallery in content.galleries for item in gallery.items if item.place == place)


def everything(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> ReportContent:
    """The report with galleries that hold the whole pool."""
    monkeypatch.setattr(profile, "GALLERY_SIZE", 100)
    return gathered(bench)


def test_samples_are_shown_with_words_and_pictures(kept: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    content = everything(kept, monkeypatch)
    several = shown(content, "c.jsonl#0")
    assert (several.question, several.answer) == ("What differs? 请说明", "Colours.")
    assert len(several.pictures) == 3
    assert several.note == "2 more images."
    turns = shown(content, "c.jsonl#1")
    assert (turns.question, turns.source_id, turns.note) == ("Is it 1?", "1", "2 more turns follow.")
    for picture in (*several.pictures, *turns.pictures):
        with Image.open(io.BytesIO(picture.data)) as image:
            assert image.size == (picture.width, picture.height) == (48, 40)


def test_long_texts_are_cut_and_say_so() -> None:
    assert gallery._cut("ab" * 5, 10) == "ab" * 5
    assert gallery._cut("ab cd", 3) == "ab… (5 characters)"


def test_an_image_that_went_or_broke_leaves_its_place_and_the_reason(
    kept: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (broken, gone) = (kept.pool / "images" / name for name in ("1000.png", "1001.png"))
    before = {path: path.read_bytes() for path in (broken, gone)}
    try:
        broken.write_bytes(b"no picture")
        gone.unlink()
        content = everything(kept, monkeypatch)
        checks = {one.check_name: one for one in materialized(kept).get_asset_check_evaluations()}
    finally:
        for path, data in before.items():
            path.write_bytes(data)
    assert "not an image of a known format" in shown(content, "b.jsonl#0").pictures[0].problem
    assert "does not exist" in shown(content, "b.jsonl#1").pictures[0].problem
    assert shown(content, "b.jsonl#2").pictures[0].data
    page = Page(render(content))
    assert len([one for one in page.all("p") if one.attributes.get("class") == "missing"]) >= 2
    pictures = checks["gallery_pictures_open"]
    assert (pictures.passed, pictures.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert set(pictures.metadata["problems"].value) == {"b.jsonl#0", "b.jsonl#1"}


def labelled(monkeypatch: pytest.MonkeyPatch, label: Callable[[str, str], str]) -> None:
    """Let rows have any labels, which may come from the pool's own rows."""
    monkeypatch.setattr(gallery, "source_of", lambda _: label)


def test_overlays_are_shown_and_labels_of_any_text_are_written(
    kept: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[GallerySample] = []

    def overlay(sample: GallerySample) -> bytes | None:
        asked.append(sample)
        return {0: png_bytes(1, (700, 300)), 1: b"broken"}.get(sample.row)

    labelled(monkeypatch, lambda shard, _: f"{shard.partition('/')[0]}\ud800" + "x" * 200)
    content = gathered(kept, overlay)
    items = [item for gallery in content.galleries for item in gallery.items]
    assert len({(sample.shard, sample.row) for sample in asked}) == len(asked)  # once each
    assert {f"{sample.shard}#{sample.row}" for sample in asked} == {item.place for item in items}
    by_row = {item.place.partition("#")[2]: item.overlay for item in items}
    assert all(overlay is None for row, overlay in by_row.items() if row not in "01")
    for item in items:
        if item.place.endswith("#0"):
            assert (item.overlay.width, item.overlay.height) == (256, 110)
        elif item.place.endswith("#1"):
            assert "not an image" in item.overlay.problem
    assert sum(one.pool for one in content.composition) == 34
    assert all(len(one.source) < 120 for one in content.composition)
    render(content).encode()


def test_many_sources_are_added_up_after_the_largest(kept: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(monkeypatch, lambda _, text: hashlib.md5(text.encode()).hexdigest())
    content = gathered(kept)
    assert len(content.composition) == 25
    assert content.composition[-1].source == "(10 more sources)"
    manifest = training_manifest.read_manifest(kept.artifacts)
    for name, attribute in (("rows", "pool"), ("embedded", "embedded"), ("selected", "selected")):
        assert sum(getattr(one, attribute) for one in content.composition) == manifest[name]


def test_the_report_is_due_when_the_dataset_or_the_labels_change(kept: Bench) -> None:
    manifest, selection = training_manifest.read_manifest(kept.artifacts), kept.selection
    present = provenance(selection, manifest)
    versions = {name: manifest[name] for name in ("provenance", "data_version")}
    assert provenance(selection, versions) == present
    others = [
        provenance(selection, {**manifest, "provenance": "other"}),
        provenance(selection, {**manifest, "data_version": "other"}),
        provenance(selection.model_copy(update={"source_label": "shard"}), manifest),
    ]
    assert len({present, *others}) == 4


@pytest.fixture
def bench(make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path) -> Bench:
    return Bench(make_pool({"a.jsonl": 5, "b.jsonl": 4}), tmp_path / "store", demo_vlm)


def test_a_small_pool_a_second_night_and_a_dataset_that_is_behind(bench: Bench) -> None:
    bench.refresh()
    first = told(materialized(bench))
    write_pool_shard(bench.pool, "c.jsonl", 5, seed=500)
    bench.refresh()
    second = told(materialized(bench))
    assert "churn" not in first
    recorded = bench.metadata("selected_subset")
    assert {name: second[name] for name in ("churn", "stayed", "came", "went")} == {
        name: recorded[name] for name in ("churn", "stayed", "came", "went")
    }
    page = Page(page_path(bench.artifacts).read_text())
    assert f"{recorded['stayed']} samples stayed" in page.text

    page_path(bench.artifacts).write_text("cut")
    assert not is_complete(bench.artifacts)

    bench.options["budget"] = 2
    with pytest.raises(dg.Failure, match="materialize training_dataset first"):
        gathered(bench)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the sample data is not beside this checkout")
def test_photographs_with_chinese_texts_make_a_page_of_bounded_size(tmp_path: Path, demo_vlm: Path) -> None:
    bench = Bench(SHARED_DATA / "mllm_demo", tmp_path / "store", demo_vlm)
    bench.options["budget"] = 3
    bench.refresh()
    html = render(gathered(bench))
    assert len(html.encode()) < 1_000_000
    texts = (SHARED_DATA / "mllm_demo" / "mllm_demo.json").read_text()
    question = next(
        turn["content"].replace("<image>", "").strip()
        for row in json.loads(texts)
        for turn in row["messages"][:1]
        if not turn["content"].isascii()
    )
    assert question in Page(html).text
