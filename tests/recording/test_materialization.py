"""What asset bodies share: runs of one shard or of many, faults that pass and that stay, turns at writing."""

import errno
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from scalselect_assets.recording import materialization
from scalselect_assets.recording.data_versions import DATA_VERSION_TAG, recorded
from scalselect_assets.recording.materialization import Output, at_work, materialize_shards
from scalselect_assets.resources.locks import StoreBusyError, StoreLocks

SHARDS = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialization, "RETRY_SECONDS", 0.001)


def output(shard: str, *, passed: bool = True) -> Output:
    check = dg.AssetCheckResult(check_name="is_fine", passed=passed)
    return Output(f"v-{shard}", f"p-{shard}", {"named": shard}, (check,))


def run(
    folder: Path,
    make: Callable[[str], Output],
    instance: dg.DagsterInstance,
    *,
    first: str = "a",
    last: str | None = None,
) -> dg.ExecuteInProcessResult:
    @dg.asset(
        partitions_def=dg.StaticPartitionsDefinition(SHARDS),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[dg.AssetCheckSpec("is_fine", asset="made")],
    )
    def made(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        return materialize_shards(context, StoreLocks(folder), make)

    if last is None:
        return dg.materialize([made], partition_key=first, instance=instance, raise_on_error=False)
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    return dg.materialize([made], tags=tags, instance=instance, raise_on_error=False)


def recorded_by_shard(instance: dg.DagsterInstance) -> dict[str, dict[str, str]]:
    records = instance.fetch_materializations(dg.AssetKey("made"), limit=100).records
    found = [record.asset_materialization for record in records]
    assert len({made.partition for made in found if made}) == len(found), "a shard is recorded twice"
    return {made.partition: recorded(made) for made in found if made and made.partition}


def failure(result: dg.ExecuteInProcessResult) -> str:
    events = [event for event in result.all_events if event.is_step_failure]
    data = events[-1].step_failure_data
    return data.user_failure_data.description if data.user_failure_data else data.error.message  # type: ignore[union-attr, return-value]


def test_a_run_of_one_shard_has_its_versions(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, output, instance)
        made = result.asset_materializations_for_node("made")[0]
        assert made.tags[DATA_VERSION_TAG] == "v-a"
        assert recorded(made) == {"data_version": "v-a", "provenance": "p-a"}
        assert [check.passed for check in result.get_asset_check_evaluations()] == [True]


def test_a_run_of_many_shards_records_each_with_its_own_versions(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, lambda shard: output(shard, passed=shard != "b"), instance, last="c")
        assert result.success
        assert recorded_by_shard(instance) == {
            shard: {"data_version": f"v-{shard}", "provenance": f"p-{shard}"} for shard in SHARDS
        }
        (check,) = result.get_asset_check_evaluations()
        assert not check.passed
        assert check.metadata["failed_shards"].value == ["b"]


def test_a_shard_that_fails_does_not_stop_the_others_of_its_run(tmp_path: Path) -> None:
    def make(shard: str) -> Output:
        if shard == "b":
            raise dg.Failure("row 7 is odd", allow_retries=False)
        return output(shard)

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, make, instance, last="c")
        assert not result.success
        assert failure(result) == "1 of 3 shards failed, the others are done: b: row 7 is odd"
        assert set(recorded_by_shard(instance)) == {"a", "c"}


def test_a_range_the_wrong_way_round_is_not_a_success(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, output, instance, first="c", last="a")
        assert not result.success
        assert "covers no shard" in failure(result)


def test_a_fault_that_passes_is_tried_again(tmp_path: Path) -> None:
    faults = iter([OSError(errno.ESTALE, "Stale file handle", "x"), OSError(errno.EIO, "I/O error"), None])

    def make(shard: str) -> Output:
        if (fault := next(faults)) is not None:
            raise fault
        return output(shard)

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, make, instance)
        assert result.success
        assert len([event for event in result.all_events if event.is_step_up_for_retry]) == 2


def test_a_fault_that_does_not_pass_ends_with_what_it_was(tmp_path: Path) -> None:
    def make(_shard: str) -> Output:
        raise OSError(errno.ETIMEDOUT, "Connection timed out", "/pool/a.jsonl")

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, make, instance)
        retries = [event for event in result.all_events if event.is_step_up_for_retry]
        assert len(retries) == materialization.RETRIES
        assert failure(result) == (
            "made[a]: Connection timed out (/pool/a.jsonl); it did not pass in 3 retries, run again"
        )


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "mount it for writing"), (errno.EACCES, "permission")],
)
def test_a_fault_that_stays_is_not_retried_and_says_what_to_do(
    tmp_path: Path, number: int, remedy: str
) -> None:
    def make(_shard: str) -> Output:
        raise OSError(number, "it says", "/store/file")

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, make, instance)
        assert not any(event.is_step_up_for_retry for event in result.all_events)
        assert failure(result).startswith("made[a]: it says (/store/file); ")
        assert remedy in failure(result)


def test_an_error_of_the_project_passes_as_it_is(tmp_path: Path) -> None:
    def make(_shard: str) -> Output:
        raise FileNotFoundError("no pool at /x: mount it")

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, make, instance)
        assert "FileNotFoundError: no pool at /x: mount it" in str(
            [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
        )


def test_whoever_is_stopped_is_not_tried_again(tmp_path: Path) -> None:
    def make(_shard: str) -> Output:
        raise dg.DagsterExecutionInterruptedError

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(tmp_path, make, instance)
        assert not result.success
        assert not any(event.is_step_up_for_retry for event in result.all_events)


def test_writers_of_a_shard_hold_it_and_nothing_else(tmp_path: Path) -> None:
    locks = StoreLocks(tmp_path)

    def make(shard: str) -> Output:
        with locks.writing("b", pytest.fail):
            pass
        with pytest.raises(StoreBusyError), locks.alone():
            pass
        with pytest.raises(TimeoutError), locks.writing("a", refuse):
            pass
        return output(shard)

    def refuse(_message: str) -> None:
        raise TimeoutError

    with dg.DagsterInstance.ephemeral() as instance:
        assert run(tmp_path, make, instance).success


def test_an_asset_over_all_shards_is_locked_by_its_name(tmp_path: Path) -> None:
    locks = StoreLocks(tmp_path)

    @dg.asset
    def whole(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        def refuse(_message: str) -> None:
            raise TimeoutError

        with at_work(context, locks):
            with pytest.raises(TimeoutError), locks.writing("whole", refuse):
                pass
            return Output("v", "p", {}).result()

    assert dg.materialize([whole]).success
