"""What every asset body of the path shares: one writer at a time, faults told apart, one shard or many.

A body says how one shard (or the asset over all shards) is made; here lies what is the same for all. Locks:
whoever writes a shard's rows, vectors or moments holds that shard, so that two daemons, or the command line
beside one, take turns, and who comes second finds the work done. Retries: a fault that may pass (a network
file system that does not answer) is tried again, with more patience each time; one that stays (a full disk, a
missing permission) fails at once and says what to do. A run of many shards, as a backfill makes it, loads the
model once; it records each shard's own versions, and goes on past a shard that cannot be computed.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dagster as dg

from scalselect_assets.method.interrupts import deferred
from scalselect_assets.recording.checks import FailedCheckError, as_failure
from scalselect_assets.recording.data_versions import DATA_VERSION_TAG, recorded_versions
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.locks import StoreLocks

RETRIES = 3
RETRY_SECONDS = 5.0
"""Before the first retry; each further one waits four times as long."""

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
    """What one asset made of one shard, or of all.

    Attributes:
        data_version: Of what came out.
        provenance: Of what it was computed from.
        metadata: For the UI.
        checks: Results of the asset's checks.
    """

    data_version: str
    provenance: str
    metadata: Mapping[str, Any]
    checks: tuple[dg.AssetCheckResult, ...] = ()

    def recorded(self) -> dict[str, Any]:
        """The metadata with both versions, as `lineage.recorded` reads them back."""
        return {**self.metadata, **recorded_versions(self.data_version, self.provenance)}

    def result(self) -> dg.MaterializeResult:
        """What Dagster takes for it."""
        return dg.MaterializeResult(
            data_version=dg.DataVersion(self.data_version),
            metadata=self.recorded(),
            check_results=list(self.checks),
        )


@contextmanager
def at_work(
    context: dg.AssetExecutionContext, locks: StoreLocks, shard: str | None = None, work: str | None = None
) -> Iterator[None]:
    """Be the only writer of an asset, or of a shard, and tell faults apart.

    Args:
        context: Of the asset.
        locks: Of the store.
        shard: The shard; none for an asset over all shards.
        work: What is locked; by default the shard as such, else the asset.

    Raises:
        dg.Failure: A fault that stays, or that did not pass in time.
        dg.RetryRequested: A fault that may pass.
    """
    name = context.asset_key.path[-1]
    what = name if shard is None else f"{name}[{shard}]"
    try:
        with (
            _told_faults(context, what),
            locks.writing(work or shard or name, deferred()(context.log.info)),
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

    Over a range, Dagster's own data version is the same for all of them, a hash of theirs; each shard's own
    is in its metadata, where the refresh looks.

    Args:
        context: Of the asset.
        locks: Of the store.
        make: Makes one shard.
        work: What is locked beside the shard's name; by default the shard as such.

    Raises:
        dg.Failure: As ``at_work``; over a range after all other shards, which are recorded by then.
        dg.RetryRequested: As ``at_work``.
    """
    shards = context.partition_keys
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
            with deferred():
                context.log.error(f"{shard}: {failure.description}")
    if failures:
        _record(context, outputs)
        raise dg.Failure(
            f"{len(failures)} of {len(shards)} shards failed, the others are done: "
            + "; ".join(f"{shard}: {failure.description}" for shard, failure in failures.items()),
            allow_retries=False,
        )
    if len(shards) == 1:
        return outputs[shards[0]].result()
    for shard, output in outputs.items():
        context.add_asset_metadata(output.recorded(), asset_key=context.asset_key, partition_key=shard)
    versions = {shard: output.data_version for shard, output in outputs.items()}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest(versions)), check_results=_merged_checks(outputs)
    )


@deferred()
def _record(context: dg.AssetExecutionContext, outputs: Mapping[str, Output]) -> None:
    """Record shards one by one, where the run will not, since it fails."""
    for shard, output in outputs.items():
        context.log_event(
            dg.AssetMaterialization(
                context.asset_key,
                partition=shard,
                metadata=output.recorded(),
                tags={DATA_VERSION_TAG: output.data_version},
            )
        )


def _merged_checks(outputs: Mapping[str, Output]) -> list[dg.AssetCheckResult]:
    """One result of each check: passed where it did for all shards, naming those where it did not."""
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
def _told_faults(context: dg.AssetExecutionContext, what: str) -> Iterator[None]:
    """Turn what the operating system reports into a retry or into a failure that says what to do.

    Errors of this project, which say that themselves, pass through.

    Args:
        context: Of the asset.
        what: Asset and shard, for the message.

    Raises:
        dg.RetryRequested: It may pass, and has been tried less than ``RETRIES`` times.
        dg.Failure: It stays.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        told = f"{what}: {error.strerror or os.strerror(error.errno)}" + (
            f" ({error.filename})" if error.filename else ""
        )
        if error.errno in _PASSING:
            retry_or_fail(context, told, error)
        remedy = _REMEDIES.get(error.errno, "remove the cause")
        raise dg.Failure(f"{told}; {remedy}, and run again", allow_retries=False) from error


def retry_or_fail(context: dg.AssetExecutionContext, told: str, cause: BaseException | None = None) -> None:
    """Ask Dagster to try again later; always raises.

    Dagster's own retry policy is not used: it would also retry what stays, and what a person has stopped.

    Raises:
        dg.RetryRequested: Unless it was tried ``RETRIES`` times already.
        dg.Failure: Otherwise.
    """
    tried = context.retry_number
    if tried < RETRIES:
        with deferred():
            context.log.warning(f"{told}; it will be tried again")
        raise dg.RetryRequested(max_retries=RETRIES, seconds_to_wait=RETRY_SECONDS * 4**tried) from cause
    raise dg.Failure(
        f"{told}; it did not pass in {RETRIES} retries, run again", allow_retries=False
    ) from cause
