"""Every asset check fails, in a real store, for the reason that it exists for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from scalselect_assets.choice import duplicate_removal, removed_samples
from scalselect_assets.dataset.training_dataset import write_dataset
from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.recording.checks import FailedCheckError
from scalselect_assets.recording.columns import polars_schema
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.embedding_store import EmbeddingStore
from tests.bench import Bench
from tests.conftest import png_bytes, sharegpt_row, write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")

PROVED_HERE = {
    "every_row_is_embedded_or_rejected",
    "some_rows_are_embedded",
    "basis_covers_every_shard",
    "every_partner_is_kept",
    "no_shard_is_removed_whole",
    "selection_covers_every_shard",
    "listed_samples_are_in_the_pool",
    "every_selected_row_is_written",
    "every_file_of_the_pool_is_read",
}
PROVED_ELSEWHERE = {
    "leverage_scores_sum_to_rank",  # operations/test_refresh.py
    "exports_pass_their_preflight",  # dataset/test_training_dataset.py
    "choice_is_as_distinct_as_random",  # choice/test_advice.py
    "questions_follow_their_images",  # choice/test_image_places.py
    "every_evaluation_file_is_read",  # choice/test_decontamination.py
    "report_counts_every_row",  # report/test_selection_report.py
    "gallery_pictures_open",  # report/test_selection_report.py
}


@pytest.fixture
def bench(standing: Callable[..., Path], demo_vlm: Path) -> Bench:
    folder = standing({"a.jsonl": 5, "b.jsonl": 4})
    return Bench(folder / "pool", folder / "store", demo_vlm)


def evaluation_of(bench: Bench, asset: str, check: str, shard: str | None = None) -> dg.AssetCheckEvaluation:
    """The last evaluation of a check that was completed."""
    with open_instance(bench.selection) as instance:
        record = Records(instance).last_check(dg.AssetCheckKey(bench.selection.key(asset), check), shard)
    assert record is not None, f"{check} was never evaluated"
    assert record.event is not None
    found: dg.AssetCheckEvaluation = record.event.dagster_event.asset_check_evaluation_data  # type: ignore[union-attr]
    return found


def values(evaluation: dg.AssetCheckEvaluation) -> dict[str, Any]:
    return {name: value.value for name, value in evaluation.metadata.items()}


def test_each_check_that_an_asset_declares_is_proved(bench: Bench) -> None:
    bench.options |= {
        "near_duplicates": {},
        "decontamination": {"texts": str(bench.pool / "texts.txt")},
        "report": True,
        "exports": [{"format": "trl"}],
    }
    graph = build_defs([bench.selection]).resolve_asset_graph()
    declared = {key.name for key in graph.asset_check_keys}
    assert declared == PROVED_HERE | PROVED_ELSEWHERE


def test_a_row_that_the_table_lost_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = EmbeddingStore.replace

    def forgetful(self: EmbeddingStore, fingerprint: str, shard: str, **columns: Any) -> Any:
        kept = {name: columns[name][:-1] for name in ("rows", "sample_keys", "source_ids", "vectors")}
        attributes = {
            name: values.slice(0, len(values) - 1) for name, values in columns["attributes"].items()
        }
        return replace(self, fingerprint, shard, **{**columns, **kept, "attributes": attributes})

    monkeypatch.setattr(EmbeddingStore, "replace", forgetful)
    with pytest.raises(RefreshError, match=r"every_row_is_embedded_or_rejected .*'raw': 5, 'embedded': 4"):
        bench.refresh()
    monkeypatch.undo()
    assert bench.refresh().problems() == []


def test_a_shard_without_a_usable_row_and_a_file_that_is_no_shard_are_warned_of(bench: Bench) -> None:
    write_lines(bench.pool / "empty.jsonl", [sharegpt_row("images/none.png", "<image>\nWhat?", id=1)])
    (bench.pool / "broken.json").write_bytes(png_bytes(1))
    (bench.pool / "notes.docx").write_bytes(b"not a shard")
    bench.refresh()

    empty = evaluation_of(bench, "attention_embeddings", "some_rows_are_embedded", "empty.jsonl")
    assert (empty.passed, values(empty)) == (False, {"raw": 1, "embedded": 0})
    assert evaluation_of(bench, "attention_embeddings", "some_rows_are_embedded", "a.jsonl").passed
    for asset, check in (
        ("subspace_basis", "basis_covers_every_shard"),
        ("selected_subset", "selection_covers_every_shard"),
    ):
        missing = evaluation_of(bench, asset, check)
        assert not missing.passed
        assert missing.severity is dg.AssetCheckSeverity.WARN
        assert values(missing)["missing_shards"] == ["broken.json"]
    unread = evaluation_of(bench, "training_dataset", "every_file_of_the_pool_is_read")
    assert not unread.passed
    assert "notes.docx" in str(values(unread)["passed_over"])


def test_an_entry_of_a_list_that_names_nothing_is_warned_of(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "include.txt").write_text("0\nno-such-sample\n")
    bench.options["include"] = str(tmp_path / "include.txt")
    bench.refresh()
    listed = evaluation_of(bench, "selected_subset", "listed_samples_are_in_the_pool")
    assert (listed.passed, values(listed)) == (False, {"n_unknown": 1, "unknown": ["no-such-sample"]})


def test_a_shard_that_is_the_evaluation_set_is_warned_of(bench: Bench, tmp_path: Path) -> None:
    write_pool_shard(bench.pool, "copy.jsonl", 2, seed=700)
    (tmp_path / "benchmark").mkdir()
    for number in (700, 701):
        (tmp_path / "benchmark" / f"{number}.png").write_bytes(png_bytes(number))
    bench.options["decontamination"] = {"images": str(tmp_path / "benchmark"), "max_hamming": None}
    bench.refresh()
    whole = evaluation_of(bench, "removed_samples", "no_shard_is_removed_whole")
    assert (whole.passed, values(whole)["shards"]) == (False, ["copy.jsonl"])


def test_a_sample_that_is_removed_for_a_removed_one_is_noticed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = polars_schema(duplicate_removal.NEAR_DUPLICATES)

    def removed(shard: str, row: int, partner: int) -> dict[str, Any]:
        return dict.fromkeys(schema.names()) | {
            "shard": shard,
            "row": row,
            "sample_key": f"key-{row}",
            "partner_shard": shard,
            "partner_row": partner,
            "partner_key": f"key-{partner}",
        }

    frame = pl.DataFrame([removed("a.jsonl", 1, 2), removed("a.jsonl", 2, 3)], schema=schema)
    find = duplicate_removal.find
    monkeypatch.setattr(duplicate_removal, "find", lambda *a, **k: (frame, find(*a, **k)[1]))
    bench.options["near_duplicates"] = {}
    with pytest.raises(RefreshError, match=r"every_partner_is_kept .*'removed_for_a_removed_one': 1"):
        bench.refresh()
    assert not bench.artifacts.exists(removed_samples.NAME, suffix=".parquet")


def test_a_selected_row_that_is_not_written_is_noticed(bench: Bench) -> None:
    bench.first_refresh()
    subset, header = bench.artifacts.read_frame("selected_subset")
    gone = subset.head(1).with_columns(shard=pl.lit("gone.jsonl"))
    bench.artifacts.write_frame("selected_subset", pl.concat([subset, gone]), header)
    with pytest.raises(FailedCheckError, match=r"every_selected_row_is_written .*'selected': 6"):
        write_dataset(bench.selection, bench.storage, bench.vlm, ["a.jsonl", "b.jsonl"])
