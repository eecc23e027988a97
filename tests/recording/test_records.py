"""The door to Dagster's records: an interruption waits for each call of it, and nobody goes round it."""

import ast
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy import Engine, ExceptionContext, event

from scalselect_assets.recording import records as door
from scalselect_assets.recording.data_versions import DATA_VERSION_TAG, recorded_versions
from scalselect_assets.recording.records import Records, RunLog, RunRecords, open_instance
from tests.bypasses import PRODUCT, ROOT, bypasses

KEY, PARTITIONS = dg.AssetKey("made"), dg.DynamicPartitionsDefinition(name="s_shards")
SHARDS = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A process that was started with `&` ignores SIGINT; these tests must not depend on that."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("s_shards", SHARDS)
        yield instance


def made(instance: dg.DagsterInstance, shard: str | None, version: str) -> None:
    instance.report_runless_asset_event(
        dg.AssetMaterialization(KEY, partition=shard, metadata=recorded_versions(version, f"p-{version}"))
    )


def seen(instance: dg.DagsterInstance, shard: str, version: str) -> None:
    instance.report_runless_asset_event(
        dg.AssetObservation(KEY, partition=shard, tags={DATA_VERSION_TAG: version})
    )


# What it answers


@pytest.mark.parametrize("per_query", [1, 2, 1000])
def test_the_latest_of_each_shard_is_found_whatever_the_page(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, per_query: int
) -> None:
    monkeypatch.setattr(door, "_RECORDS_PER_QUERY", per_query)
    for version in ("1", "2"):
        for shard in SHARDS:
            made(instance, shard, f"{shard}{version}")
            seen(instance, shard, f"seen-{shard}{version}")
    records = Records(instance)
    assert records.latest_versions(KEY, SHARDS) == {
        shard: {"data_version": f"{shard}2", "provenance": f"p-{shard}2"} for shard in SHARDS
    }
    assert records.latest_versions(KEY, ["b"]) == {"b": {"data_version": "b2", "provenance": "p-b2"}}
    assert records.latest_observed(KEY, SHARDS) == {shard: f"seen-{shard}2" for shard in SHARDS}


@pytest.mark.parametrize("per_query", [1, 2, 1000])
def test_materializations_since_a_place_are_all_those_after_it(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, per_query: int
) -> None:
    monkeypatch.setattr(door, "_RECORDS_PER_QUERY", per_query)
    records = Records(instance)
    assert records.latest_storage_id(KEY) is None
    for shard in SHARDS:
        made(instance, shard, shard)
    begin = records.latest_storage_id(KEY)
    for shard in SHARDS:
        made(instance, shard, f"{shard}2")
    assert [one.partition for one in records.materializations_since(KEY, begin)] == ["c", "b", "a"]
    assert len(list(records.materializations_since(KEY, None))) == 6


def test_the_run_that_made_a_version_is_found_behind_newer_ones(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_NEWEST_PER_QUERY", 2)

    @dg.asset(key=KEY)
    def asset() -> dg.MaterializeResult:
        return dg.MaterializeResult(data_version=dg.DataVersion("wanted"))

    run = dg.materialize([asset], instance=instance)
    for number in range(5):
        made(instance, None, f"newer{number}")
    found = Records(instance).made_by(KEY, None, "wanted")
    assert found is not None
    assert (found.run_id, found.job) == (run.run_id, "__ephemeral_asset_job__")
    assert abs((datetime.now(UTC) - found.at).total_seconds()) < 3600
    assert Records(instance).made_by(KEY, None, "never made") is None


# An interruption waits


@contextmanager
def interrupted_at_every_statement() -> Iterator[tuple[list[str], list[str]]]:
    """Interrupt before each statement; yields those that were begun and those that were done."""
    begun, done = list[str](), list[str]()

    def before(*of: Any) -> None:
        begun.append(of[2])
        signal.raise_signal(signal.SIGINT)

    def after(*of: Any) -> None:
        done.append(of[2])

    def refused(error: ExceptionContext) -> None:
        # Dagster inserts the key of an asset that it may know, and updates it then.
        if isinstance(error.original_exception, sqlite3.IntegrityError):
            done.append(str(error.statement))

    listeners = {"before_cursor_execute": before, "after_cursor_execute": after, "handle_error": refused}
    for name, listener in listeners.items():
        event.listen(Engine, name, listener)
    try:
        yield begun, done
    finally:
        for name, listener in listeners.items():
            event.remove(Engine, name, listener)


@dg.asset(key=KEY)
def an_asset() -> None: ...


JOB = dg.Definitions(
    assets=[an_asset], jobs=[dg.define_asset_job("job", [an_asset])], executor=dg.in_process_executor
).resolve_job_def("job")
CHECK = dg.AssetCheckKey(KEY, "check")
CALLS: dict[str, Callable[[Records], object]] = {
    "latest_versions": lambda records: records.latest_versions(KEY, SHARDS),
    "latest_observed": lambda records: records.latest_observed(KEY, SHARDS),
    "made_by": lambda records: records.made_by(KEY, "a", "v"),
    "latest_materialization": lambda records: records.latest_materialization(KEY),
    "latest_storage_id": lambda records: records.latest_storage_id(KEY),
    "materializations_since": lambda records: list(records.materializations_since(KEY, None)),
    "latest_observation": lambda records: records.latest_observation(KEY),
    "report": lambda records: records.report(dg.AssetObservation(KEY)),
    "known_shards": lambda records: records.known_shards("s"),
    "add_shards": lambda records: records.add_shards("s", ["d"]),
    "delete_shards": lambda records: records.delete_shards("s", ["a"]),
    "execute": lambda records: records.execute(JOB, [KEY]),
    "runs": lambda records: records.runs(dg.RunsFilter(job_name="job")),
    "is_being_stopped": lambda records: records.is_being_stopped("0000"),
    "close_runs": lambda records: records.close_runs(dg.RunsFilter(job_name="job"), "stopped"),
    "set_default_limit": lambda records: records.set_default_limit("device"),
    "is_limited_by_op": lambda records: records.is_limited_by_op("device"),
    "last_check": lambda records: records.last_check(CHECK),
    "shards_that_failed": lambda records: records.shards_that_failed(CHECK),
}
FROM_MEMORY = {"ends_dead_runs"}


def test_every_method_of_the_door_is_tried() -> None:
    assert {name for name in vars(Records) if not name.startswith("_")} == CALLS.keys() | FROM_MEMORY


@pytest.mark.parametrize("name", CALLS)
def test_an_interruption_waits_until_dagster_has_answered(name: str) -> None:
    settings = {"concurrency": {"pools": {"default_limit": 1}}} if name == "set_default_limit" else {}
    with dg.DagsterInstance.ephemeral(settings=settings) as instance:
        instance.add_dynamic_partitions("s_shards", SHARDS)
        made(instance, "a", "v")
        instance.create_run_for_job(JOB)
        with interrupted_at_every_statement() as (begun, done):
            with pytest.raises((KeyboardInterrupt, dg.DagsterExecutionInterruptedError)):
                CALLS[name](Records(instance))
            assert done == begun
    assert begun


def test_an_instance_is_opened_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    with interrupted_at_every_statement() as (begun, done):
        with pytest.raises(KeyboardInterrupt):
            open_instance(tmp_path)
        assert done == begun
    assert begun
    with open_instance(tmp_path) as instance:
        assert instance.get_runs() == []


@pytest.mark.parametrize(
    ("round_it", "through_it"),
    [
        (lambda context: context.log.info("line"), lambda context: RunRecords(context).log.info("line")),
        (lambda context: context.log.error("line"), lambda context: RunRecords(context).log.error("line")),
        (
            lambda context: context.log.log(20, "line"),
            lambda context: RunRecords(context).log.log(20, "line"),
        ),
        (
            lambda context: context.log_event(dg.AssetObservation(KEY)),
            lambda context: RunRecords(context).log_event(dg.AssetObservation(KEY)),
        ),
        (
            lambda context: context.add_asset_metadata({"n": 1}, asset_key=KEY, partition_key="a"),
            lambda context: RunRecords(context).add_metadata(KEY, "a", {"n": 1}),
        ),
        (lambda context: context.partition_keys, lambda context: RunRecords(context).shards()),
        (
            lambda context: context.instance.get_dynamic_partitions("s_shards"),
            lambda context: RunRecords(context).known_shards("s"),
        ),
    ],
    ids=["info", "error", "log", "event", "metadata", "shards", "instance"],
)
def test_what_an_asset_says_and_asks_is_noticed_where_it_bypasses_the_door(
    instance: dg.DagsterInstance,
    round_it: Callable[[dg.AssetExecutionContext], object],
    through_it: Callable[[dg.AssetExecutionContext], object],
) -> None:
    def statements_of(call: Callable[[dg.AssetExecutionContext], object]) -> list[str]:
        @dg.asset(key=KEY, partitions_def=PARTITIONS, backfill_policy=dg.BackfillPolicy.single_run())
        def asset(context: dg.AssetExecutionContext) -> None:
            with bypasses(Path(__file__).parent, *PRODUCT) as found:
                call(context)
            bypassed.extend(found)

        bypassed: list[str] = []
        tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
        assert dg.materialize([asset], instance=instance, tags=tags).success
        return bypassed

    assert statements_of(round_it) != []
    assert statements_of(through_it) == []


def test_a_line_of_the_log_arrives_as_it_was_written(instance: dg.DagsterInstance) -> None:
    @dg.asset
    def speaks(context: dg.AssetExecutionContext) -> None:
        assert isinstance(RunRecords(context).log, RunLog)
        RunRecords(context).log.warning("%d of %s", 3, "shards")

    run = dg.materialize([speaks], instance=instance)
    lines = [record.user_message for record in instance.all_logs(run.run_id)]
    assert "3 of shards" in lines


# Nobody goes round it

_IN_MEMORY = {
    *("asset_key", "instance", "repository_def", "retry_number", "run_id"),
    *("cursor", "update_cursor", "set_forkserver_preload"),
}
"""What modules may use of a context: its instance, to pass it on, and what Dagster holds in memory."""


def rounds(source: str) -> list[str]:
    """The expressions of a module that ask or tell Dagster without the door."""

    def last_name(node: ast.expr) -> str:
        return getattr(node, "id", "") or getattr(node, "attr", "")

    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and (
            last_name(node.value).lstrip("_") == "instance"
            or (last_name(node.value).lstrip("_") == "context" and node.attr not in _IN_MEMORY)
            or last_name(node.value) == "DagsterInstance"
            or node.attr == "execute_in_process"
        )
    ]


@pytest.mark.parametrize(
    "line",
    [
        "instance.get_runs()",
        "self._instance.report_runless_asset_event(observation)",
        "context.instance.get_latest_materialization_event(key)",
        "fetch = instance.event_log_storage",
        "context.log.info('a line')",
        "say = context.log",
        "self._context.log_event(observation)",
        "shards = context.partition_keys",
        "context.add_asset_metadata(metadata, partition_key=shard)",
        "dg.DagsterInstance.get()",
        "job.execute_in_process(instance=instance)",
    ],
)
def test_a_call_round_the_door_is_found_in_a_source(line: str) -> None:
    assert len(rounds(line)) >= 1


def test_no_module_calls_dagsters_records_but_through_the_door() -> None:
    files = [file for folder in (*PRODUCT, ROOT / "resources") for file in sorted(folder.rglob("*.py"))]
    found = {str(file.relative_to(ROOT)): rounds(file.read_text(encoding="utf-8")) for file in files}
    door_itself = str(Path(door.__file__).relative_to(ROOT))
    assert found.pop(door_itself) != []
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_interruptions_are_deferred_in_the_door_and_where_threads_are_waited_for() -> None:
    uses = {
        str(file.relative_to(ROOT)): sum(
            isinstance(node, ast.Name) and node.id == "deferred"
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        )
        for folder in PRODUCT
        for file in sorted(folder.rglob("*.py"))
    }
    assert {file: n for file, n in uses.items() if n} == {
        "scalselect_assets/method/representation/encoder.py": 2,
        "scalselect_assets/method/subspace/moments.py": 1,
        "scalselect_assets/recording/records.py": 3,
    }
