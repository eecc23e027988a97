"""Checks of severity ERROR: a result that fails one is not written, and stays out of date until it passes.

An asset asks `require_passed` before it writes. A failed check is recorded in Dagster and fails the step, so
that the last good result stays and every later refresh tries again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecord,
    AssetCheckExecutionRecordStatus,
)

from scalselect_assets.recording.records import Records, RunRecords

FAILED_CHECKS = "failed_checks"
"""The key of a failure's metadata that holds the findings of the failed checks, by name."""


class FailedCheckError(RuntimeError):
    """A result failed checks of severity ERROR and was not written."""

    def __init__(self, checks: Sequence[dg.AssetCheckResult]) -> None:
        super().__init__("; ".join(f"{check.check_name} {_seen(check)}" for check in checks))
        self.checks = checks


def require_passed(*checks: dg.AssetCheckResult) -> None:
    """Require that no check of severity ERROR has failed, so that the result can be written.

    Raises:
        FailedCheckError: A check of severity ERROR has failed.
    """
    failed = [check for check in checks if not check.passed and check.severity is dg.AssetCheckSeverity.ERROR]
    if failed:
        raise FailedCheckError(failed)


def as_failure(
    context: dg.AssetExecutionContext, what: str, error: FailedCheckError, shard: str | None
) -> dg.Failure:
    """Record failed checks, and return the failure of the step.

    Args:
        context: Context of the asset.
        what: Asset and shard, for the message.
        error: The error with the failed checks.
        shard: The shard, if the asset has one output per shard.
    """
    records = RunRecords(context)
    for check in error.checks:
        records.log_event(
            dg.AssetCheckEvaluation(
                context.asset_key,
                str(check.check_name),
                passed=False,
                metadata=check.metadata,
                severity=check.severity,
                partition=shard,
            )
        )
    return dg.Failure(
        f"{what}: check failed: {error}; it was not written, and the last result stays. Run again; where the "
        "check fails again, `scalselect verify --deep` names what is damaged",
        metadata={FAILED_CHECKS: {str(check.check_name): _seen(check) for check in error.checks}},
        allow_retries=False,
    )


def failed_checks(records: Records, asset: dg.AssetKey, names: Sequence[str]) -> dict[str, str]:
    """The results, by name, of an asset's checks over the pool whose last evaluation failed."""
    failed = {}
    for name in names:
        record = records.last_check(dg.AssetCheckKey(asset, name))
        if record is not None and record.status is AssetCheckExecutionRecordStatus.FAILED:
            failed[name] = _seen_in(record)
    return failed


def shards_with_failed_checks(records: Records, asset: dg.AssetKey, names: Sequence[str]) -> dict[str, str]:
    """The results, by shard, of a check whose last evaluation for the shard failed."""
    failed = {}
    for name in names:
        check = dg.AssetCheckKey(asset, name)
        for shard in records.shards_that_failed(check):
            record = records.last_check(check, shard)
            if record is not None and record.status is AssetCheckExecutionRecordStatus.FAILED:
                failed[shard] = f"{name} {_seen_in(record)}"
    return failed


def _seen(check: dg.AssetCheckResult) -> str:
    return str({name: getattr(value, "value", value) for name, value in (check.metadata or {}).items()})


def _seen_in(record: AssetCheckExecutionRecord) -> str:
    event = record.event.dagster_event if record.event else None
    metadata: Mapping[str, Any] = event.asset_check_evaluation_data.metadata if event else {}
    return str({name: value.value for name, value in metadata.items()})
