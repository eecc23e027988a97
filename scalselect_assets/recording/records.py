"""The one door to Dagster's records: queries, reports and the log."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import dagster as dg

from scalselect_assets.method.interrupts import deferred
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.data_versions import DATA_VERSION_TAG, recorded

_PAGE = 100


@dataclass(frozen=True, slots=True)
class MadeBy:
    """The run that recorded a version.

    Attributes:
        run_id: Dagster's.
        job: Its job; none where the run itself is no longer known.
        at: When the version was recorded, in UTC.
    """

    run_id: str
    job: str | None
    at: datetime

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the path of the run's page in the UI."""
        return {
            "run_id": self.run_id,
            "job": self.job,
            "at": self.at.isoformat(timespec="seconds"),
            "ui": f"/runs/{self.run_id}",
        }


def made_by(
    instance: dg.DagsterInstance, key: dg.AssetKey, shard: str | None, data_version: str
) -> MadeBy | None:
    """The run of the latest materialization that recorded a version; none where the instance knows none."""
    wanted = dg.AssetRecordsFilter(key, asset_partitions=None if shard is None else [shard])
    cursor = None
    while True:
        page = instance.fetch_materializations(wanted, limit=_PAGE, cursor=cursor)
        for record in page.records:
            if record.run_id and _recorded(record.asset_materialization, data_version):
                run = instance.get_run_by_id(record.run_id)
                at = datetime.fromtimestamp(record.timestamp, UTC)
                return MadeBy(record.run_id, run.job_name if run else None, at)
        if not page.has_more:
            return None
        cursor = page.cursor


def _recorded(materialization: dg.AssetMaterialization | None, data_version: str) -> bool:
    """Whether a materialization is of this version.

    A run over many shards records each one's version as metadata; Dagster's tag is then one for all.
    """
    if materialization is None:
        return False
    tags = materialization.tags or {}
    return data_version in {
        data_versions.recorded(materialization).get("data_version"),
        tags.get(data_versions.DATA_VERSION_TAG),
    }


_RECORDS_PER_QUERY = 1000  # Dagster's own limit


@deferred()
def latest_versions(
    instance: dg.DagsterInstance, key: dg.AssetKey, event_type: dg.DagsterEventType, shards: set[str]
) -> dict[str, Mapping[str, str]]:
    """What the latest event of each shard recorded, in one query and one more per thousand of them."""
    # A long list of names makes a slow query; the partitions that are not asked for are few.
    wanted = shards if len(shards) == 1 else None
    ids = instance.get_latest_storage_id_by_partition(key, event_type, partitions=wanted)
    fetch = (
        instance.fetch_materializations
        if event_type == dg.DagsterEventType.ASSET_MATERIALIZATION
        else instance.fetch_observations
    )
    latest: dict[str, Mapping[str, str]] = {}
    remaining = iter(ids.values())
    while chunk := list(islice(remaining, _RECORDS_PER_QUERY)):
        for record in fetch(dg.AssetRecordsFilter(key, storage_ids=chunk), limit=len(chunk)).records:
            made, seen = record.asset_materialization, record.asset_observation
            if made is not None and made.partition is not None:
                latest[made.partition] = recorded(made)
            elif seen is not None and seen.partition is not None:
                latest[seen.partition] = {"data_version": seen.tags.get(DATA_VERSION_TAG, "")}
    return latest
