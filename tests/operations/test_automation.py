"""What drives a selection: the real graph's conditions on versions that nothing computes, and the sensors.

The end-to-end tests (`tests/e2e`) run such phases with Dagster's own processes.
"""

import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch
from zoneinfo import ZoneInfo

import dagster as dg
import polars as pl
import pytest
from dagster._core.definitions.declarative_automation.operators import EntityMatchesCondition, SinceCondition
from dagster._core.events import StepMaterializationData

from scalselect_assets import ASSET_MODULES
from scalselect_assets.asset_path import path_of
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.embedding import reuse
from scalselect_assets.operations.automation import AUTOMATION_TAG, automation_condition
from scalselect_assets.pool.discovery import Discovery, report_discovery
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from tests.conftest import sharegpt_row, write_lines

pytestmark = pytest.mark.usefixtures("quick_dagster")


def names_of(selection: Selection) -> list[str]:
    return [asset.name for asset in path_of(selection)]


RAW, EMBEDDINGS, MOMENTS, BASIS, SCORES, REMOVED, SUBSET, DATASET, REPORT = ASSET_MODULES
SHARD = (RAW, EMBEDDINGS, MOMENTS)


class Automation:
    """A selection under automation: its pool as versions by shard, and the runs that Dagster would make."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.settings: dict[str, Any] = {"automation": "declarative", "report": False}
        self.files: dict[str, str] = {}
        self.unreadable: set[str] = set()
        self.now = datetime(2026, 3, 1, 12, tzinfo=ZoneInfo("UTC"))
        self.cursor: Any = None
        self.made: Counter[str] = Counter()
        self.in_flight: list[Run] = []

    @property
    def selection(self) -> Selection:
        return Selection(
            name="pool", source="/pool", store="/store", target_model="org/model", **self.settings
        )

    def discover(self) -> None:
        report_discovery(self.selection, self.instance, Discovery(self.files, dict.fromkeys(self.files)))

    def tick(self, meanwhile: Callable[[], None] = lambda: None) -> list["Requested"]:
        """One evaluation, a minute after the last; what is requested, by run.

        What happens ``meanwhile`` does so after the tick has noted the last event that it knows of.
        """
        self.now += timedelta(minutes=1)
        storage = self.instance.event_log_storage
        last_event = storage.get_maximum_record_id()
        meanwhile()
        # Within a tick the daemon reads the partitions once, this function some thousand times.
        shards = self.instance.get_dynamic_partitions("pool_shards")
        with (
            patch.object(storage, "get_maximum_record_id", lambda: last_event),
            patch.multiple(
                self.instance,
                get_dynamic_partitions=lambda partitions_def_name: shards,  # noqa: ARG005
                has_dynamic_partition=lambda partitions_def_name, partition_key: (  # noqa: ARG005
                    partition_key in shards
                ),
            ),
        ):
            result = dg.evaluate_automation_conditions(
                definitions(self.selection), self.instance, evaluation_time=self.now, cursor=self.cursor
            )
        self.cursor = result.cursor
        runs: dict[str | None, list[str]] = {}
        for asset in names_of(self.selection):
            for shard in result.get_requested_partitions(self.selection.key(asset)):
                runs.setdefault(shard, []).append(asset)
        return [(assets, shard) for shard, assets in sorted(runs.items(), key=str)]

    def start(self, requested: list["Requested"], *, by: str = "automation") -> None:
        """Let runs begin: they read their inputs now, and stay in progress."""
        for assets, shard in requested:
            keys = frozenset(self.selection.key(asset) for asset in assets)
            run = self.instance.create_run_for_job(
                _job(self.selection.model_dump_json(), keys),
                status=dg.DagsterRunStatus.STARTED,
                asset_selection=keys,
                tags={
                    **({AUTOMATION_TAG: "pool"} if by == "automation" else {}),
                    **({"dagster/partition": shard} if shard else {}),
                },
            )
            versions: dict[str, str] = {}
            for asset in assets:
                if (asset, shard in self.unreadable) == (RAW, True):
                    break
                versions[asset] = self._version(asset, shard, versions)
            self.in_flight.append(Run(run, shard, versions, failed=len(versions) < len(assets)))

    def finish(self, shard: str | None = None) -> None:
        """End the runs that are in progress, or that of one shard."""
        for one in [one for one in self.in_flight if shard in {None, one.shard}]:
            self.in_flight.remove(one)
            for asset, version in one.versions.items():
                materialization = dg.AssetMaterialization(
                    self.selection.key(asset), partition=one.shard, tags={"dagster/data_version": version}
                )
                self.instance.report_dagster_event(
                    dg.DagsterEvent(
                        dg.DagsterEventType.ASSET_MATERIALIZATION.value,
                        one.run.job_name,
                        event_specific_data=StepMaterializationData(materialization),
                    ),
                    one.run.run_id,
                )
                self.made[asset + (f"[{one.shard}]" if one.shard else "")] += 1
            if one.failed:
                self.instance.report_run_failed(one.run)
            else:
                self.instance.report_dagster_event(
                    dg.DagsterEvent(dg.DagsterEventType.RUN_SUCCESS.value, one.run.job_name), one.run.run_id
                )

    def settle(self) -> dict[str, int]:
        """Discover, then tick and run until nothing is requested; how often each thing was made."""
        self.made.clear()
        self.discover()
        while requested := self.tick():
            self.start(requested)
            self.finish()
        return dict(self.made)

    def _version(self, asset: str, shard: str | None, made: Mapping[str, str]) -> str:
        """The data version that an asset would have now, as the real ones hash what they are made of."""
        file, settings = self.files.get(str(shard), ""), self.selection
        shards = self.instance.get_dynamic_partitions("pool_shards")
        read: dict[str, Callable[[], Any]] = {
            RAW: lambda: file,
            # An image that was only touched gives the same vectors.
            EMBEDDINGS: lambda: [file.rstrip("'"), settings.attention_mass],
            MOMENTS: lambda: made.get(EMBEDDINGS) or self._stored(EMBEDDINGS, shard),
            BASIS: lambda: [
                settings.energy,
                *filter(all, ((one, self._stored(MOMENTS, one)) for one in shards)),
            ],
            SCORES: lambda: self._stored(BASIS),
            REMOVED: lambda: [self._stored(BASIS), str(settings.near_duplicates)],
            SUBSET: lambda: [
                self._stored(BASIS),
                settings.budget,
                made.get(REMOVED) or self._stored(REMOVED),
            ],
            DATASET: lambda: made.get(SUBSET) or self._stored(SUBSET),
            REPORT: lambda: made.get(DATASET) or self._stored(DATASET),
        }
        return digest(read[asset]())

    def _stored(self, asset: str, shard: str | None = None) -> str:
        found = self.instance.fetch_materializations(
            dg.AssetRecordsFilter(self.selection.key(asset), asset_partitions=[shard] if shard else None),
            limit=1,
        ).records
        materialization = found[0].asset_materialization if found else None
        return (materialization.tags or {})["dagster/data_version"] if materialization else ""


Requested: TypeAlias = tuple[list[str], str | None]
"""Assets and shard of one run."""


@dataclass
class Run:
    """A run in progress."""

    run: dg.DagsterRun
    shard: str | None
    versions: dict[str, str]
    failed: bool


@cache
def _definitions(declaration: str) -> dg.Definitions:
    return build_defs([Selection.model_validate_json(declaration)])


@cache
def _job(declaration: str, assets: frozenset[dg.AssetKey]) -> dg.JobDefinition:
    return _definitions(declaration).resolve_job_def("pool_assets").get_subset(asset_selection=assets)


def definitions(selection: Selection) -> dg.Definitions:
    return _definitions(selection.model_dump_json())


def wave(*changed: str, scored: str) -> dict[str, int]:
    """What one wave makes: the changed shards, then everything that follows from them, once."""
    return {
        **{f"{asset}[{shard}]": 1 for shard in changed for asset in SHARD},
        BASIS: 1,
        **{f"{SCORES}[{shard}]": 1 for shard in scored},
        SUBSET: 1,
        DATASET: 1,
    }


def opened(folder: Path) -> dg.DagsterInstance:
    """An instance with one database for the events of all runs, which are many and short here."""
    storage = {
        "module": "dagster._core.storage.event_log",
        "class": "ConsolidatedSqliteEventLogStorage",
        "config": {"base_dir": str(folder)},
    }
    return dg.DagsterInstance.local_temp(str(folder), overrides={"event_log_storage": storage})


@pytest.fixture
def automation() -> Iterator[Automation]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Automation(instance)


@pytest.fixture(scope="module")
def a_filled_instance(tmp_path_factory: pytest.TempPathFactory, quick_dagster: None) -> tuple[Path, Any]:
    """Three shards and all that follows; made once, since most tests begin here."""
    folder = tmp_path_factory.mktemp("filled")
    with opened(folder) as instance:
        automation = Automation(instance)
        automation.tick()
        automation.files = {"a": "1", "b": "1", "c": "1"}
        assert automation.settle() == wave("a", "b", "c", scored="abc")
        return folder, automation.cursor


@pytest.fixture
def filled(a_filled_instance: tuple[Path, Any], tmp_path: Path) -> Iterator[Automation]:
    folder, cursor = a_filled_instance
    with opened(Path(shutil.copytree(folder, tmp_path / "instance"))) as instance:
        automation = Automation(instance)
        automation.files, automation.cursor = {"a": "1", "b": "1", "c": "1"}, cursor
        automation.now += timedelta(hours=1)
        yield automation


def test_nothing_new_requests_nothing(filled: Automation) -> None:
    assert [filled.settle() for _ in range(2)] == [{}, {}]


def test_it_does_not_matter_which_sensor_is_turned_on_first(automation: Automation) -> None:
    automation.files = {"a": "1"}
    automation.discover()
    assert automation.tick() == []
    assert automation.settle() == wave("a", scored="a")


def test_a_new_shard_costs_itself_and_one_rescoring(filled: Automation) -> None:
    filled.files["d"] = "1"
    assert filled.settle() == wave("d", scored="abcd")


def test_a_removed_shard_costs_one_rescoring(filled: Automation) -> None:
    del filled.files["a"]
    assert filled.settle() == wave(scored="bc")


def test_a_change_and_a_removal_together_are_one_wave(filled: Automation) -> None:
    del filled.files["a"]
    filled.files["b"] = "2"
    assert filled.settle() == wave("b", scored="bc")


def test_an_image_that_was_only_touched_makes_no_basis(filled: Automation) -> None:
    filled.files["a"] = "1'"
    assert filled.settle() == {f"{asset}[a]": 1 for asset in SHARD}


def test_a_shard_that_comes_back_unchanged_is_only_put_in_again(filled: Automation) -> None:
    del filled.files["a"]
    filled.settle()
    filled.files["a"] = "1"
    assert filled.settle() == wave(scored="abc")


def test_a_shard_that_cannot_be_read_holds_nobody_up_and_its_repair_heals(filled: Automation) -> None:
    filled.unreadable = {"a"}
    filled.files |= {"a": "2", "b": "2"}
    assert filled.settle() == wave("b", scored="abc")
    filled.unreadable = set()
    filled.files["a"] = "3"
    assert filled.settle() == wave("a", scored="abc")


def test_a_new_shard_that_cannot_be_read_is_left_out_and_named(filled: Automation) -> None:
    filled.unreadable, filled.files["d"] = {"d"}, "1"
    # The basis looks and finds no change; the dataset's manifest names the shard.
    assert filled.settle() == {BASIS: 1, DATASET: 1}
    filled.unreadable, filled.files["d"] = set(), "2"
    assert filled.settle() == wave("d", scored="abcd")


def test_the_basis_waits_for_shards_in_flight_and_for_those_that_are_due(filled: Automation) -> None:
    filled.files |= {"a": "2", "b": "2"}
    filled.discover()
    requested = filled.tick()
    assert requested == [(list(SHARD), "a"), (list(SHARD), "b")]
    filled.start(requested)
    assert filled.tick() == []
    filled.finish("a")
    assert filled.tick() == []
    filled.files["c"] = "2"
    filled.discover()
    requested = filled.tick()
    assert requested == [(list(SHARD), "c")]
    filled.start(requested)
    filled.finish("b")
    assert filled.tick() == []
    filled.finish("c")
    assert filled.tick() == [([BASIS], None)]


def test_a_shard_that_changes_during_the_rescoring_waits_for_its_end_and_is_not_lost(
    filled: Automation,
) -> None:
    filled.files["a"] = "2"
    filled.discover()
    shards = filled.tick()
    filled.start(shards)
    filled.finish()
    basis = filled.tick()
    assert basis == [([BASIS], None)]
    filled.start(basis)
    filled.files["b"] = "2"
    filled.discover()
    assert [filled.tick() for _ in range(3)] == [[], [], []]
    filled.finish()
    # The shard goes first: scores of this basis would be made twice.
    requested = filled.tick()
    assert requested == [(list(SHARD), "b")]
    filled.start(requested)
    filled.finish()
    assert filled.settle() == wave(scored="abc")


@pytest.mark.parametrize(("settle_seconds", "seen_twice"), [("0", True), ("0.01", False)])
@pytest.mark.parametrize("shard", ["a", "d"])
def test_a_shard_that_is_reported_during_a_tick_is_not_lost(
    filled: Automation, monkeypatch: pytest.MonkeyPatch, shard: str, settle_seconds: str, seen_twice: bool
) -> None:
    """The next tick looks from the last event that this one knew of, and this one may see later ones."""
    monkeypatch.setenv("DAGSTER_AUTOMATION_TICK_SETTLE_SECONDS", settle_seconds)
    filled.files[shard] = "2"
    requested = filled.tick(meanwhile=filled.discover)
    assert requested == ([(list(SHARD), shard)] if seen_twice else [])
    filled.start(requested)
    filled.finish()
    assert filled.settle() == wave(shard, scored="".join(filled.files))


def test_shards_that_are_reported_during_the_first_tick_are_made_once(
    automation: Automation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_AUTOMATION_TICK_SETTLE_SECONDS", "0.01")
    automation.files = {"a": "1", "b": "1"}
    assert automation.tick(meanwhile=automation.discover) == []
    assert automation.settle() == wave("a", "b", scored="ab")


def test_a_shard_that_changes_while_it_is_embedded_is_embedded_again(filled: Automation) -> None:
    filled.files["a"] = "2"
    filled.discover()
    filled.start(filled.tick())
    filled.files["a"] = "3"
    filled.discover()
    assert [filled.tick() for _ in range(2)] == [[], []]
    filled.finish()
    assert filled.settle() == wave("a", scored="abc")


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("budget", 3, {SUBSET: 1, DATASET: 1}),
        ("text_only", "keep", {DATASET: 1}),
        ("energy", 0.5, wave(scored="abc")),
        ("nightly_cron", "0 3 * * *", {}),
        ("automation_seconds", 7, {}),
        (
            "attention_mass",
            0.5,
            {key: n for key, n in wave("a", "b", "c", scored="abc").items() if not key.startswith(RAW)},
        ),
    ],
)
def test_a_changed_setting_recomputes_what_depends_on_it(
    filled: Automation, setting: str, value: object, expected: dict[str, int]
) -> None:
    filled.settings[setting] = value
    assert filled.settle() == expected


def test_what_is_removed_and_the_report_come_with_the_subset_in_one_run(automation: Automation) -> None:
    automation.settings |= {"report": True, "near_duplicates": {"cosine": 0.9}}
    automation.files = {"a": "1"}
    automation.tick()
    with_subset = {REMOVED: 1, SUBSET: 1, DATASET: 1, REPORT: 1}
    assert automation.settle() == wave("a", scored="a") | with_subset
    assert automation.settle() == {}

    automation.settings["budget"] = 3
    automation.discover()
    assert automation.tick() == [([SUBSET, DATASET, REPORT], None)]


def test_other_terms_of_removing_are_another_choice(automation: Automation) -> None:
    automation.settings |= {"report": True, "near_duplicates": {"cosine": 0.9}}
    automation.files = {"a": "1"}
    automation.tick()
    automation.settle()
    automation.settings["near_duplicates"] = {"cosine": 0.8}
    automation.discover()
    requested = automation.tick()
    assert requested == [([REMOVED, SUBSET, DATASET, REPORT], None)]
    automation.start(requested)
    automation.finish()
    assert automation.settle() == {}

    automation.start([([REMOVED], None)], by="a person")
    automation.finish()
    assert automation.settle() == {}, "it came out as it was"


def test_what_a_person_materializes_is_followed_up(filled: Automation) -> None:
    filled.files["a"] = "2"
    filled.start([([RAW], "a")], by="a person")
    filled.finish()
    assert filled.tick() == [([EMBEDDINGS, MOMENTS], "a")]


def test_a_basis_that_failed_is_neither_repeated_nor_scored_with(filled: Automation) -> None:
    filled.files["d"] = "1"
    filled.discover()
    filled.start(filled.tick())
    filled.finish()
    filled.start(filled.tick())
    (basis,) = filled.in_flight
    basis.versions, basis.failed = {}, True
    filled.finish()
    assert [filled.tick() for _ in range(3)] == [[], [], []]
    filled.files["d"] = "2"
    assert filled.settle() == wave("d", scored="abcd")


@pytest.fixture
def nightly(filled: Automation) -> Automation:
    """At two o'clock in New York, which is seven o'clock in UTC; it is past noon on the first of March."""
    filled.settings |= {
        "automation": "declarative_nightly",
        "nightly_cron": "0 2 * * *",
        "nightly_timezone": "America/New_York",
    }
    return filled


def test_a_night_releases_what_is_pending_at_its_tick_and_nothing_before(nightly: Automation) -> None:
    del nightly.files["c"]
    nightly.files |= {"a": "2", "d": "1"}
    assert nightly.settle() == {}
    nightly.settings["budget"] = 3
    assert nightly.settle() == {}
    nightly.now = datetime(2026, 3, 2, 6, 58, tzinfo=ZoneInfo("UTC"))
    assert nightly.tick() == []
    nightly.now = datetime(2026, 3, 2, 7, 1, tzinfo=ZoneInfo("UTC"))
    assert nightly.settle() == wave("a", "d", scored="abd")
    nightly.now = datetime(2026, 3, 3, 7, 1, tzinfo=ZoneInfo("UTC"))
    assert nightly.settle() == {}


def test_a_night_without_files_removes_a_shard(nightly: Automation) -> None:
    del nightly.files["c"]
    assert nightly.settle() == {}
    nightly.now = datetime(2026, 3, 2, 7, 1, tzinfo=ZoneInfo("UTC"))
    assert nightly.settle() == wave(scored="ab")


def test_a_shard_that_comes_during_the_night_waits_for_the_next_and_holds_nobody_up(
    nightly: Automation,
) -> None:
    nightly.files["d"] = "1"
    nightly.discover()
    nightly.tick()
    nightly.now = datetime(2026, 3, 2, 7, 1, tzinfo=ZoneInfo("UTC"))
    requested = nightly.tick()
    assert requested == [(list(SHARD), "d")]
    nightly.files["e"] = "1"
    nightly.discover()
    nightly.start(requested)
    nightly.finish()
    assert nightly.settle() == wave(scored="abcd")
    nightly.now = datetime(2026, 3, 3, 7, 1, tzinfo=ZoneInfo("UTC"))
    assert nightly.settle() == wave("e", scored="abcde")


def test_a_night_that_the_daemon_slept_through_is_made_up_for(nightly: Automation) -> None:
    nightly.files["d"] = "1"
    nightly.discover()
    nightly.tick()
    nightly.now = datetime(2026, 3, 4, 15, tzinfo=ZoneInfo("UTC"))
    assert nightly.settle() == wave("d", scored="abcd")


def test_what_was_pending_stays_so_when_the_way_to_automate_changes(nightly: Automation) -> None:
    nightly.files["d"] = "1"
    assert nightly.settle() == {}
    nightly.settings["automation"] = "declarative"
    assert nightly.settle() == wave("d", scored="abcd")


def test_conditions_of_one_asset_keep_their_memories_apart() -> None:
    """Dagster tells what a `since` remembers by the kinds of its two conditions, not by all below them."""
    remembered: dict[tuple[str, str | None, str], str] = {}

    def walk(root: str, condition: Any, target: Any) -> None:
        if isinstance(condition, SinceCondition):
            memory = condition.get_node_unique_id(parent_unique_id=None, index=None, target_key=target)
            described = repr(condition)
            place = (root, target and target.to_user_string(), memory)
            assert remembered.setdefault(place, described) == described
        if isinstance(condition, EntityMatchesCondition):
            target = None if condition.key.path[-1] == root else condition.key
        for child in condition.children:
            walk(root, child, target)

    for automation in ("declarative", "declarative_nightly"):
        selection = Selection(
            name="pool",
            source="/pool",
            store="/store",
            target_model="m",
            automation=automation,
            near_duplicates={},
        )
        assert names_of(selection) == list(ASSET_MODULES)
        for asset in ASSET_MODULES:
            walk(asset, automation_condition(selection, asset), None)
    assert len(remembered) > 20


# Discovery


class Pool:
    """A pool on the disk under automation, and its discovery sensor."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.folder, self.instance, self.cursor = folder / "pool", instance, None
        self.storage = StorageResource()
        self.selection = Selection(
            name="pool",
            source=str(self.folder),
            store=str(folder / "store"),
            target_model="org/model",
            automation="declarative",
            settle_seconds=0,
        )

    def write(self, shard: str, text: str) -> None:
        write_lines(self.folder / shard, [sharegpt_row(None, text)])

    def discover(self) -> str:
        """One tick; what it says."""
        sensor = build_defs([self.selection]).resolve_sensor_def("pool_discovery")
        with dg.build_sensor_context(
            self.instance, self.cursor, resources={"storage": self.storage}
        ) as context:
            found = sensor.evaluate_tick(context)
        assert not found.run_requests
        self.cursor = found.cursor
        return str(found.skip_message)

    def shards(self) -> set[str]:
        return set(self.instance.get_dynamic_partitions("pool_shards"))

    def events(self, asset: str) -> int:
        return len(self.instance.fetch_observations(self.selection.key(asset), limit=100).records)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with dg.DagsterInstance.ephemeral() as instance:
        pool = Pool(tmp_path, instance)
        pool.write("a.jsonl", "One")
        pool.write("b.jsonl", "Two")
        yield pool


def test_discovery_reports_new_changed_and_removed_shards_once(pool: Pool) -> None:
    assert pool.discover().startswith("reported 2 new and 0 removed shards")
    assert pool.discover().startswith("nothing has changed: 2 shards")
    assert (pool.shards(), pool.events("shard_files"), pool.events("shard_manifest")) == (
        {"a.jsonl", "b.jsonl"},
        2,
        1,
    )
    pool.write("a.jsonl", "Another")
    assert pool.discover().startswith("reported 0 new and 0 removed shards: 2 shards")
    assert (pool.events("shard_files"), pool.events("shard_manifest")) == (3, 1)
    (pool.folder / "b.jsonl").unlink()
    assert pool.discover().startswith("reported 0 new and 1 removed shards")
    assert (pool.shards(), pool.events("shard_manifest")) == ({"a.jsonl"}, 2)


def test_what_was_set_aside_for_a_removed_shard_goes_with_it(pool: Pool) -> None:
    pool.discover()
    artifacts = pool.storage.artifacts(pool.selection.store)
    path, _ = artifacts.write_frame(reuse.SET_ASIDE, pl.DataFrame({"x": [1]}), {}, "000000/b.jsonl")
    (pool.folder / "b.jsonl").unlink()
    pool.discover()
    assert not path.exists()


def test_a_pool_that_is_empty_for_now_loses_no_shard(pool: Pool) -> None:
    pool.discover()
    for shard in ("a.jsonl", "b.jsonl"):
        (pool.folder / shard).rename(pool.folder.parent / shard)
    assert pool.discover().startswith("no shard in")
    assert pool.shards() == {"a.jsonl", "b.jsonl"}


# The schedule of the refresh


@dataclass
class Nights:
    """The schedule of a selection that the refresh drives."""

    selection: Selection
    instance: dg.DagsterInstance
    storage: StorageResource

    def tick(self) -> dg.RunRequest | str:
        """What one tick asks for, or why it does not."""
        schedule = build_defs([self.selection]).resolve_schedule_def("pool_nightly_rescoring")
        with dg.build_schedule_context(
            self.instance,
            scheduled_execution_time=datetime(2026, 11, 23, 2, tzinfo=ZoneInfo("UTC")),
            resources={"storage": self.storage},
        ) as context:
            found = schedule.evaluate_tick(context)
        (request,) = found.run_requests or [None]
        return request or str(found.skip_message)

    def run(self, status: dg.DagsterRunStatus) -> str:
        """A refresh as Dagster has recorded it."""
        job = build_defs([self.selection]).resolve_job_def("pool_refresh")
        return self.instance.create_run_for_job(job, status=status).run_id


@pytest.fixture
def nights(tmp_path: Path) -> Iterator[Nights]:
    selection = Selection(name="pool", source="/pool", store=str(tmp_path / "store"), target_model="m")
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield Nights(selection, instance, StorageResource())


def test_a_tick_asks_for_one_refresh(nights: Nights) -> None:
    nights.run(dg.DagsterRunStatus.SUCCESS)
    assert isinstance(nights.tick(), dg.RunRequest)


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
def test_a_tick_names_the_refresh_that_is_at_work_and_asks_for_none(
    nights: Nights, status: dg.DagsterRunStatus
) -> None:
    run_id = nights.run(status)
    assert run_id in nights.tick()
    with nights.storage.locks(nights.selection.store).refreshing():
        assert run_id in nights.tick()


def test_a_tick_beside_the_command_line_asks_for_none(nights: Nights) -> None:
    with nights.storage.locks(nights.selection.store).refreshing():
        assert "is at work" in str(nights.tick())
    assert isinstance(nights.tick(), dg.RunRequest)


def test_the_record_of_a_refresh_that_died_stops_no_night(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.run(dg.DagsterRunStatus.STARTED)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600)
    assert isinstance(nights.tick(), dg.RunRequest)


# Never both


@pytest.mark.usefixtures("processes")
def test_a_refresh_of_a_declarative_selection_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "pool" / "a.jsonl", [sharegpt_row(None, "Hello?")])
    store = tmp_path / "store"
    store.mkdir()
    selection = Selection(
        name="mine",
        source=str(tmp_path / "pool"),
        store=str(store),
        target_model="m",
        automation="declarative",
    )
    (store / "selection.yaml").write_text(selection.to_yaml(in_store=True))
    open_instance(selection).dispose()
    before = contents(store)
    arguments = ["run", str(tmp_path / "pool"), "--store", str(store), "--budget", "3"]
    finished = subprocess.run(
        [str(Path(sys.executable).with_name("scalselect")), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    told = " ".join(finished.stderr.split())
    assert "'mine' declares `automation: declarative`" in told
    assert "mine_discovery and mine_automation" in told
    assert "declare `automation: refresh`" in told
    assert contents(store) == before


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not Dagster's, and what Dagster knows of runs."""
    with dg.DagsterInstance.from_config(str(folder / "dagster")) as instance:
        assert instance.get_runs() == []
        assert instance.get_dynamic_partitions("mine_shards") == []
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "dagster" not in path.relative_to(folder).parts
    }
