"""Both ways to drive the graph, in one real deployment with its daemon: exactly what is due, and in its turn.

Two selections share a pool: ``refreshed`` is refreshed by its schedule's real tick and then by its job,
``declared`` by Dagster's automation conditions. Both must materialize the same, and no more.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import dagster as dg
import pytest

from scalselect_assets.declaration.selection import Selection
from tests.conftest import write_lines, write_pool_shard
from tests.e2e.dagster_dev import DagsterDev, overlap, shown

pytestmark = pytest.mark.e2e

BY_SHARD = ("raw_samples", "attention_embeddings", "embedding_moments")
AFTER = ("subspace_basis", "selected_subset", "training_dataset")
Counts = Counter[tuple[str, str | None]]


class Deployment:
    """The pool, both selections, and what they have materialized so far."""

    def __init__(self, folder: Path, pool: Path, model: Path) -> None:
        self.pool = pool
        self.refreshed, self.declared = (
            Selection(
                name=name,
                source=str(pool),
                store=str(folder / name),
                target_model=str(model),
                budget=0.5,
                settle_seconds=0.5,
                automation=automation,  # type: ignore[arg-type]
                automation_seconds=2,
                nightly_cron="* * * * *",
                compare=None,
                report=False,
            )
            for name, automation in (("refreshed", "refresh"), ("declared", "declarative"))
        )
        self.dev = DagsterDev(folder, [self.refreshed, self.declared])
        self.phases: dict[str, dict[str, Counts]] = {}
        self._seen: dict[str, Counts] = {"refreshed": Counter(), "declared": Counter()}

    def refresh(self, expected: dg.DagsterRunStatus = dg.DagsterRunStatus.SUCCESS) -> None:
        run_id = self.dev.launch("refreshed_refresh")
        assert self.dev.finish(run_id) is expected, self.dev.numbers(run_id)

    def phase(self, name: str) -> dict[str, Counts]:
        """Wait until nothing more happens, and tell what each selection has materialized since the last."""
        self.dev.wait_for_quiet("declared_discovery", "declared_automation")
        now = {one.name: self.dev.materializations(one) for one in (self.refreshed, self.declared)}
        self.phases[name] = {one: now[one] - self._seen[one] for one in now}
        self._seen = now
        return self.phases[name]


def shards(*names: str) -> Counts:
    """One materialization of each shard asset for each shard."""
    return Counter({(asset, shard): 1 for asset in BY_SHARD for shard in names})


def whole(*scored: str) -> Counts:
    """One of each asset over all shards, and the scores of each shard."""
    scores: Counts = Counter({("importance_scores", shard): 1 for shard in scored})
    return scores + Counter({(asset, None): 1 for asset in AFTER})


def put_at_once(pool: Path, shard: str, n_rows: int, seed: int) -> None:
    """Put a shard into the pool in one step, as old as one that nobody writes any more.

    A tick that falls between this and what the test changes next would count them as two events.
    """
    staged = pool.with_name("staged")
    write_pool_shard(staged, shard, n_rows, seed)
    for path in (*(staged / "images").iterdir(), staged / shard):
        os.utime(path, (time.time() - 60,) * 2)
    for image in (staged / "images").iterdir():
        image.replace(pool / "images" / image.name)
    (staged / shard).replace(pool / shard)


@pytest.fixture
def deployment(make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path) -> Iterator[Deployment]:
    pool = make_pool(dict.fromkeys(("a.jsonl", "b.jsonl"), 3))
    deployment = Deployment(tmp_path, pool, demo_vlm)
    yield deployment
    deployment.dev.stop()


def test_both_ways_materialize_exactly_what_is_due(
    deployment: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    dev, pool = deployment.dev, deployment.pool

    # Nothing happens until a person turns it on.
    assert set(dev.instigators().values()) == {"STOPPED"}
    assert dev.runs() == []

    dev.turn_on_schedule("refreshed_nightly_rescoring")
    dev.turn_on_sensor("declared_discovery")
    dev.turn_on_sensor("declared_automation")
    dev.wait(
        "the cron's tick", lambda: any(r.dagster_run.job_name == "refreshed_refresh" for r in dev.runs())
    )
    scheduled = next(r.dagster_run for r in dev.runs() if r.dagster_run.job_name == "refreshed_refresh")
    assert scheduled.tags["dagster/schedule_name"] == "refreshed_nightly_rescoring"
    assert dev.finish(scheduled.run_id) is dg.DagsterRunStatus.SUCCESS
    dev.turn_off_schedule("refreshed_nightly_rescoring")
    first = shards("a.jsonl", "b.jsonl") + whole("a.jsonl", "b.jsonl")
    assert deployment.phase("first fill") == {"refreshed": first, "declared": first}

    def next_phase(
        name: str, expected: Counts, status: dg.DagsterRunStatus = dg.DagsterRunStatus.SUCCESS
    ) -> None:
        deployment.refresh(status)
        assert deployment.phase(name) == {"refreshed": expected, "declared": expected}

    # A run in a process of its own is dear, so few shards stay: a phase scores each in one. Phases with one
    # event alone are tried without processes, in `tests.operations`.
    put_at_once(pool, "a.jsonl", 3, seed=5000)
    (pool / "b.jsonl").unlink()
    next_phase("one changed, one removed", shards("a.jsonl") + whole("a.jsonl"))

    # A shard that cannot be read comes with another one, which goes all the way.
    (pool / "bad.jsonl").write_text("this is no shard")
    write_pool_shard(pool, "c.jsonl", 2, seed=7000)
    next_phase(
        "one unreadable, one added",
        shards("c.jsonl") + whole("a.jsonl", "c.jsonl"),
        dg.DagsterRunStatus.FAILURE,
    )

    (pool / "c.jsonl").unlink()
    next_phase("one removed", whole("a.jsonl"), dg.DagsterRunStatus.FAILURE)

    # Repaired, with rows that are all rejected: it counts as done, with no vector.
    write_lines(pool / "bad.jsonl", [{"messages": "none"}])
    next_phase("it is repaired, all rows bad", shards("bad.jsonl") + whole("a.jsonl", "bad.jsonl"))

    known = len(dev.runs())
    time.sleep(3)
    next_phase("nothing new", Counter())
    assert len(dev.runs()) == known + 1, "a refresh without work makes no run but its own"

    with capsys.disabled():
        print("\n" + shown(deployment.phases))  # noqa: T201 - the table is what the test is also for
    _no_model_is_held_twice(dev)
    _the_basis_never_meets_a_shard(dev)

    dev.turn_off_sensor("declared_automation")
    dev.turn_off_sensor("declared_discovery")
    _a_terminated_refresh_goes_on_next_time(deployment)


def _no_model_is_held_twice(dev: DagsterDev) -> None:
    """Runs that hold a model wait for each other: the refresh of one selection, the shards of the other."""
    holding = [
        record
        for record in dev.runs()
        if record.dagster_run.job_name == "refreshed_refresh"
        or (
            record.dagster_run.tags.get("scalselect/automation") == "declared"
            and any(key.path[-1] == BY_SHARD[1] for key in record.dagster_run.asset_selection or ())
        )
    ]
    assert len(holding) >= 10
    assert [pair for pair in combinations(holding, 2) if overlap(*pair)] == []


def _the_basis_never_meets_a_shard(dev: DagsterDev) -> None:
    runs = [
        record for record in dev.runs() if record.dagster_run.tags.get("scalselect/automation") == "declared"
    ]

    def about(*assets: str) -> list[dg.RunRecord]:
        return [
            record
            for record in runs
            if any(key.path[-1] in assets for key in record.dagster_run.asset_selection or ())
        ]

    basis, by_shard = about("subspace_basis"), about(*BY_SHARD)
    assert len(basis) >= 5
    assert [(one, other) for one in basis for other in by_shard if overlap(one, other)] == []


def _a_terminated_refresh_goes_on_next_time(deployment: Deployment) -> None:
    dev = deployment.dev
    before = dev.materializations(deployment.refreshed)
    for number in range(4):
        write_pool_shard(deployment.pool, f"new-{number}.jsonl", 20, seed=10_000 * (number + 1))
    run_id = dev.launch("refreshed_refresh")

    def embedded() -> Counts:
        found = dev.materializations(deployment.refreshed) - before
        return Counter({key: n for key, n in found.items() if key[0] == "attention_embeddings"})

    dev.wait("the first new shard", lambda: bool(embedded()))
    dev.terminate(run_id)
    assert dev.finish(run_id) is dg.DagsterRunStatus.CANCELED, dev.numbers(run_id)
    dev.wait_for_quiet()
    assert 0 < len(embedded()) < 4
    assert not any(asset in AFTER for asset, _ in dev.materializations(deployment.refreshed) - before)
    deployment.refresh()
    assert embedded() == Counter({("attention_embeddings", f"new-{n}.jsonl"): 1 for n in range(4)})
