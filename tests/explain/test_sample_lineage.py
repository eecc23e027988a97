"""From a sample back to its file, its model and the runs; what does not fit is said."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import pytest

from scalselect_assets.deployment import open_instance
from scalselect_assets.embedding import receipts
from scalselect_assets.explain.sample_lineage import SampleLineage, trace
from scalselect_assets.explain.sample_search import SampleKeyError
from scalselect_assets.subspace import importance_scores
from tests.bench import SHARD, Bench
from tests.conftest import png_bytes, sharegpt_row, write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")

PATH = (
    "raw_samples",
    "attention_embeddings",
    "embedding_moments",
    "subspace_basis",
    "importance_scores",
    "selected_subset",
    "training_dataset",
)


@pytest.fixture(scope="module")
def refreshed(
    tmp_path_factory: pytest.TempPathFactory, demo_vlm: Path, one_torch_thread: None, quick_dagster: None
) -> Path:
    """A folder in which a pool and its store are up to date, and a copy of it beside."""
    folder = tmp_path_factory.mktemp("refreshed") / "now"
    pool = folder / "pool"
    write_pool_shard(pool, "a.jsonl", 5, seed=0)
    write_pool_shard(pool, "sub/b 한.jsonl", 4, seed=1000)
    (pool / "images" / "cut.png").write_bytes(png_bytes(3)[:60])
    bad = [
        sharegpt_row("gone.png", id="gone"),
        sharegpt_row("images/cut.png", id="cut"),
        sharegpt_row(None, "Hello?", id="textual"),
        sharegpt_row("images/1.png", "<image>\nAnother question?", id=3),  # an id of a.jsonl, too
    ]
    write_lines(pool / "bad.jsonl", bad)
    Bench(pool, folder / "store", demo_vlm).refresh()
    shutil.copytree(folder, folder.with_name("copy"))
    return folder


@pytest.fixture
def bench(refreshed: Path, demo_vlm: Path) -> Bench:
    """The copy put back in place."""
    shutil.rmtree(refreshed)
    shutil.copytree(refreshed.with_name("copy"), refreshed)
    return Bench(refreshed / "pool", refreshed / "store", demo_vlm)


def traced(bench: Bench, key: str) -> SampleLineage:
    with open_instance(bench.selection) as instance:
        return trace(bench.selection, bench.storage, instance, key)


def chosen(bench: Bench) -> dict[str, object]:
    """The sample of highest leverage."""
    return bench.artifacts.read_frame("selected_subset")[0].row(0, named=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_of(bench: Bench, asset: str, shard: str | None) -> str:
    """The run of the latest materialization."""
    with open_instance(bench.selection) as instance:
        wanted = dg.AssetRecordsFilter(
            bench.selection.key(asset), asset_partitions=None if shard is None else [shard]
        )
        return instance.fetch_materializations(wanted, limit=1).records[0].run_id


# What is told


def test_a_selected_sample_leads_to_its_file_its_images_and_its_rank(bench: Bench) -> None:
    sample = chosen(bench)
    told = traced(bench, str(sample["sample_key"]))
    assert told.problems == ()
    shard, row = (
        str(sample["shard"]),
        json.loads((bench.pool / str(sample["shard"])).read_text().splitlines()[int(str(sample["row"]))]),
    )
    assert told.sample == {
        "sample_key": sample["sample_key"],
        "source_id": str(row["id"]),
        "shard": shard,
        "row": sample["row"],
        "line": int(str(sample["row"])) + 1,
        "state": "selected",
        "rank": 1,
    }
    file = bench.pool / shard
    assert (told.shard_file["path"], told.shard_file["sha256"]) == (str(file), sha256(file))
    (image,) = told.images
    path = (file.parent / row["images"][0]).resolve()
    assert image == {"path": str(path), "sha256": sha256(path)}


def test_every_step_tells_the_version_that_its_output_states(bench: Bench) -> None:
    sample = chosen(bench)
    shard = str(sample["shard"])
    steps = {step.asset: step for step in traced(bench, str(sample["sample_key"])).steps}
    assert tuple(steps) == PATH
    table, header = receipts.recorded_table(bench.artifacts, shard)
    basis = bench.artifacts.read_header("subspace_basis", suffix=".safetensors")
    manifest = bench.artifacts.read_json("training_dataset", "manifest")
    (card,) = (json.loads(path.read_text()) for path in (bench.store / "model_cards").iterdir())
    assert {asset: step.data_version for asset, step in steps.items()} == {
        "raw_samples": bench.artifacts.read_header("raw_samples", shard)["data_version"],
        "attention_embeddings": header["data_version"],
        "embedding_moments": bench.artifacts.read_header("embedding_moments", shard, suffix=".safetensors")[
            "data_version"
        ],
        "subspace_basis": basis["data_version"],
        "importance_scores": bench.artifacts.read_header("importance_scores", shard)["data_version"],
        "selected_subset": bench.artifacts.read_header("selected_subset")["data_version"],
        "training_dataset": manifest["data_version"],
    }
    assert steps["attention_embeddings"].facts == {
        "table": str(bench.store / "lance" / f"{table.table}.lance"),
        "table_version": table.version,
        "content_sha256": table.content_sha256,
        "model_fingerprint": card["fingerprint"],
        "model": bench.options["target_model"],
        "model_commit": card["commit"],
    }
    assert steps["subspace_basis"].facts["rank"] == manifest["rank"]
    assert steps["subspace_basis"].facts["drift"] is None
    assert steps["importance_scores"].facts["leverage"] == sample["leverage"]
    assert steps["importance_scores"].facts["normalised_leverage"] == sample["normalised_leverage"]
    assert (steps["selected_subset"].facts["rank"], steps["selected_subset"].facts["selected"]) == (1, 5)
    dataset = bench.store / "training_dataset" / "train.jsonl"
    assert steps["training_dataset"].facts["file"] == str(dataset)
    assert steps["training_dataset"].facts["sha256"] == sha256(dataset)


def test_every_step_names_the_run_that_made_exactly_this_version(bench: Bench) -> None:
    sample = chosen(bench)
    key, shard = str(sample["sample_key"]), str(sample["shard"])

    def runs() -> dict[str, str | None]:
        return {step.asset: step.made_by and step.made_by.run_id for step in traced(bench, key).steps}

    first = runs()
    assert first == {
        asset: run_of(bench, asset, shard if asset in (*SHARD.split("+"), "importance_scores") else None)
        for asset in PATH
    }
    assert {step.made_by.job for step in traced(bench, key).steps if step.made_by} == {"bench_assets"}
    write_pool_shard(bench.pool, "c.jsonl", 3, seed=5000)
    bench.refresh()
    second = runs()
    kept = set(SHARD.split("+"))
    assert {asset for asset in PATH if first[asset] == second[asset]} == kept
    assert None not in second.values()
    drift = next(step.facts["drift"] for step in traced(bench, key).steps if step.asset == "subspace_basis")
    assert drift > 0


def test_a_version_that_was_recorded_before_another_one_is_found_behind_it(bench: Bench) -> None:
    key = str(chosen(bench)["sample_key"])
    run = {step.asset: step.made_by for step in traced(bench, key).steps}["subspace_basis"]
    with open_instance(bench.selection) as instance:
        for number in range(3):
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    bench.selection.key("subspace_basis"), tags={"dagster/data_version": f"other {number}"}
                )
            )
    assert {step.asset: step.made_by for step in traced(bench, key).steps}["subspace_basis"] == run


def test_what_the_instance_does_not_know_is_not_guessed(bench: Bench) -> None:
    shutil.rmtree(bench.store / "dagster")
    told = traced(bench, str(chosen(bench)["sample_key"]))
    assert [step.made_by for step in told.steps] == [None] * 7
    assert [value for label, value in told.lines() if label == "  made by"] == ["no run recorded"] * 7
    assert told.problems == ()


def test_a_sample_that_is_not_selected_has_scores_and_no_rank(bench: Bench) -> None:
    selected = set(bench.artifacts.read_frame("selected_subset")[0]["sample_key"])
    scores = bench.artifacts.read_frame("importance_scores", "a.jsonl")[0]
    key, leverage = next(
        (key, leverage)
        for key, leverage in scores.select("sample_key", "leverage").iter_rows()
        if key not in selected
    )
    told = traced(bench, key)
    assert (told.sample["state"], told.problems) == ("not selected", ())
    steps = {step.asset: step.facts for step in told.steps}
    assert steps["importance_scores"]["leverage"] == leverage
    assert steps["selected_subset"]["rank"] is None


@pytest.mark.parametrize(
    ("source_id", "reason"),
    [("gone", "missing_image"), ("cut", "undecodable_image"), ("textual", "text_only")],
)
def test_a_rejected_sample_says_why_on_reading_or_by_the_model(
    bench: Bench, source_id: str, reason: str
) -> None:
    told = traced(bench, source_id)
    assert (told.sample["state"], told.sample["reason"]) == ("rejected", reason)
    assert told.sample["detail"]
    assert [step.asset for step in told.steps] == ["raw_samples", "attention_embeddings"]
    assert [image["sha256"] for image in told.images] == (
        [sha256(bench.pool / "images" / "cut.png")] if source_id == "cut" else [None] * len(told.images)
    )
    assert told.problems == ()


def test_a_text_only_sample_that_is_kept_leads_to_the_dataset(bench: Bench) -> None:
    bench.options["text_only"] = "keep"
    bench.refresh()
    assert [step.asset for step in traced(bench, "textual").steps][-1] == "training_dataset"


def test_a_damaged_model_card_leaves_the_model_unnamed(bench: Bench) -> None:
    for card in (bench.store / "model_cards").iterdir():
        card.write_text("{")
    facts = traced(bench, "a.jsonl#0").steps[1].facts
    assert facts["model_fingerprint"]
    assert facts["model"] is None


def test_pages_of_the_ui_survive_any_shard_name(bench: Bench) -> None:
    told = traced(bench, "sub/b 한.jsonl#0")
    page = urlsplit(told.steps[0].ui)
    assert page.path == "/assets/bench/raw_samples"
    assert parse_qs(page.query) == {"partition": ["sub/b 한.jsonl"]}
    assert told.steps[3].ui == "/assets/bench/subspace_basis"
    assert urlsplit(str(told.shard_file["ui"])).path == "/assets/bench/shard_files"


def test_the_json_holds_each_asset_and_the_lines_are_for_reading(bench: Bench) -> None:
    told = traced(bench, str(chosen(bench)["sample_key"]))
    value = json.loads(json.dumps(told.to_json()))
    assert set(value) == {"sample", "shard_file", "images", "problems", *PATH}
    made_by = value["subspace_basis"]["made_by"]
    assert made_by["ui"] == f"/runs/{made_by['run_id']}"
    lines = dict(told.lines())
    assert lines["subspace_basis"] == value["subspace_basis"]["data_version"]
    assert lines["state"] == "selected"


# Finding the sample


def test_a_sample_is_found_by_prefix_id_and_place(bench: Bench) -> None:
    sample = chosen(bench)
    key = str(sample["sample_key"])
    for name in (key, key[:8], f"{sample['shard']}#{sample['row']}"):
        assert traced(bench, name).sample["sample_key"] == key
    assert traced(bench, "1002").sample["shard"] == "sub/b 한.jsonl"


def test_several_samples_of_one_id_are_listed(bench: Bench) -> None:
    with pytest.raises(SampleKeyError, match="several samples go by '3'") as caught:
        traced(bench, "3")
    assert "\n  a.jsonl#3  " in str(caught.value)
    assert "\n  bad.jsonl#3  " in str(caught.value)
    assert traced(bench, "bad.jsonl#3").sample["shard"] == "bad.jsonl"


def test_a_sample_that_two_shards_hold_is_told_apart_by_its_place(bench: Bench) -> None:
    shutil.copy(bench.pool / "a.jsonl", bench.pool / "c.jsonl")
    bench.refresh()
    key = bench.artifacts.read_frame("raw_samples", "a.jsonl")[0]["sample_key"][0]
    with pytest.raises(SampleKeyError, match=r"(?s)a\.jsonl#0 .*c\.jsonl#0 "):
        traced(bench, key)
    assert traced(bench, "c.jsonl#0").sample["sample_key"] == key


@pytest.mark.parametrize("key", ["no such sample", "a.jsonl#99", ""])
def test_an_unknown_key_says_where_was_looked(bench: Bench, key: str) -> None:
    with pytest.raises(SampleKeyError, match=r"among 13 rows of 3 shards .* prefix of one from 6"):
        traced(bench, key)


def test_a_prefix_that_is_too_short_finds_nothing(bench: Bench) -> None:
    with pytest.raises(SampleKeyError, match="from 6 characters on"):
        traced(bench, str(chosen(bench)["sample_key"])[:5])


def test_a_shard_whose_rows_cannot_be_read_is_named(bench: Bench) -> None:
    (bench.store / "raw_samples" / "a_2ejsonl.parquet").write_bytes(b"PAR1")
    with pytest.raises(SampleKeyError, match=r"1 shards have no rows that can be read, a\.jsonl for one"):
        traced(bench, "0")


def test_a_selected_sample_whose_row_has_changed_since_is_remembered(bench: Bench) -> None:
    sample = chosen(bench)
    shard = str(sample["shard"])
    rows, header = bench.artifacts.read_frame("raw_samples", shard)
    bench.artifacts.write_frame("raw_samples", rows.slice(0, 0), header, shard)
    with pytest.raises(SampleKeyError, match="it is in the selected subset, but no longer in its shard"):
        traced(bench, str(sample["sample_key"]))


# What does not fit


def rewrite(bench: Bench, asset: str, shard: str | None, **header: str) -> None:
    frame, before = bench.artifacts.read_frame(asset, shard)
    bench.artifacts.write_frame(asset, frame, {**before, **header}, shard)


def spoil_scores(bench: Bench, shard: str) -> None:
    made_from = importance_scores.provenance("older")
    versions = {"data_version": made_from, "provenance": made_from}
    rewrite(bench, "importance_scores", shard, subspace_basis="older", **versions)


def spoil_subset(bench: Bench, shard: str) -> None:
    rewrite(bench, "selected_subset", None, subspace_basis="older")


def spoil_rows(bench: Bench, shard: str) -> None:
    rewrite(bench, "raw_samples", shard, data_version="newer")


def spoil_moments(bench: Bench, shard: str) -> None:
    arrays, header = bench.artifacts.read_arrays("embedding_moments", shard)
    bench.artifacts.write_arrays("embedding_moments", arrays, {**header, "data_version": "newer"}, shard)


def remove_table(bench: Bench, shard: str) -> None:
    table, _ = receipts.recorded_table(bench.artifacts, shard)
    shutil.rmtree(bench.store / "lance" / f"{table.table}.lance")


def remove_vectors(bench: Bench, shard: str) -> None:
    table, _ = receipts.recorded_table(bench.artifacts, shard)
    shutil.rmtree(bench.store / "lance" / f"{table.table}.lance" / "data")


def remove_receipt(bench: Bench, shard: str) -> None:
    bench.artifacts.path("attention_embeddings", shard, suffix=".json").unlink()


def remove_basis(bench: Bench, shard: str) -> None:
    bench.artifacts.path("subspace_basis", suffix=".safetensors").unlink()


def leave_out_of_the_basis(bench: Bench, shard: str) -> None:
    arrays, header = bench.artifacts.read_arrays("subspace_basis")
    shards = json.loads(header["shards"])
    del shards[shard]
    bench.artifacts.write_arrays("subspace_basis", arrays, {**header, "shards": json.dumps(shards)})


def cut_scores(bench: Bench, shard: str) -> None:
    (bench.store / "importance_scores" / "a_2ejsonl.parquet").write_bytes(b"PAR1")


def remove_dataset(bench: Bench, shard: str) -> None:
    (bench.store / "training_dataset" / "train.jsonl").unlink()


def change_file(bench: Bench, shard: str) -> None:
    (bench.pool / shard).write_text((bench.pool / shard).read_text().replace("picture", "photograph"))


def change_image(bench: Bench, shard: str) -> None:
    (bench.pool / "images" / "2.png").write_bytes(png_bytes(99))


def remove_file(bench: Bench, shard: str) -> None:
    (bench.pool / shard).unlink()


def forget_index(bench: Bench, shard: str) -> None:
    shutil.rmtree(next(bench.store.glob("shard_index-*")))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_scores, r"importance_scores\[a\.jsonl\] was made from version older of subspace_basis"),
        (spoil_subset, "selected_subset was made from version older of subspace_basis"),
        (spoil_rows, r"attention_embeddings\[a\.jsonl\] was made from version .* which is now newer"),
        (spoil_moments, "subspace_basis was made from version .* which is now newer"),
        (remove_table, r"table '.*a_2ejsonl' version 1 in .* cannot be read"),
        (remove_vectors, r"table .* cannot be read .*: where its receipt .*a_2ejsonl\.json is deleted"),
        (remove_receipt, r"attention_embeddings\[a\.jsonl\] is not in the store"),
        (remove_basis, "subspace_basis is not in the store"),
        (leave_out_of_the_basis, "subspace_basis was made without this shard"),
        (cut_scores, r"importance_scores\[a\.jsonl\] cannot be read"),
        (remove_dataset, r"train\.jsonl is not there as the manifest says"),
        (change_file, "the shard file or one of its images has changed since it was read"),
        (change_image, "the shard file or one of its images has changed since it was read"),
        (remove_file, "the shard file or its images are gone"),
        (forget_index, "what the shard file held is not remembered"),
    ],
)
def test_what_does_not_fit_is_said_with_its_remedy(
    bench: Bench, spoil: Callable[[Bench, str], None], said: str
) -> None:
    assert traced(bench, "a.jsonl#2").problems == ()
    spoil(bench, "a.jsonl")
    told = traced(bench, "a.jsonl#2")
    assert told.sample["sample_key"]
    pattern = pytest.RaisesExc(ValueError, match=said)
    assert any(pattern.matches(ValueError(problem)) for problem in told.problems), told.problems
    assert all(f"scalselect run {bench.pool} --store {bench.store}" in problem for problem in told.problems)


@pytest.mark.parametrize("spoil", [spoil_scores, remove_table, remove_dataset, change_file, remove_basis])
def test_the_remedy_mends_it(bench: Bench, spoil: Callable[[Bench, str], None]) -> None:
    spoil(bench, "a.jsonl")
    bench.refresh()
    assert traced(bench, "a.jsonl#2").problems == ()
