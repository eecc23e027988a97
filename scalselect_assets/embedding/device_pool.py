"""The device pool: Dagster's limit on runs that hold a model at the same time."""

import dagster as dg

DEVICE_POOL = "scalselect_device"
"""Dagster's pool of all runs that hold a model; its limit is the number of devices."""


def limit_devices(instance: dg.DagsterInstance) -> None:
    """Give the pool its default limit, if the instance has one and the pool has no limit yet.

    Dagster does so when it first looks at its queue, but only after it has decided about what waits there, so
    that several runs would hold a model at once.
    """
    storage = instance.event_log_storage
    has_limit = any(limit.name == DEVICE_POOL for limit in storage.get_pool_limits())
    if instance.global_op_concurrency_default_limit is not None and not has_limit:
        storage.initialize_concurrency_limit_to_default(DEVICE_POOL)
