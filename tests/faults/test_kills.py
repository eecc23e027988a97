"""A refresh that is killed anywhere leaves the old or the new state, and the next one goes on from there."""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.faults import kills
from tests.faults.children import Children, Ended
from tests.faults.invariants import contents, expected, leftovers, same, torn, unembedded
from tests.faults.kills import KEPT, STAGES, TABLE, Kill
from tests.faults.known_pool import FaultBench, Pool, refresh

SEED = 5
N_KILLS = 3 * len(STAGES)
KILLS_PER_ROUND = len(STAGES)


@dataclass
class Figures:
    """What the kills did.

    Attributes:
        kills: By the stage in which the process was.
        refreshes: That were started, with those that were not killed.
        torn: Artifacts that were neither old nor new.
        unembedded: Selected samples without a vector.
        lost: Rows that were neither embedded nor rejected in the end.
        in_flight: Samples that were embedded twice, since the process was killed before they were set aside.
        duplicated: Samples that were embedded twice for no such reason.
        model_calls: Samples that were embedded.
        leftovers: Files that killed processes left half written; nothing reads them.
        cpu_seconds: Of all children.
    """

    kills: Counter[str] = field(default_factory=Counter)
    refreshes: int = 0
    torn: list[str] = field(default_factory=list)
    unembedded: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    in_flight: int = 0
    duplicated: list[str] = field(default_factory=list)
    model_calls: int = 0
    leftovers: int = 0
    cpu_seconds: float = 0.0

    def told(self) -> dict[str, object]:
        """As plain values."""
        return {
            name: dict(value)
            if isinstance(value, Counter)
            else len(value)
            if isinstance(value, list)
            else value
            for name, value in vars(self).items()
        }


class Loop:
    """A pool that changes, a store whose refreshes are killed, and what came of it."""

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder, self.children = folder, children
        self.random = random.Random(SEED)
        self.pool = Pool(folder / "pool")
        for number, n_rows in enumerate((7, 6)):
            self.pool.add(f"{number}.jsonl", n_rows)
        self.bench = FaultBench(self.pool.folder, folder / "store")
        self.ledger = folder / "ledger"
        self.figures = Figures()
        self._state = contents(self.bench)
        self._killed: set[int] = set()
        self._n_shards = len(self.pool.shards)

    def change_the_pool(self) -> None:
        """One shard comes, changes or goes."""
        shards = sorted(self.pool.shards)
        kind = self.random.choice(["add", "change", "change", "remove"])
        if kind == "add" and len(shards) < 4:
            self._n_shards += 1
            self.pool.add(f"{self._n_shards}.jsonl", self.random.randint(3, 5))
        elif kind == "remove" and len(shards) > 2:
            self.pool.remove(self.random.choice(shards))
        else:
            shard = self.random.choice(shards)
            n_rows = len(self.pool.shards[shard])
            self.pool.change(shard, self.random.sample(range(n_rows), self.random.randint(1, 3)))

    def refresh(self, kill: Kill | None) -> Ended:
        """One refresh in a process of its own, and a look at the store after it."""
        record = self.folder / "record"
        ended = self.children.run(
            kills.refresh, self.pool.folder, self.bench.store, self.ledger, kill, record
        )
        self.figures.refreshes += 1
        before, after, new = self._state, contents(self.bench), expected(self.pool)
        self._state = after
        if ended.killed:
            self.figures.kills[record.read_text()] += 1
            self._killed.add(ended.pid)
            self.figures.torn += torn(before, after, new)
        else:
            self.figures.torn += [
                f"{name} after {kill}" for name in new if not same(after.get(name), new[name])
            ]
            self._note_lost_rows()
        self.figures.unembedded += [f"{place} after {kill}" for place in unembedded(self.bench)]
        return ended

    def _note_lost_rows(self) -> None:
        for shard, numbers in self.pool.shards.items():
            rows = [
                row
                for asset in ("attention_embeddings", "rejected_rows")
                for row in self._state[f"{asset}[{shard}]"]
                if isinstance(row, int)
            ]
            if sorted(rows) != list(range(len(numbers))):
                self.figures.lost.append(
                    f"{shard}: {len(numbers)} rows, embedded or rejected are {sorted(rows)}"
                )

    def compare_with_a_fresh_store(self) -> None:
        """The same pool, refreshed at once."""
        fresh = FaultBench(self.pool.folder, self.folder / f"fresh {self.figures.refreshes}")
        self.children.run(refresh, fresh.pool, fresh.store)
        for shard in self.pool.shards:
            (mine, _), (other, _) = (
                bench.artifacts.read_frame("importance_scores", shard) for bench in (self.bench, fresh)
            )
            assert mine["sample_key"].to_list() == other["sample_key"].to_list()
            np.testing.assert_allclose(mine["leverage"], other["leverage"], rtol=1e-6)
        (mine, _), (other, _) = (
            bench.artifacts.read_frame("selected_subset") for bench in (self.bench, fresh)
        )
        columns = ["rank", "shard", "row", "sample_key", "source_id"]
        assert mine.select(columns).equals(other.select(columns))
        files = [bench.store / "training_dataset" / "train.jsonl" for bench in (self.bench, fresh)]
        assert files[0].read_bytes() == files[1].read_bytes()

    def count_model_calls(self) -> None:
        """Read the ledger: what was embedded last may not have been set aside when its process was killed."""
        lines = [line.split(" ", 1) for line in self.ledger.read_text().splitlines()]
        last = {pid: place for place, (pid, _) in enumerate(lines)}
        in_flight: dict[str, bool] = {}
        for place, (pid, question) in enumerate(lines):
            if question == KEPT:
                continue
            self.figures.model_calls += 1
            if in_flight.get(question):
                self.figures.in_flight += 1
            elif question in in_flight:
                self.figures.duplicated.append(f"{question} by process {pid}")
            in_flight[question] = int(pid) in self._killed and last[pid] == place


@pytest.fixture
def loop(tmp_path: Path, children: Children) -> Loop:
    return Loop(tmp_path, children)


def points(loop: Loop) -> dict[str, int]:
    """How many events every stage has at least where a shard is new or changed."""
    first = loop.refresh(None).value
    loop.pool.change("0.jsonl", [2])
    second = loop.refresh(None).value
    return {stage: min(first[stage], second[stage]) for stage in STAGES}


def delay(loop: Loop, stage: str) -> float:
    """How long after a point: as long as a table's commit takes at most, or now and then some more."""
    if stage == TABLE:
        return loop.random.uniform(0, 0.012)
    return loop.random.uniform(0, 0.03) if loop.random.random() < 0.15 else 0.0


def test_a_refresh_that_is_killed_anywhere_is_old_or_new_and_goes_on(
    loop: Loop, record_property: Callable[[str, object], None]
) -> None:
    n_points = points(loop)
    assert min(n_points.values()) > 0, n_points
    figures, reached, to_do, killed_at = loop.figures, len(STAGES), list[int](), set[str]()
    while figures.kills.total() < N_KILLS:
        to_do = to_do or loop.random.sample(range(len(STAGES)), len(STAGES))
        place = to_do.pop()
        stage = STAGES[place]
        # What the last process came past has nothing more to do, until the pool changes.
        if place <= reached or loop.random.random() < 0.2:
            loop.change_the_pool()
        kill = Kill(stage, loop.random.randint(1, n_points[stage]), delay(loop, stage))
        if not loop.refresh(kill).killed:
            reached = len(STAGES)
        else:
            reached = place
            killed_at.add(stage)
            if figures.kills.total() % KILLS_PER_ROUND == 0:
                loop.refresh(None)
                loop.compare_with_a_fresh_store()
                reached = len(STAGES)
        assert figures.refreshes < 2 * N_KILLS, figures.kills
    loop.count_model_calls()
    figures.leftovers = len(leftovers(loop.bench.store))
    figures.cpu_seconds = loop.children.cpu_seconds
    for name, value in figures.told().items():
        record_property(name, value)
    print(json.dumps(figures.told(), indent=1))  # noqa: T201 - with -s or -rP, a person reads them
    assert (figures.torn, figures.unembedded, figures.lost, figures.duplicated) == ([], [], [], [])
    assert killed_at == set(STAGES)
