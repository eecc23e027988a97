"""Many shards in one run, as a backfill makes it: one model, each shard's versions, nothing done again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.embedding.device_pool import DEVICE_POOL, limit_devices
from scalselect_assets.method.representation import loading
from scalselect_assets.pool.discovery import report_discovery, settled_discovery
from scalselect_assets.resources import vlm
from tests.bench import WHOLE, Bench, ran
from tests.conftest import write_lines

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")

SHARDS = ["a.jsonl", "b.jsonl", "c.jsonl"]
BY_SHARD = ("raw_samples", "attention_embeddings", "embedding_moments")


def device_limits(instance: dg.DagsterInstance) -> list[int]:
    return [limit.limit for limit in instance.event_log_storage.get_pool_limits()]


def test_the_device_pool_has_its_limit_before_the_first_run(bench: Bench) -> None:
    with open_instance(bench.selection) as instance:
        assert device_limits(instance) == [1]


def test_a_limit_that_a_person_has_set_stays(bench: Bench) -> None:
    with open_instance(bench.selection) as instance:
        instance.event_log_storage.set_concurrency_slots(DEVICE_POOL, 4)
    with open_instance(bench.selection) as instance:
        assert device_limits(instance) == [4]


def test_an_instance_without_limits_gets_none() -> None:
    with dg.instance_for_test() as instance:
        limit_devices(instance)
        assert device_limits(instance) == []


@pytest.fixture
def bench(make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path) -> Bench:
    return Bench(make_pool(dict.fromkeys(SHARDS, 2)), tmp_path / "store", demo_vlm)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that a model is loaded."""
    loaded: list[str] = []
    load = loading.load_encoder

    def counted(model: str, **options: Any) -> Any:
        loaded.append(model)
        return load(model, **options)

    monkeypatch.setattr(loading, "load_encoder", counted)
    monkeypatch.setattr(vlm, "_LOADED", {})
    return loaded


def backfill(bench: Bench, first: str, last: str) -> bool:
    """Run all shard assets over a range in one run, as a backfill launched in the UI does."""
    selection = bench.selection
    defs = build_defs([selection], {"storage": bench.storage, "vlm": bench.vlm})
    with open_instance(selection) as instance:
        source = selection.open_pool(bench.storage)
        report_discovery(selection, instance, settled_discovery(source, bench.artifacts, 0))
        return (
            defs.resolve_job_def("bench_assets")
            .execute_in_process(
                instance=instance,
                asset_selection=[selection.key(name) for name in BY_SHARD],
                tags={
                    "dagster/asset_partition_range_start": first,
                    "dagster/asset_partition_range_end": last,
                },
                raise_on_error=False,
            )
            .success
        )


def test_a_backfill_loads_the_model_once_and_leaves_nothing_stale(bench: Bench, loads: list[str]) -> None:
    assert backfill(bench, "a.jsonl", "c.jsonl")
    assert len(loads) == 1
    assert [bench.events(name) for name in BY_SHARD] == [3, 3, 3]
    assert ran(bench.refresh()) == WHOLE


def test_a_backfill_goes_on_past_a_shard_that_cannot_be_read(bench: Bench) -> None:
    (bench.pool / "b.jsonl").write_text("this is no shard")
    assert not backfill(bench, "a.jsonl", "c.jsonl")
    assert bench.events("raw_samples") == 2
    write_lines(bench.pool / "b.jsonl", [])
    runs = ran(bench.refresh())
    assert [run for run in runs if run.startswith("raw_samples")] == [
        "raw_samples+attention_embeddings+embedding_moments[b.jsonl]"
    ]
    assert runs[-4:] == WHOLE


def test_a_subset_tells_what_its_cycle_cost(bench: Bench) -> None:
    bench.refresh()
    metadata = bench.metadata("selected_subset")
    assert [metadata[f"cycle_{name}"] for name in ("shards_embedded", "shards_reused")] == [3, 0]
    assert [metadata[f"cycle_{name}"] for name in ("samples_embedded", "samples_reused")] == [6, 0]
    assert 0 < metadata["cycle_seconds"] < 600

    rows = (bench.pool / "b.jsonl").read_text().splitlines()
    write_lines(bench.pool / "b.jsonl", [rows[0], rows[1].replace("picture", "photo")])
    bench.refresh()
    metadata = bench.metadata("selected_subset")
    assert [metadata[f"cycle_{name}"] for name in ("shards_embedded", "shards_reused")] == [1, 2]
    assert [metadata[f"cycle_{name}"] for name in ("samples_embedded", "samples_reused")] == [1, 5]
    assert metadata["drift_score_change"] > 0
    assert {"stayed", "came", "went", "churn"} <= set(metadata)
