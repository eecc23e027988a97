"""What a cycle has cost, counted from the event log alone."""

from collections.abc import Iterator

import dagster as dg
import pytest

from scalselect_assets.recording.cycle import Cycle, since_last

SUBSET, EMBEDDINGS, BASIS = (dg.AssetKey(["s", name]) for name in ("subset", "embeddings", "basis"))


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def made(
    instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None = None, **metadata: float
) -> None:
    instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=partition, metadata=metadata))


def cycle(instance: dg.DagsterInstance, **rows: int) -> Cycle:
    return since_last(instance, SUBSET, EMBEDDINGS, [BASIS], rows)


def test_the_first_cycle_has_reused_nothing(instance: dg.DagsterInstance) -> None:
    made(instance, EMBEDDINGS, "a", seconds=2.0, computed_rows=3)
    made(instance, EMBEDDINGS, "b", seconds=1.5, computed_rows=4)
    made(instance, BASIS, seconds=0.25)
    assert cycle(instance, a=3, b=4) == Cycle(2, 0, 7, 0, {"embeddings": 3.5, "basis": 0.25})


def test_a_cycle_counts_from_the_last_subset_on(instance: dg.DagsterInstance) -> None:
    made(instance, EMBEDDINGS, "a", seconds=2.0, computed_rows=3)
    made(instance, SUBSET)
    made(instance, EMBEDDINGS, "b", seconds=1.0, computed_rows=1)
    assert cycle(instance, a=3, b=4) == Cycle(1, 1, 1, 6, {"embeddings": 1.0, "basis": 0.0})


def test_work_that_was_done_twice_costs_twice_but_embeds_once(instance: dg.DagsterInstance) -> None:
    made(instance, EMBEDDINGS, "a", seconds=2.0, computed_rows=3)
    made(instance, EMBEDDINGS, "a", seconds=0.5, computed_rows=0)
    made(instance, EMBEDDINGS, "b", seconds=1.0, computed_rows=4)
    made(instance, EMBEDDINGS, "b", seconds=1.0, computed_rows=4)
    assert cycle(instance, a=3, b=4) == Cycle(2, 0, 7, 0, {"embeddings": 4.5, "basis": 0.0})


def test_a_shard_that_is_gone_cost_time_but_is_not_of_the_pool(instance: dg.DagsterInstance) -> None:
    made(instance, EMBEDDINGS, "gone", seconds=2.0, computed_rows=3)
    assert cycle(instance, a=3) == Cycle(0, 1, 0, 3, {"embeddings": 2.0, "basis": 0.0})


def test_more_records_than_dagster_gives_at_once_are_all_counted(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalselect_assets.recording.records._RECORDS_PER_QUERY", 2)
    for number in range(5):
        made(instance, EMBEDDINGS, f"s{number}", seconds=1.0, computed_rows=2)
    found = cycle(instance, **{f"s{number}": 2 for number in range(5)})
    assert (found.shards_embedded, found.samples_embedded, found.seconds["embeddings"]) == (5, 10, 5.0)


def test_the_numbers_that_people_watch_are_plain(instance: dg.DagsterInstance) -> None:
    metadata = Cycle(1, 2, 3, 4, {"embeddings": 1.0, "basis": 0.5}).metadata()
    assert {name: type(value) for name, value in metadata.items() if name != "cycle_seconds_by_asset"} == {
        "cycle_shards_embedded": int,
        "cycle_shards_reused": int,
        "cycle_samples_embedded": int,
        "cycle_samples_reused": int,
        "cycle_seconds": float,
    }
