"""The choice through the whole path: terms, strategies, lists, what is kept, and what stands beside it."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest

from scalselect_assets.asset_path import path_of
from scalselect_assets.choice import comparison, labels
from scalselect_assets.choice.labels import source_of
from scalselect_assets.choice.lists import SampleListError
from scalselect_assets.declaration.choice_settings import DeclaredComparison, StrategyName
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.operations.summary import summary
from scalselect_assets.recording.columns import SELECTED_SUBSET, polars_schema
from tests.bench import Bench, ran
from tests.conftest import png_bytes, sharegpt_row, write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")

CHOSEN = ["selected_subset", "training_dataset"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, demo_vlm: Path) -> Bench:
    """A pool of three sources, embedded and scored once; tests choose from it anew."""
    root = tmp_path_factory.mktemp("choice")
    pool = root / "pool"
    for number, (shard, n_rows) in enumerate({"big/a.jsonl": 14, "big/b.jsonl": 6, "rare.jsonl": 4}.items()):
        write_pool_shard(pool, shard, n_rows, seed=1000 * number)
    bench = Bench(pool, root / "store", demo_vlm)
    bench.refresh()
    return bench


@pytest.fixture
def bench(made: Bench) -> Bench:
    """The same store, with settings of its own."""
    bench = Bench(made.pool, made.store, Path(made.options["target_model"]))
    bench.vlm = made.vlm
    return bench


def chosen(bench: Bench, **settings: Any) -> pl.DataFrame:
    """What these settings choose."""
    bench.options.update(settings)
    report = bench.refresh()
    assert set(ran(report)) <= {"removed_samples", *CHOSEN, "selection_report"}, "nothing is scored again"
    assert report.problems() == []
    return bench.artifacts.read_frame("selected_subset")[0]


def places(frame: pl.DataFrame) -> list[tuple[str, int]]:
    return list(frame.select("shard", "row").iter_rows())


def all_scores(bench: Bench) -> pl.DataFrame:
    frames = []
    for path in sorted((bench.store / "importance_scores").iterdir()):
        frame = pl.read_parquet(path)
        shard = {14: "big/a.jsonl", 6: "big/b.jsonl", 4: "rare.jsonl"}[frame.height]
        frames.append(frame.with_columns(shard=pl.lit(shard)))
    return pl.concat(frames)


def refused(bench: Bench, **settings: Any) -> str:
    bench.options.update(settings)
    with pytest.raises((RefreshError, SampleListError)) as caught:
        bench.refresh()
    return str(caught.value)


# Terms


def test_by_default_the_highest_leverage_is_chosen_and_every_column_is_there(bench: Bench) -> None:
    subset = chosen(bench, budget=9)
    best = all_scores(bench).sort(
        ["normalised_leverage", "sample_key", "shard"], descending=[True, False, False]
    )
    assert places(subset) == places(best.head(9))
    assert subset.schema == polars_schema(SELECTED_SUBSET)
    assert subset["rank"].to_list() == list(range(1, 10))
    assert set(subset["why"]) == {"chosen"}
    assert set(subset["source"]) <= {"big", "rare"}
    assert subset["n_image_tokens"].min() > 0  # type: ignore[operator]


def test_floors_and_ceilings_hold_by_source_and_the_best_of_each_are_taken(bench: Bench) -> None:
    quotas = [{"floors": {"rare": 3}, "ceilings": {"big": 0.5}}]
    subset = chosen(bench, budget=6, quotas=quotas)
    assert Counter(subset["source"]) == {"big": 3, "rare": 3}
    scores = all_scores(bench).sort("normalised_leverage", descending=True)
    rare = scores.filter(pl.col("shard") == "rare.jsonl")
    assert set(places(subset)) >= set(places(rare.head(3)))


def test_quotas_that_cannot_be_met_are_refused_with_the_numbers(bench: Bench) -> None:
    message = refused(bench, budget=6, quotas=[{"by": "shard_folder", "floors": {"rare": 5}}])
    assert "the choice cannot be made" in message
    assert "rare" in message
    assert "4" in message
    assert "5" in message


def test_a_budget_of_tokens_is_not_exceeded(bench: Bench) -> None:
    one = chosen(bench, budget=1)["n_image_tokens"][0]
    subset = chosen(bench, budget={"image_tokens": 5 * one})
    assert subset["n_image_tokens"].sum() <= 5 * one
    assert subset.height == 5
    half = chosen(bench, budget={"text_tokens": 0.5})
    assert half["n_text_tokens"].sum() > 0


def test_lists_are_followed_by_id_key_and_image_and_what_they_do_not_find_is_reported(
    bench: Bench, tmp_path: Path
) -> None:
    scores = all_scores(bench).sort("normalised_leverage")
    last, best = scores.row(0, named=True), scores.row(-1, named=True)
    include, exclude = tmp_path / "in.txt", tmp_path / "out.txt"
    include.write_text(f"# those that must be there\n\n{last['source_id']}\nnobody\n")
    exclude.write_text(f"{best['sample_key']}\n")
    bench.options.update(budget=4, include=str(include), exclude=str(exclude))
    report = bench.refresh()
    subset = bench.artifacts.read_frame("selected_subset")[0]
    assert report.failed_checks == {}  # entries that are not found are a warning
    assert subset.row(0, named=True)["source_id"] == last["source_id"]
    assert subset["why"].to_list() == ["included", "chosen", "chosen", "chosen"]
    assert best["sample_key"] not in subset["sample_key"].to_list()
    include.write_text(f"{best['sample_key']}\n")
    assert "both to include and to exclude" in refused(bench)
    include.write_text("")
    assert bench.refresh().runs == CHOSEN, "another list is another choice"


def test_a_list_that_is_not_there_is_named(bench: Bench, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere.txt") in refused(bench, include=str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize(
    ("label", "shard", "text", "expected"),
    [
        ("shard", "x/y.jsonl", "{}", "x/y.jsonl"),
        ("shard_folder", "x/y.jsonl", "{}", "x"),
        ("shard_folder", "y.jsonl", "{}", "y"),
        ("image_folder", "y.jsonl", '{"images": ["coco/train/1.jpg"]}', "coco"),
        ("image_folder", "y.jsonl", '{"images": ["./gqa/1.jpg", "coco/2.jpg"]}', "gqa"),
        ("image_folder", "y.jsonl", '{"images": ["1.jpg"]}', "(none)"),
        ("field:kind", "y.jsonl", '{"kind": "vqa"}', "vqa"),
        ("field:kind", "y.jsonl", '{"kind": 7}', "7"),
        ("field:kind", "y.jsonl", '{"kind": null}', "(none)"),
        ("field:kind", "y.jsonl", "{}", "(none)"),
        ("field:meta.origin", "y.jsonl", '{"meta": {"origin": "웹"}}', "웹"),
        ("source", "x/y.jsonl", '{"source": " coco "}', "coco"),
        ("source", "x/y.jsonl", '{"source": "  "}', "x"),
        ("source", "y.jsonl", "{}", "y"),
    ],
)
def test_a_label_is_read_from_the_shard_the_images_or_a_field(
    label: str, shard: str, text: str, expected: str
) -> None:
    assert source_of(label)(shard, text) == expected
    table = pl.DataFrame({"text": [text], "images": [json.loads(text).get("images", [])]})
    table = table.with_columns(pl.col("images").cast(pl.List(pl.String)))
    assert table.select(labels.label_of(label, shard)).item() == expected


@pytest.mark.parametrize("text", ["not JSON", "[" * 100_000, "[]", '{"image": 7}'])
def test_whatever_a_row_is_it_has_a_label(text: str) -> None:
    assert source_of("source")("y.jsonl", text) == "y"
    assert source_of("image_folder")("y.jsonl", text) == source_of("field:kind")("y.jsonl", text) == "(none)"


# Strategies


@pytest.mark.parametrize(
    "strategy",
    get_args(StrategyName),
)
def test_every_strategy_fills_the_budget_and_is_the_same_again(bench: Bench, strategy: str) -> None:
    subset = chosen(bench, budget=8, strategy=strategy, seed=3)
    again = chosen(bench, budget=9, strategy=strategy, seed=3)
    assert subset.height == 8
    assert subset.n_unique(["shard", "row"]) == 8
    assert again.height == 9
    assert chosen(bench, budget=8).equals(subset)


def test_what_a_strategy_knows_of_a_row_is_recorded(bench: Bench) -> None:
    drawn = chosen(bench, budget=8, strategy="leverage_sampling")
    assert drawn["inclusion_probability"].is_between(0, 1).all()
    assert drawn["gain"].is_null().all()
    spanning = chosen(bench, budget=8, strategy="spanning")
    assert (spanning["gain"] > 0).all()
    assert spanning["inclusion_probability"].is_null().all()


def test_an_earlier_choice_is_kept_within_bounds_and_its_cost_is_reported(bench: Bench) -> None:
    before = chosen(bench, budget=8, strategy="random", seed=1)
    top = chosen(bench, budget=8, strategy="top_leverage", keep_earlier=None)
    bench.options.update(strategy="random")
    chosen(bench)
    after = chosen(bench, strategy="top_leverage", keep_earlier={"max_churn": 0.25})
    stayed = set(places(after)) & set(places(before))
    assert len(stayed) >= 6
    assert (after["why"] == "kept").sum() == len(stayed - set(places(top)))
    told = metadata(bench)
    assert told["kept_earlier"] == (after["why"] == "kept").sum()
    assert told["churn"] <= 0.25 < told["churn_without_keeping"]
    assert told["leverage_lost_by_keeping"] > 0


def metadata(bench: Bench) -> dict[str, Any]:
    """Of the last subset."""
    from scalselect_assets.deployment import open_instance

    with open_instance(bench.selection) as instance:
        event = instance.get_latest_materialization_event(bench.selection.key("selected_subset"))
        assert event is not None
        assert event.asset_materialization is not None
        return {name: value.value for name, value in event.asset_materialization.metadata.items()}


# What stands beside it


def test_the_choice_is_measured_beside_others_of_its_size(bench: Bench) -> None:
    chosen(bench, budget=8, compare=DeclaredComparison(seeds=2))
    compared, header = bench.artifacts.read_frame(comparison.NAME)
    assert header["data_version"] == bench.artifacts.read_header("selected_subset")["data_version"]
    assert compared["strategy"].to_list() == [
        comparison.CHOICE,
        "top_leverage",
        "coverage",
        *["leverage_sampling"] * 2,
        "spanning",
        *["random"] * 2,
        *["stratified_random"] * 2,
        "length",
    ]
    assert set(compared["rows"]) == {8}
    choice, top = compared.row(0, named=True), compared.row(1, named=True)
    assert {**choice, "strategy": ""} == {**top, "strategy": ""}
    assert choice["leverage_share"] == compared["leverage_share"].max()
    scores = all_scores(bench)
    subset = bench.artifacts.read_frame("selected_subset")[0]
    assert choice["leverage_share"] == pytest.approx(subset["leverage"].sum() / scores["leverage"].sum())
    assert compared["energy_contained"].is_between(0, 1 + 1e-9).all()
    assert compared["projection_error"].is_between(0, 1).all()
    assert compared["shared_with_choice"][0] == 1.0
    assert compared["shared_with_last"].is_not_null().all()
    told = metadata(bench)
    assert told["choice_leverage_share"] == pytest.approx(choice["leverage_share"])
    assert [record.data["seeds"] for record in told["comparison"].records] == [0, 0, 0, 2, 0, 2, 2, 0]


def test_a_pool_beyond_the_declared_size_is_not_compared(bench: Bench) -> None:
    chosen(bench, budget=8, compare=DeclaredComparison(max_rows=5))
    assert bench.artifacts.read_frame(comparison.NAME)[0].is_empty()


def test_a_comparison_that_is_declared_otherwise_is_made_without_another_choice(bench: Bench) -> None:
    before = chosen(bench, budget=8, compare=None)
    after = chosen(bench, budget=8, compare=DeclaredComparison(strategies=["random"], seeds=1))
    assert after.equals(before)
    assert bench.artifacts.read_frame(comparison.NAME)[0].height == 2


# Removed samples


def test_duplicates_and_contaminated_samples_are_not_chosen_and_each_is_reported(
    tmp_path: Path, demo_vlm: Path, make_pool: Callable[..., Path]
) -> None:
    pool = make_pool({"a.jsonl": 6, "b.jsonl": 4})
    rows = (pool / "a.jsonl").read_text().splitlines()
    write_lines(pool / "b.jsonl", [*(pool / "b.jsonl").read_text().splitlines(), rows[0]])
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "probe.png").write_bytes(png_bytes(1001))
    bench = Bench(pool, tmp_path / "store", demo_vlm)
    bench.options.update(
        budget=8, near_duplicates={"cosine": 1.0}, decontamination={"images": str(evaluation)}
    )
    bench.refresh()
    removed, _ = bench.artifacts.read_frame("removed_samples")
    by_reason = {row["reason"]: row for row in removed.iter_rows(named=True)}
    assert by_reason["evaluation_image"]["partner"] == "probe.png"
    assert (by_reason["evaluation_image"]["shard"], by_reason["evaluation_image"]["row"]) == ("b.jsonl", 1)
    assert by_reason["exact_duplicate"]["sample_key"] == by_reason["exact_duplicate"]["partner_key"]
    subset = bench.artifacts.read_frame("selected_subset")[0]
    assert not set(places(subset)) & set(places(removed))
    assert subset.height == 8
    assert bench.refresh().runs == []

    (evaluation / "another.png").write_bytes(png_bytes(2))
    assert ran(bench.refresh()) == ["removed_samples", *CHOSEN]
    removed, _ = bench.artifacts.read_frame("removed_samples")
    assert Counter(removed["reason"])["evaluation_image"] == 2
    bench.options["budget"] = 9
    assert "there are" in refused(bench) or "9" in refused(bench)


# Rows without an image


def test_rows_without_an_image_have_a_budget_of_their_own(
    tmp_path: Path, demo_vlm: Path, make_pool: Callable[..., Path]
) -> None:
    pool = make_pool({"a.jsonl": 4})
    texts = [sharegpt_row(None, f"What is {n} plus {n}?", str(2 * n), id=f"t{n}") for n in range(10)]
    write_lines(pool / "texts.jsonl", texts)
    bench = Bench(pool, tmp_path / "store", demo_vlm)
    bench.options.update(text_only=0.3)
    bench.refresh()

    def kept() -> set[str]:
        lines = Path(summary(bench.artifacts)["training_dataset"]).read_text().splitlines()
        return {row["id"] for row in map(json.loads, lines) if str(row["id"]).startswith("t")}

    first = kept()
    assert len(first) == 3
    write_lines(pool / "texts.jsonl", [*texts, sharegpt_row(None, "And now?", "Now.", id="t-new")])
    bench.options.update(text_only=4)
    bench.refresh()
    assert len(kept()) == 4
    assert len(kept() & first) >= 2, "a draw by key moves little when the pool grows"
    bench.options.update(text_only=50)
    assert "text_only asks for 50 rows without an image, there are 11" in refused(bench)


# Declarations


def test_a_declaration_of_all_terms_survives_its_file(tmp_path: Path) -> None:
    declared = Selection(
        name="s",
        source="pool",
        store="store",
        target_model="m",
        budget={"image_tokens": 1000},  # type: ignore[arg-type]
        strategy="spanning",
        source_label="field:source",
        quotas=[{"by": "shard", "floors": {"a": 0.1}, "ceilings": {"b": 7}}],  # type: ignore[list-item]
        keep_earlier={"slack": 0.1},  # type: ignore[arg-type]
        near_duplicates={"cosine": 0.99},  # type: ignore[arg-type]
        text_only=0.5,
    )
    from scalselect_assets.declaration.selection_file import read_selection

    path = tmp_path / "selection.yaml"
    path.write_text(declared.to_yaml())
    read = read_selection(path)
    assert read.choice_settings() == declared.choice_settings()
    assert read.near_duplicates == declared.near_duplicates
    assert path_of(read) == path_of(declared)


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": {"image_tokens": 5, "text_tokens": 5}},
        {"budget": {}},
        {"strategy": "best"},
        {"source_label": "folder"},
        {"quotas": [{"by": "shard", "floors": {"a": -1}}]},
        {"keep_earlier": {"slack": 2}},
        {"text_only": 1.5},
        {"seed": -1},
    ],
)
def test_terms_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Selection(name="s", source="pool", store="store", target_model="m", **wrong)
