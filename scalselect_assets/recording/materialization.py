"""The frame of every asset body: locks, faults, and runs over one shard or many.

A body says how to make one shard, or the asset over all shards; this module holds what is the same for all
bodies. Locks: whoever writes a shard's rows, vectors or moments holds that shard. Two daemons, or a daemon
and the command line, therefore take turns, and the second one finds the work done. Retries: a fault that may
pass (a network file system that does not answer) is tried again, each time after a longer wait. A fault that
stays (a full disk, a missing permission) fails at once and says what to do. A backfill makes one run of many
shards, which loads the model once; it records the versions of each shard, and continues after a shard that
fails.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dagster as dg

from scalselect_assets.recording.checks import FailedCheckError, as_failure
from scalselect_assets.recording.data_versions import DATA_VERSION_TAG, recorded_versions
from scalselect_assets.recording.records import RunRecords
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.locks import StoreLocks

RETRIES = 3
RETRY_SECONDS = 5.0
"""Wait before the first retry; each further wait is four times as long."""

_PASSING = {
    *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET),
    *(errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH),
}
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space (`scalselect clean` removes what is no longer needed)",
    errno.EDQUOT: "the disk quota is used up: free space or raise it",
    errno.EFBIG: "the file system or a limit of the process does not allow so large a file: raise it",
    errno.EROFS: "the file system is read-only: mount it for writing, or use another store",
    errno.EACCES: "permission is missing: let this user read the pool and write the store",
    errno.EPERM: "permission is missing: let this user read the pool and write the store",
    errno.ENOENT: "it was there and is gone: a shard that is removed leaves the pool at the next refresh",
    errno.EMFILE: "too many open files: raise the limit of the process (ulimit -n)",
}


@dataclass(frozen=True, slots=True)
class Output:
    """The output of an asset for one shard, or for all.

    Attributes:
        data_version: Version of the content.
        provenance: Hash of everything that the content was computed from.
        metadata: Metadata for the UI.
        checks: Results of the asset's checks.
    """

    data_version: str
    provenance: str
    metadata: Mapping[str, Any]
    checks: tuple[dg.AssetCheckResult, ...] = ()

    def recorded(self) -> dict[str, Any]:
        """The metadata with both versions, which `data_versions.recorded` reads back."""
        return {**self.metadata, **recorded_versions(self.data_version, self.provenance)}

    def result(self) -> dg.MaterializeResult:
        """The output in the form that an asset returns to Dagster."""
        return dg.MaterializeResult(
            data_version=dg.DataVersion(self.data_version),
            metadata=self.recorded(),
            check_results=list(self.checks),
        )


@contextmanager
def at_work(
    context: dg.AssetExecutionContext, locks: StoreLocks, shard: str | None = None, work: str | None = None
) -> Iterator[None]:
    """Be the only writer of an asset, or of a shard, and turn faults into retries and failures.

    Args:
        context: Context of the asset.
        locks: Locks of the store.
        shard: The shard; None for an asset over all shards.
        work: Name of the lock; by default the shard, or else the asset.

    Raises:
        dg.Failure: A fault is permanent, or did not pass in time.
        dg.RetryRequested: A fault may pass.
    """
    name = context.asset_key.path[-1]
    what = name if shard is None else f"{name}[{shard}]"
    try:
        with (
            _faults_named(context, what),
            locks.writing(work or shard or name, RunRecords(context).log.info),
        ):
            yield
    except FailedCheckError as error:
        raise as_failure(context, what, error, shard) from error


def materialize_shards(
    context: dg.AssetExecutionContext,
    locks: StoreLocks,
    make: Callable[[str], Output],
    *,
    work: str | None = None,
) -> dg.MaterializeResult:
    """Make an asset for the run's shards: one, or a range of them.

    Over a range, Dagster knows one data version for all shards, which is a hash of theirs. The version of
    each shard is in its metadata, from which the refresh reads it.

    Args:
        context: Context of the asset.
        locks: Locks of the store.
        make: Makes one shard.
        work: First part of the lock's name, before the shard; by default the lock is the shard's.

    Raises:
        dg.Failure: A shard failed, as in ``at_work``; over a range this is raised last, when all other shards
            are made and recorded.
        dg.RetryRequested: A fault may pass, as in ``at_work``.
    """
    records = RunRecords(context)
    shards = records.shards()
    if not shards:
        raise dg.Failure(
            "this run covers no shard; a range goes from the earlier to the later one", allow_retries=False
        )
    outputs: dict[str, Output] = {}
    failures: dict[str, dg.Failure] = {}
    for shard in shards:
        try:
            with at_work(context, locks, shard, None if work is None else f"{work}/{shard}"):
                outputs[shard] = make(shard)
        except dg.Failure as failure:
            if len(shards) == 1:
                raise
            failures[shard] = failure
            records.log.error(f"{shard}: {failure.description}")
    if failures:
        _record_each(records, context.asset_key, outputs)
        raise dg.Failure(
            f"{len(failures)} of {len(shards)} shards failed, the others are done: "
            + "; ".join(f"{shard}: {failure.description}" for shard, failure in failures.items()),
            allow_retries=False,
        )
    if len(shards) == 1:
        return outputs[shards[0]].result()
    for shard, output in outputs.items():
        records.add_metadata(context.asset_key, shard, output.recorded())
    versions = {shard: output.data_version for shard, output in outputs.items()}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest(versions)), check_results=_merged_checks(outputs)
    )


def _record_each(records: RunRecords, asset: dg.AssetKey, outputs: Mapping[str, Output]) -> None:
    """Record each shard's materialization, since the run fails and so records none of them."""
    for shard, output in outputs.items():
        records.log_event(
            dg.AssetMaterialization(
                asset,
                partition=shard,
                metadata=output.recorded(),
                tags={DATA_VERSION_TAG: output.data_version},
            )
        )


def _merged_checks(outputs: Mapping[str, Output]) -> list[dg.AssetCheckResult]:
    """One result per check: it passed if it passed for all shards, and it names the shards that failed."""
    by_name: dict[str, dict[str, dg.AssetCheckResult]] = {}
    for shard, output in outputs.items():
        for check in output.checks:
            by_name.setdefault(str(check.check_name), {})[shard] = check
    merged = []
    for name, checks in by_name.items():
        failed = {shard: check for shard, check in checks.items() if not check.passed}
        worst = max(
            (check.severity for check in (failed or checks).values()),
            key=lambda severity: severity is dg.AssetCheckSeverity.ERROR,
        )
        merged.append(
            dg.AssetCheckResult(
                check_name=name,
                passed=not failed,
                severity=worst,
                metadata={"shards": len(checks), "failed_shards": list(failed)[:100]},
            )
        )
    return merged


@contextmanager
def _faults_named(context: dg.AssetExecutionContext, what: str) -> Iterator[None]:
    """Turn an error of the operating system into a retry, or into a failure that says what to do.

    Errors of this project name the remedy themselves and pass through.

    Args:
        context: Context of the asset.
        what: Asset and shard, for the message.

    Raises:
        dg.RetryRequested: The fault may pass, and there were fewer than ``RETRIES`` retries.
        dg.Failure: The fault is permanent, or it did not pass in ``RETRIES`` retries.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        fault = f"{what}: {error.strerror or os.strerror(error.errno)}" + (
            f" ({error.filename})" if error.filename else ""
        )
        if error.errno in _PASSING:
            retry_or_fail(context, fault, error)
        remedy = _REMEDIES.get(error.errno, "remove the cause")
        raise dg.Failure(f"{fault}; {remedy}, and run again", allow_retries=False) from error


def retry_or_fail(context: dg.AssetExecutionContext, fault: str, cause: BaseException | None = None) -> None:
    """Ask Dagster to try again later; always raises.

    Dagster's own retry policy is not used, since it would also retry faults that stay and runs that a person
    has stopped.

    Raises:
        dg.RetryRequested: There were fewer than ``RETRIES`` retries so far.
        dg.Failure: The fault did not pass in ``RETRIES`` retries.
    """
    tried = context.retry_number
    if tried < RETRIES:
        RunRecords(context).log.warning(f"{fault}; it will be tried again")
        raise dg.RetryRequested(max_retries=RETRIES, seconds_to_wait=RETRY_SECONDS * 4**tried) from cause
    raise dg.Failure(
        f"{fault}; it did not pass in {RETRIES} retries, run again", allow_retries=False
    ) from cause
