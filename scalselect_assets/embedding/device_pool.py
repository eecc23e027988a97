"""The device pool: Dagster's limit on runs that hold a model at the same time."""

import dagster as dg

from scalselect_assets.recording.records import Records

DEVICE_POOL = "scalselect_device"
"""Name of the device pool that every run with a model belongs to; its limit is the number of devices."""


def limit_devices(instance: dg.DagsterInstance) -> None:
    """Give the device pool its default limit, if the instance has one and the pool has no limit yet.

    Dagster also sets this limit when it first reads its queue. By then it has already decided which waiting
    runs may start, so several of them would hold a model at once.
    """
    Records(instance).set_default_limit(DEVICE_POOL)
