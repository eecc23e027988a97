"""The whole path through Dagster: what runs, what comes out, and that nothing is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest

from scalselect_assets.choice.pool_rows import PoolRows
from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.embedding import attention_embeddings
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.operations.staleness import Staleness, contiguous_ranges
from scalselect_assets.operations.summary import summary
from scalselect_assets.pool.discovery import discover
from scalselect_assets.resources.locks import StoreBusyError
from scalselect_assets.subspace.basis_header import read_basis_header
from tests.bench import SHARD, WHOLE, Bench, ran
from tests.conftest import png_bytes, sharegpt_row, write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


@pytest.fixture
def bench(standing: Callable[..., Path], demo_vlm: Path) -> Bench:
    folder = standing({"a.jsonl": 5, "b.jsonl": 4})
    return Bench(folder / "pool", folder / "store", demo_vlm)


def test_a_first_refresh_makes_everything_and_a_second_nothing(bench: Bench) -> None:
    first = bench.refresh()
    assert ran(first) == [f"{SHARD}[a.jsonl]", f"{SHARD}[b.jsonl]", *WHOLE]
    assert first.embedded == ["a.jsonl", "b.jsonl"]
    before = bench.files()
    second = bench.refresh()
    assert (second.runs, second.embedded, second.added) == ([], [], [])
    assert bench.files() == before


def test_scores_equal_those_of_the_full_svd_of_all_vectors(bench: Bench) -> None:
    bench.first_refresh()
    vectors, scores = bench.vectors(), bench.scores()
    keys = sorted(vectors)
    X = np.array([vectors[key] for key in keys], np.float64)
    U, s, _ = np.linalg.svd(X - X.mean(0), full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.9)) + 1
    expected = (U[:, :k] ** 2).sum(1)
    assert summary(bench.artifacts)["rank"] == k
    np.testing.assert_allclose([scores[key] for key in keys], expected, rtol=1e-6)
    assert sum(scores.values()) == pytest.approx(k, rel=1e-6)


def test_the_selection_is_the_top_by_leverage_with_ties_by_key(bench: Bench) -> None:
    bench.first_refresh()
    chosen, _ = bench.artifacts.read_frame("selected_subset")
    all_scores = pl.concat(
        [bench.artifacts.read_frame("importance_scores", shard)[0] for shard in ("a.jsonl", "b.jsonl")]
    ).sort(["leverage", "sample_key"], descending=[True, False])
    assert chosen["sample_key"].to_list() == all_scores["sample_key"].head(5).to_list()  # 4.5 rounds half up
    assert chosen["rank"].to_list() == [1, 2, 3, 4, 5]


def test_how_the_pool_is_cut_into_shards_does_not_change_the_scores(
    bench: Bench, tmp_path: Path, demo_vlm: Path
) -> None:
    bench.first_refresh()
    one = tmp_path / "one"
    shutil.copytree(bench.pool / "images", one / "images")
    texts = [(bench.pool / shard).read_text() for shard in ("b.jsonl", "a.jsonl")]
    (one / "all.jsonl").write_text("".join(texts))
    together = Bench(one, tmp_path / "store-one", demo_vlm)
    together.refresh()
    key_of = {
        f"{shard}#{row}": key
        for shard in ("a.jsonl", "b.jsonl")
        for row, key in bench.artifacts.read_frame("raw_samples", shard)[0].select("row", "sample_key").rows()
    }
    by_key = dict(
        together.artifacts.read_frame("importance_scores", "all.jsonl")[0]
        .select("sample_key", "leverage")
        .rows()
    )
    for place, leverage in bench.scores().items():
        assert by_key[key_of[place]] == pytest.approx(leverage, rel=1e-4)


def test_a_new_shard_costs_its_own_embedding_and_a_rescoring(bench: Bench) -> None:
    bench.first_refresh()
    write_pool_shard(bench.pool, "c.jsonl", 3, seed=5000)
    report = bench.refresh()
    assert ran(report) == [f"{SHARD}[c.jsonl]", *WHOLE]
    assert (report.added, report.embedded) == (["c.jsonl"], ["c.jsonl"])
    assert bench.events("attention_embeddings") == 3
    assert summary(bench.artifacts)["embedded"] == 12


def test_a_selection_says_what_became_of_the_last_one(bench: Bench) -> None:
    def selected() -> set[tuple[str, str]]:
        return set(bench.artifacts.read_frame("selected_subset")[0].select("shard", "sample_key").iter_rows())

    bench.refresh()
    assert "churn" not in bench.metadata("selected_subset")
    before = selected()
    write_pool_shard(bench.pool, "c.jsonl", 5, seed=500)
    bench.refresh()
    after, metadata = selected(), bench.metadata("selected_subset")
    assert after - before
    assert metadata["stayed"] == len(before & after)
    assert (metadata["came"], metadata["went"]) == (len(after - before), len(before - after))
    assert metadata["churn"] == pytest.approx(len(before - after) / len(before))


def test_a_changed_row_reembeds_its_shard_only(bench: Bench) -> None:
    bench.first_refresh()
    rows = (bench.pool / "b.jsonl").read_text().splitlines()
    write_lines(bench.pool / "b.jsonl", [rows[0].replace("picture", "photograph"), *rows[1:]])
    assert bench.refresh().embedded == ["b.jsonl"]
    assert bench.events("attention_embeddings") == 3


def test_an_image_replaced_under_its_name_is_a_change(bench: Bench) -> None:
    bench.first_refresh()
    (bench.pool / "images" / "0.png").write_bytes(png_bytes(77))
    assert bench.refresh().embedded == ["a.jsonl"]


def test_a_touched_file_with_the_same_bytes_is_no_change(bench: Bench) -> None:
    bench.first_refresh()
    (bench.pool / "a.jsonl").touch()
    assert bench.refresh().runs == []


def test_a_removed_shard_leaves_the_basis_and_the_selection(bench: Bench) -> None:
    bench.first_refresh()
    (bench.pool / "a.jsonl").unlink()
    report = bench.refresh()
    assert (report.removed, ran(report)) == (["a.jsonl"], WHOLE)
    assert summary(bench.artifacts)["rows"] == 4
    assert set(bench.artifacts.read_frame("selected_subset")[0]["shard"]) == {"b.jsonl"}


def test_a_shard_that_comes_back_unchanged_is_not_embedded_again(bench: Bench, tmp_path: Path) -> None:
    bench.first_refresh()
    shutil.move(bench.pool / "a.jsonl", tmp_path / "a.jsonl")
    bench.refresh()
    shutil.move(tmp_path / "a.jsonl", bench.pool / "a.jsonl")
    report = bench.refresh()
    assert (report.added, report.embedded) == (["a.jsonl"], [])
    assert summary(bench.artifacts)["embedded"] == 9


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("budget", 3, ["selected_subset", "training_dataset"]),
        ("energy", 0.5, WHOLE),
        ("text_only", "keep", ["training_dataset"]),
    ],
)
def test_a_changed_setting_recomputes_what_depends_on_it(
    bench: Bench, option: str, value: object, expected: list[str]
) -> None:
    bench.first_refresh()
    bench.options[option] = value
    assert ran(bench.refresh()) == expected


def test_a_changed_attention_mass_embeds_again_without_reading_again(bench: Bench) -> None:
    bench.first_refresh()
    bench.options["attention_mass"] = 0.7
    report = bench.refresh()
    assert report.embedded == ["a.jsonl", "b.jsonl"]
    assert bench.events("raw_samples") == 2


def test_a_file_that_is_no_shard_fails_alone_and_its_repair_heals(bench: Bench) -> None:
    (bench.pool / "broken.json").write_bytes(png_bytes(1))
    report = bench.refresh()
    assert list(report.failed) == ["broken.json"]
    assert "broken.json" in report.failed["broken.json"]
    assert summary(bench.artifacts)["rows"] == 9
    with open_instance(bench.selection) as instance:
        check = instance.event_log_storage.get_latest_asset_check_execution_by_key(
            [dg.AssetCheckKey(bench.selection.key("subspace_basis"), "basis_covers_every_shard")]
        )
    (record,) = check.values()
    assert not record.event.dagster_event.event_specific_data.passed
    again = bench.refresh()
    assert (list(again.failed), again.runs) == (["broken.json"], [])
    write_pool_shard(bench.pool, "broken.json", 2, seed=9000)
    healed = bench.refresh()
    assert (healed.failed, healed.embedded) == ({}, ["broken.json"])
    assert summary(bench.artifacts)["rows"] == 11


def test_a_shard_that_breaks_keeps_its_last_good_vectors(bench: Bench) -> None:
    bench.first_refresh()
    (bench.pool / "a.jsonl").write_bytes(b"\x00\x01 not rows")
    report = bench.refresh()
    assert (list(report.failed), report.runs) == (["a.jsonl"], [])
    assert summary(bench.artifacts)["embedded"] == 9


def test_a_broken_shard_does_not_hold_up_a_change_of_the_model(bench: Bench) -> None:
    bench.first_refresh()
    (bench.pool / "a.jsonl").write_bytes(b"\x00\x01 not rows")
    bench.options["attention_mass"] = 0.7
    report = bench.refresh()
    assert (list(report.failed), report.embedded) == (["a.jsonl"], ["b.jsonl"])
    assert summary(bench.artifacts)["embedded"] == 4


def test_a_pool_of_which_nothing_can_be_embedded_says_so(tmp_path: Path, demo_vlm: Path) -> None:
    write_lines(tmp_path / "pool" / "a.jsonl", [sharegpt_row("gone.png"), sharegpt_row(None, "Hello?")])
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    with pytest.raises(RefreshError, match="no sample of the pool is embedded"):
        bench.refresh()


def test_an_empty_folder_and_a_missing_one_are_said_plainly(tmp_path: Path, demo_vlm: Path) -> None:
    (tmp_path / "pool").mkdir()
    with pytest.raises(RefreshError, match="no shard files"):
        Bench(tmp_path / "pool", tmp_path / "store", demo_vlm).refresh()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Bench(tmp_path / "nowhere", tmp_path / "store", demo_vlm).refresh()


def test_a_shard_of_only_bad_rows_has_no_vectors_and_holds_nobody_up(bench: Bench) -> None:
    write_lines(bench.pool / "bad.jsonl", [sharegpt_row("gone.png"), "{broken", sharegpt_row(None, "Hi?")])
    report = bench.refresh()
    assert report.failed == {}
    assert summary(bench.artifacts)["rejected"] == {"malformed_row": 1, "missing_image": 1, "text_only": 1}
    assert summary(bench.artifacts)["rows"] == 12


def test_every_rejected_row_names_file_row_id_and_reason(bench: Bench) -> None:
    (bench.pool / "images" / "cut.png").write_bytes(png_bytes(3)[:60])
    write_lines(
        bench.pool / "bad.jsonl",
        [
            sharegpt_row("gone.png", id="the missing one"),
            sharegpt_row("images/cut.png", id=7),
            sharegpt_row("images/0.png", "<image>" + "word " * 4000, id="long"),
        ],
    )
    bench.refresh()
    rejected, _ = bench.artifacts.read_frame("rejected_rows", "bad.jsonl")
    assert rejected.select("row", "line", "source_id", "reason").rows() == [
        (0, 1, "the missing one", "missing_image"),
        (1, 2, "7", "undecodable_image"),
        (2, 3, "long", "too_long"),
    ]
    assert set(rejected["file"]) == {str(bench.pool / "bad.jsonl")}
    assert rejected["sample_key"].n_unique() == 3
    assert "2,048" in rejected["detail"][2]


@pytest.mark.parametrize(
    "name",
    [
        "it's.jsonl",
        "a b%20c.jsonl",
        "한국어 데이터.jsonl",
        "x' OR '1'='1.jsonl",
        "sub/deep/s.jsonl",
        "a...b.jsonl",
    ],
)
def test_hostile_shard_names_are_safe(name: str, tmp_path: Path, demo_vlm: Path) -> None:
    pool = tmp_path / "pool"
    write_pool_shard(pool, name, 2, seed=0)
    write_pool_shard(pool, "plain.jsonl", 2, seed=50)
    bench = Bench(pool, tmp_path / "store", demo_vlm)
    report = bench.refresh()
    assert (len(report.embedded), report.failed) == (2, {})
    assert bench.refresh().runs == []
    assert summary(bench.artifacts)["embedded"] == 4


def test_ids_may_be_anything_or_collide(tmp_path: Path, demo_vlm: Path) -> None:
    pool = tmp_path / "pool"
    write_pool_shard(pool, "a.jsonl", 6, seed=0)
    rows = [json.loads(line) for line in (pool / "a.jsonl").read_text().splitlines()]
    for row, source_id in zip(rows, [1, "1", 1, None, {"x": 1}, "한"], strict=True):
        row["id"] = source_id
    del rows[3]["id"]
    write_lines(pool / "a.jsonl", rows)
    bench = Bench(pool, tmp_path / "store", demo_vlm)
    bench.options["budget"] = 6
    bench.refresh()
    chosen, _ = bench.artifacts.read_frame("selected_subset")
    assert sorted(chosen["source_id"].fill_null("-")) == ["-", "1", "1", "1", '{"x": 1}', "한"]
    assert chosen["sample_key"].n_unique() == 6


def test_the_same_sample_in_two_shards_is_kept_in_both_with_equal_scores(
    tmp_path: Path, demo_vlm: Path
) -> None:
    pool = tmp_path / "pool"
    write_pool_shard(pool, "a.jsonl", 3, seed=0)
    shutil.copy(pool / "a.jsonl", pool / "b.jsonl")
    bench = Bench(pool, tmp_path / "store", demo_vlm)
    bench.options["budget"] = 1.0
    bench.refresh()
    chosen, _ = bench.artifacts.read_frame("selected_subset")
    assert chosen.height == 6
    by_key = chosen.group_by("sample_key").agg(pl.col("leverage").n_unique(), pl.len())
    assert by_key.select(pl.col("leverage").max(), pl.col("len").min()).row(0) == (1, 2)


def test_a_pool_of_one_sample_has_no_direction_and_is_still_selected(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 1, seed=0)
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.refresh()
    result = summary(bench.artifacts)
    assert (result["rank"], result["selected"]) == (0, 1)


@pytest.mark.parametrize(
    ("path", "reruns"),
    [
        ("raw_samples/a_2ejsonl.parquet", "raw_samples"),
        ("attention_embeddings/a_2ejsonl.json", "attention_embeddings+embedding_moments[a.jsonl]"),
        ("rejected_rows/a_2ejsonl.parquet", "attention_embeddings+embedding_moments[a.jsonl]"),
        ("lance/*a_2ejsonl.lance", "attention_embeddings+embedding_moments[a.jsonl]"),
        ("embedding_moments/a_2ejsonl.safetensors", "embedding_moments[a.jsonl]"),
        ("subspace_basis/subspace_basis.safetensors", "subspace_basis"),
        ("importance_scores/a_2ejsonl.parquet", "importance_scores"),
        ("selected_subset/selected_subset.parquet", "selected_subset"),
        ("training_dataset/manifest.json", "training_dataset"),
        ("training_dataset/train.jsonl", "training_dataset"),
    ],
)
def test_what_is_deleted_by_hand_is_made_again(bench: Bench, path: str, reruns: str) -> None:
    bench.first_refresh()
    before = bench.scores()
    (found,) = bench.store.glob(path)
    shutil.rmtree(found) if found.is_dir() else found.unlink()
    report = bench.refresh()
    assert any(run.startswith(reruns) for run in report.runs), report.runs
    assert bench.scores() == pytest.approx(before, rel=1e-9)
    assert bench.refresh().runs == []


@pytest.mark.parametrize(
    "path",
    [
        "raw_samples/a_2ejsonl.parquet",
        "attention_embeddings/a_2ejsonl.json",
        "embedding_moments/a_2ejsonl.safetensors",
        "subspace_basis/subspace_basis.safetensors",
        "importance_scores/a_2ejsonl.parquet",
        "training_dataset/manifest.json",
        "training_dataset/train.jsonl",
    ],
)
def test_what_is_cut_short_is_made_again(bench: Bench, path: str) -> None:
    bench.first_refresh()
    before = (bench.store / "training_dataset" / "train.jsonl").read_text()
    (bench.store / path).write_bytes((bench.store / path).read_bytes()[:40])
    assert bench.refresh().runs != []
    assert (bench.store / "training_dataset" / "train.jsonl").read_text() == before
    assert bench.refresh().runs == []


def test_vectors_that_are_gone_are_said_to_be_and_made_again_by_the_next_run(bench: Bench) -> None:
    bench.first_refresh()
    for data in bench.store.glob("lance/*a_2ejsonl.lance/data"):
        shutil.rmtree(data)
    bench.options["energy"] = 0.5
    with pytest.raises(RefreshError, match="run again, which embeds the shard anew"):
        bench.refresh()
    assert bench.refresh().embedded == ["a.jsonl"]


def test_results_that_another_dagster_instance_made_are_not_taken_for_ones_own(bench: Bench) -> None:
    bench.first_refresh()
    mine = bench.store / "dagster"
    mine.rename(bench.store / "dagster-of-the-first")
    bench.options["budget"] = 2
    bench.refresh()
    mine.rename(bench.store / "dagster-of-the-second")
    (bench.store / "dagster-of-the-first").rename(mine)
    bench.options["budget"] = 0.5
    assert bench.refresh().runs != []
    assert summary(bench.artifacts)["selected"] == 5


def test_a_failed_check_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_embeddings,
        "_accounting",
        lambda *_: dg.AssetCheckResult(
            check_name="every_row_is_embedded_or_rejected", passed=False, metadata={"raw": 9}
        ),
    )
    for _ in range(2):
        with pytest.raises(RefreshError) as refused:
            bench.refresh()
        for shard in ("a.jsonl", "b.jsonl"):
            check = "check failed: every_row_is_embedded_or_rejected {'raw': 9}"
            assert f"attention_embeddings[{shard}]: {check}" in str(refused.value)
    assert not bench.artifacts.paths("attention_embeddings", suffix=".json")
    monkeypatch.undo()
    assert bench.refresh().problems() == []
    assert bench.refresh().runs == []


def with_wrong_scores(bench: Bench) -> pl.DataFrame:
    """Scores that do not sum to the rank in a file that is whole, and a subset that is to be chosen anew."""
    right, header = bench.artifacts.read_frame("importance_scores", "b.jsonl")
    wrong = right.with_columns(pl.col("leverage", "normalised_leverage") * 2)
    bench.artifacts.write_frame("importance_scores", wrong, header, "b.jsonl")
    bench.options["budget"] = 2
    return right


def test_a_result_whose_check_failed_is_not_written_over_a_good_one_and_every_refresh_says_so(
    bench: Bench,
) -> None:
    bench.first_refresh()
    before = {name: bench.files()[name] for name in bench.files() if "selected" in name or "train" in name}
    right = with_wrong_scores(bench)
    for _ in range(2):
        with pytest.raises(RefreshError, match="selected_subset: check failed: leverage_scores_sum_to_rank"):
            bench.refresh()
        assert {name: bench.files()[name] for name in before} == before
    with open_instance(bench.selection) as instance:
        staleness = Staleness(bench.selection, bench.storage, bench.vlm, instance)
        assert "leverage_scores_sum_to_rank" in " ".join(staleness.problems())

    # With the last options again, the last result would be current, had the check not failed since.
    bench.options["budget"] = 0.5
    with pytest.raises(RefreshError, match="leverage_scores_sum_to_rank"):
        bench.refresh()
    header = bench.artifacts.read_header("importance_scores", "b.jsonl")
    bench.artifacts.write_frame("importance_scores", right, header, "b.jsonl")
    assert bench.refresh().problems() == []
    assert bench.refresh().runs == []
    with open_instance(bench.selection) as instance:
        assert Staleness(bench.selection, bench.storage, bench.vlm, instance).problems() == []


def test_a_store_below_the_pool_is_not_part_of_it(bench: Bench, demo_vlm: Path) -> None:
    for name in ("out", "other"):
        inside = Bench(bench.pool, bench.pool / name, demo_vlm)
        inside.store.mkdir()
        (inside.store / "selection.yaml").write_text(inside.selection.to_yaml(in_store=True))
        inside.refresh()
        assert summary(inside.artifacts)["rows"] == 9


def test_scores_of_another_basis_are_refused(bench: Bench) -> None:
    bench.first_refresh()
    frame, header = bench.artifacts.read_frame("importance_scores", "b.jsonl")
    bench.artifacts.write_frame("importance_scores", frame, {**header, "subspace_basis": "older"}, "b.jsonl")
    header = read_basis_header(bench.artifacts)
    pool = PoolRows(
        bench.artifacts,
        bench.storage.embeddings(str(bench.store)),
        header,
        ["shard"],
    )
    with pytest.raises(dg.Failure, match=r"'b\.jsonl' was scored with basis older"):
        pool.all()


def test_a_refresh_that_is_told_to_stop_goes_on_next_time(bench: Bench) -> None:
    asked = iter([False, True])
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        bench.refresh(should_stop=lambda: next(asked))
    report = bench.refresh()
    assert ran(report) == [f"{SHARD}[b.jsonl]", *WHOLE]


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_a_run_that_was_killed_is_closed_as_failed(bench: Bench, status: dg.DagsterRunStatus) -> None:
    bench.first_refresh()
    job = build_defs([bench.selection]).resolve_job_def("bench_assets")
    with open_instance(bench.selection) as instance:
        run = instance.create_run_for_job(job, tags={"scalselect/refresh": "bench"}, status=status)
    bench.refresh()
    with open_instance(bench.selection) as instance:
        assert instance.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]


def test_only_one_refresh_works_on_a_store(bench: Bench) -> None:
    with (
        bench.storage.locks(str(bench.store)).refreshing(),
        pytest.raises(StoreBusyError, match="is at work"),
    ):
        bench.refresh()


def test_an_unchanged_shard_is_not_read_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.storage.samples(str(bench.pool), None, str(bench.store))
    first = discover(source, bench.artifacts)
    monkeypatch.setattr(type(source), "index_shard", lambda *_: pytest.fail("read again"))
    assert discover(source, bench.artifacts) == first


@pytest.mark.parametrize(
    ("order", "wanted", "expected"),
    [
        ("abcde", "abc", [("a", "c")]),
        ("abcde", "bde", [("b", "b"), ("d", "e")]),
        ("ace", "ae", [("a", "a"), ("e", "e")]),
        ("abc", "", []),
    ],
)
def test_ranges_are_unbroken_in_partition_order(
    order: str, wanted: str, expected: list[tuple[str, str]]
) -> None:
    assert contiguous_ranges(list(order), set(wanted)) == expected
