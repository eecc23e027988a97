"""A real `dagster dev` on loopback: webserver, daemon and code server, driven as the UI drives it.

Only how a run's process comes to its imports is not as Dagster has it; see `site/sitecustomize.py`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from scalselect_assets.declaration.selection import Selection

ROOT = Path(__file__).parents[2]
PATIENCE = 1800.0  # seconds, which only what hangs takes; a busy machine starts a process in tens of them
_LOCATION = {"repositoryName": "__repository__", "repositoryLocationName": "scalselect"}
# The first of the project's two code locations; the other one has processes of its own.
_WORKSPACE_YAML = f"""\
load_from:
  - python_file:
      relative_path: {ROOT / "definitions.py"}
      working_directory: {ROOT}
      location_name: scalselect
"""
_DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
concurrency:
  pools: {granularity: run, default_limit: 1}
compute_logs:  # four processes less for each run
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
run_coordinator:
  module: dagster.core.run_coordinator
  class: QueuedRunCoordinator
  config: {dequeue_interval_seconds: 1}
"""


class DagsterDev:
    """One deployment of some selections, from start to stop."""

    def __init__(self, folder: Path, selections: list[Selection]) -> None:
        """Declare the selections and start; returns once the code location has loaded."""
        self._home, declared = folder / "dagster", folder / "selections"
        self._home.mkdir()
        declared.mkdir()
        (self._home / "dagster.yaml").write_text(_DAGSTER_YAML)
        workspace = folder / "workspace.yaml"
        workspace.write_text(_WORKSPACE_YAML)
        for selection in selections:
            (declared / f"{selection.name}.yaml").write_text(selection.to_yaml())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        # Its tables are made before Dagster's processes start, which would else make them at the same moment.
        self.instance = dg.DagsterInstance.from_config(str(self._home))
        self._log = (folder / "dagster-dev.log").open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dagster", "dev", "-w", str(workspace)),
                *("-h", "127.0.0.1", "-p", str(self._port)),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "DAGSTER_HOME": str(self._home),
                "SCALSELECT_SELECTIONS": str(declared),
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(Path(__file__).with_name("site")), str(ROOT), os.getenv("PYTHONPATH")])
                ),
                **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"), "1"),
                # Without it, what is reported during a tick may be seen by two of them, and be made twice.
                "DAGSTER_AUTOMATION_TICK_SETTLE_SECONDS": "0.1",
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self.wait("the code location", self._is_loaded)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the deployment."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    def wait(self, what: str, done: Callable[[], bool]) -> None:
        """Wait until something holds.

        Raises:
            TimeoutError: It did not, with the end of Dagster's log.
        """
        end = time.monotonic() + PATIENCE
        while not done():
            if self._process.poll() is not None or time.monotonic() > end:
                log = Path(self._log.name).read_text(errors="replace")[-3000:]
                raise TimeoutError(f"waited in vain for {what}; {log}")
            time.sleep(1)  # looking costs, too

    def ask(self, query: str, **variables: Any) -> Any:
        """The only field of a GraphQL query's answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answered:
            answer = json.load(answered)
        assert "errors" not in answer, answer["errors"]
        (value,) = answer["data"].values()
        return value

    def _is_loaded(self) -> bool:
        try:
            found = self.ask("{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return bool(found.get("nodes"))

    # What a person does in the UI

    def turn_on_sensor(self, name: str) -> None:
        answer = self.ask(
            "mutation($s: SensorSelector!) { startSensor(sensorSelector: $s) { __typename } }",
            s={**_LOCATION, "sensorName": name},
        )
        assert answer["__typename"] == "Sensor", answer

    def turn_off_sensor(self, name: str) -> None:
        answer = self.ask(
            "query($s: SensorSelector!) { sensorOrError(sensorSelector: $s) "
            "{ ... on Sensor { sensorState { id } } } }",
            s={**_LOCATION, "sensorName": name},
        )
        stopped = self.ask(
            "mutation($id: String!) { stopSensor(id: $id) { __typename } }", id=answer["sensorState"]["id"]
        )
        assert stopped["__typename"] == "StopSensorMutationResult", stopped
        self.wait(f"{name} to be off", lambda: self.instigators()[name] == "STOPPED")

    def turn_on_schedule(self, name: str) -> None:
        answer = self.ask(
            "mutation($s: ScheduleSelector!) { startSchedule(scheduleSelector: $s) { __typename } }",
            s={**_LOCATION, "scheduleName": name},
        )
        assert answer["__typename"] == "ScheduleStateResult", answer

    def turn_off_schedule(self, name: str) -> None:
        """Turn a schedule off, again where a tick of this moment has written that it is on."""

        def turned_off() -> bool:
            answer = self.ask(
                "query($s: ScheduleSelector!) { scheduleOrError(scheduleSelector: $s) "
                "{ ... on Schedule { scheduleState { id } } } }",
                s={**_LOCATION, "scheduleName": name},
            )
            stopped = self.ask(
                "mutation($id: String!) { stopRunningSchedule(id: $id) { __typename } }",
                id=answer["scheduleState"]["id"],
            )
            assert stopped["__typename"] == "ScheduleStateResult", stopped
            time.sleep(2)
            return self.instigators()[name] == "STOPPED"

        self.wait(f"{name} to be off", turned_off)

    def instigators(self) -> dict[str, str]:
        """Every schedule and sensor with its status."""
        found = self.ask(
            "query($r: RepositorySelector!) { repositoryOrError(repositorySelector: $r) { ... on Repository "
            "{ schedules { name scheduleState { status } } sensors { name sensorState { status } } } } }",
            r=_LOCATION,
        )
        return {
            **{one["name"]: one["scheduleState"]["status"] for one in found["schedules"]},
            **{one["name"]: one["sensorState"]["status"] for one in found["sensors"]},
        }

    def launch(self, job: str) -> str:
        """Launch a job; returns the run's id."""
        answer = self.ask(
            "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) "
            "{ __typename ... on LaunchRunSuccess { run { runId } } } }",
            p={"selector": {**_LOCATION, "jobName": job}, "runConfigData": {}},
        )
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def terminate(self, run_id: str) -> None:
        answer = self.ask("mutation($id: String!) { terminateRun(runId: $id) { __typename } }", id=run_id)
        assert answer["__typename"] == "TerminateRunSuccess", answer

    # What Dagster has recorded

    def status(self, run_id: str) -> dg.DagsterRunStatus:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run.status

    def finish(self, run_id: str) -> dg.DagsterRunStatus:
        """Wait for a run to end."""
        self.wait(f"run {run_id}", lambda: self.status(run_id) in _ENDED)
        return self.status(run_id)

    def told(self, run_id: str) -> str:
        """The end of a run's log, for messages."""
        return "\n".join(
            str(entry.message or entry.user_message) for entry in self.instance.all_logs(run_id)[-12:]
        )

    def runs(self) -> list[dg.RunRecord]:
        """All runs, oldest first."""
        return list(self.instance.get_run_records(ascending=True))

    def ticks(self, sensor: str) -> int:
        """How often a sensor has been evaluated."""
        states = [state for state in self.instance.all_instigator_state() if state.instigator_name == sensor]
        return sum(
            1
            for state in states
            for tick in self.instance.get_ticks(state.instigator_origin_id, state.selector_id)
            if tick.status.value != "STARTED"
        )

    def wait_for_quiet(self, *sensors: str) -> None:
        """Wait until every sensor has looked three times since the last run ended, and no run came of it."""

        def counted() -> tuple[int, bool]:
            records = self.runs()
            return len(records), all(record.dagster_run.status in _ENDED for record in records)

        quiet_since: dict[str, int] = {}
        known = -1

        def quiet() -> bool:
            nonlocal known, quiet_since
            count, ended = counted()
            if count != known or not ended:
                known, quiet_since = count, {sensor: self.ticks(sensor) for sensor in sensors}
                return False
            return all(self.ticks(sensor) >= before + 3 for sensor, before in quiet_since.items())

        self.wait("quiet", quiet)

    def materializations(self, selection: Selection) -> Counter[tuple[str, str | None]]:
        """How often each asset of a selection was materialized, by partition."""
        found: Counter[tuple[str, str | None]] = Counter()
        for key in self.instance.all_asset_keys():
            if key.path[0] == selection.name:
                for record in self.instance.fetch_materializations(key, limit=1000).records:
                    found[key.path[-1], record.partition_key] += 1
        return found


_ENDED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}


def overlap(one: dg.RunRecord, other: dg.RunRecord) -> bool:
    """Whether two runs were at work at the same time."""
    return max(_start(one), _start(other)) < min(_end(one), _end(other))


def _start(record: dg.RunRecord) -> float:
    return record.start_time or float("inf")


def _end(record: dg.RunRecord) -> float:
    return record.end_time or float("inf")


def shown(phases: Mapping[str, Mapping[str, Counter[tuple[str, str | None]]]]) -> str:
    """A table of materializations: a line for each phase and selection, a column for each asset."""
    assets = list(
        dict.fromkeys(asset for counts in phases.values() for one in counts.values() for asset, _ in one)
    )
    lines = [f"{'phase':<32}{'selection':<12}" + "".join(f"{asset[:12]:>14}" for asset in assets)]
    for phase, by_selection in phases.items():
        for name, counts in by_selection.items():
            per_asset = [sum(n for (asset, _), n in counts.items() if asset == one) for one in assets]
            lines.append(f"{phase:<32}{name:<12}" + "".join(f"{n:>14}" for n in per_asset))
    return "\n".join(lines)
