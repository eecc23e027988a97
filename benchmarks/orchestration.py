"""What the orchestration costs beside the model: per shard, per night, and for discovering a large pool.

``python -m benchmarks.orchestration --folder DIR`` does all three of ``--per-shard``, ``--night`` and
``--discover``. A stand-in takes the model's place, which makes a vector of an image's hash, so that what is
left is ours, LanceDB's and Dagster's.

``--per-shard``: a first refresh of tiny shards, one Dagster run for each, in turns with the floor: an empty
job, and an asset job of as many empty assets and checks with the same partitions, each executed in process as
often on the same instance. The processor time of the refresh is split by sampling its stack every millisecond
of it: our code, LanceDB, and Dagster by what it does. Also the same shards as one run over all of them.

``--night``: a pool of 200 shards, 25 of the demo's pools side by side. Each night is a process of its own,
as it is in a deployment: one with nothing new, one with a shard more, one with another energy threshold, one
with another budget. The model's files are the demo model's, so that loading it is real; its time is listed
separately.

``--discover``: 10,000 small shards, six different contents: discovered for the first time and again, reported
to Dagster for the first time and again. Fails where the second discovery reads a shard file.

Seconds are wall time, which waiting for the disk counts in; processor seconds say more on a busy machine.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import FrameType
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np

from benchmarks import machine
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.demo.demo_pool import write_demo_pool
from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.embedding import receipts
from scalselect_assets.operations.refresh import Refresh, RefreshReport
from scalselect_assets.pool import raw_samples
from scalselect_assets.pool.discovery import discover, report_discovery
from scalselect_assets.recording.partitions import shard_check, shards_name
from scalselect_assets.resources.progress import LogProgress
from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import CARDS, VlmResource, model_signature
from scalselect_assets.subspace import embedding_moments

if TYPE_CHECKING:
    from scalselect_assets.method.representation.encoder import ChatSample, Outcome, VlmEncoder
    from scalselect_assets.method.representation.workers import ImageReader

DIMENSION = 64
BY_SHARD = (raw_samples.NAME, receipts.NAME, embedding_moments.NAME)
NIGHTS = ("nothing new", "one shard more", "another energy threshold", "another budget")

_VARIANTS = 6
_DEMO_SHARDS = 8
_SAMPLE_SECONDS = 0.001
_SITE_PACKAGES = f"{os.sep}site-packages{os.sep}"
_REFRESH_FILE = f"scalselect_assets{os.sep}refresh.py"
_OURS, _LANCEDB, _REST = "our assets", "LanceDB", "Dagster: the rest"


@dataclass(frozen=True, slots=True)
class ShardCost:
    """What a piece of work took: wall time, and processor time of this process and of its children."""

    seconds: float
    cpu: float
    cpu_children: float

    def per(self, n: int) -> "ShardCost":
        """Of one of ``n`` equal parts."""
        return ShardCost(self.seconds / n, self.cpu / n, self.cpu_children / n)


@contextmanager
def measured(into: list[ShardCost]) -> Iterator[None]:
    """Append what the block costs."""
    start, before = time.perf_counter(), _cpu()
    yield
    now = _cpu()
    into.append(ShardCost(time.perf_counter() - start, now[0] - before[0], now[1] - before[1]))


def cost_of(work: Callable[[], object]) -> ShardCost:
    """Of one call."""
    costs: list[ShardCost] = []
    with measured(costs):
        work()
    return costs[0]


def _cpu() -> tuple[float, float]:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


# The model's stand-in


class StandIn:
    """Embeds as a ``VlmEncoder`` does; the vectors follow from the images' bytes.

    Else, as for the report's attention maps, it is the model that was loaded, if one was.
    """

    def __init__(self, card: Any, device: Any, model: "VlmEncoder | None" = None) -> None:
        """Make believe to be the model of ``card``."""
        self.card, self.device, self._model = card, device, model

    def __getattr__(self, name: str) -> Any:
        """What no vector needs."""
        return getattr(self._model, name)

    def encode_as_done(
        self, samples: "Sequence[ChatSample]", read_image: "ImageReader", **_: Any
    ) -> "Iterator[tuple[int, Outcome]]":
        """One outcome after the other."""
        from scalselect_assets.method.representation.encoder import Representation
        from scalselect_assets.method.representation.rejection import Rejection, RejectionReason

        for place, sample in enumerate(samples):
            try:
                hashes = tuple(sha256(read_image(image)).hexdigest() for image in sample.images)
            except FileNotFoundError:
                yield place, Rejection(RejectionReason.MISSING_IMAGE, "it is gone")
                continue
            seed = sha256(repr((hashes, place)).encode()).digest()
            vector = np.random.default_rng(list(seed)).standard_normal(self.card.dimension, np.float32)
            yield place, Representation(vector, 10, 4, 2, 6, 0.5, hashes)


class StandInVlm(VlmResource):
    """Gives the stand-in, without any model."""

    def encoder(self, artifacts: Any, **target: Any) -> Any:
        """The stand-in model; its card is written to the store."""
        import torch

        from scalselect_assets.method.representation.model_card import ModelCard

        card = ModelCard(
            fingerprint=sha256(repr(target).encode()).hexdigest()[:32],
            model=target["model"],
            revision=None,
            commit=None,
            model_type="stand-in",
            dtype=target["dtype"],
            attention_mass=target["attention_mass"],
            max_tokens=100,
            dimension=DIMENSION,
            n_parameters=0,
            config_sha256="",
            weights_sha256="",
            processor_sha256="",
        )
        signature = model_signature(**target)
        if not artifacts.exists(CARDS, signature, suffix=".json"):
            artifacts.write_json(CARDS, card.to_json(), signature)
        return StandIn(card, torch.device("cpu"))


class LoadingVlm(VlmResource):
    """Loads the model that is asked for, and gives the stand-in with its card."""

    def encoder(self, artifacts: Any, **target: Any) -> Any:
        """The stand-in, once the model is loaded, which the resource does once in a process."""
        loaded: VlmEncoder = super().encoder(artifacts, **target)
        return StandIn(loaded.card, loaded.device, loaded)


# A selection and its refresh


class Deployment:
    """One selection with its resources, in this process."""

    def __init__(self, folder: Path, vlm: VlmResource, **options: Any) -> None:
        """The pool and the store below ``folder``; options are a `Selection`'s."""
        self.selection = Selection(
            **{
                "name": "bench",
                "source": str(folder / "pool"),
                "store": str(folder / "store"),
                "target_model": "stand-in/of-a-model",
                "settle_seconds": 0,
                **options,
            }
        )
        self.storage, self.vlm = StorageResource(), vlm
        self.artifacts = self.storage.artifacts(self.selection.store)
        self.source: SampleSource = self.storage.samples(
            self.selection.source, self.selection.image_root, self.selection.store
        )
        defs = build_defs([self.selection], {"storage": self.storage, "vlm": vlm})
        self.job = defs.resolve_job_def(self.selection.job_name("assets"))

    def refresh(self, instance: dg.DagsterInstance) -> RefreshReport:
        """As the command line does it, with a quiet console.

        Raises:
            RuntimeError: Something failed, which would not be what is to be measured.
        """
        report = Refresh(
            self.selection,
            job=self.job,
            instance=instance,
            storage=self.storage,
            vlm=self.vlm,
            progress=LogProgress(),
            log=logging.getLogger("scalselect.benchmark"),
            log_level="CRITICAL",
        ).run()
        if report.failed:
            raise RuntimeError(f"Got failures where there must be none: {report.problems()}")
        return report


def write_tiny_pool(folder: Path, n_shards: int, rows: int = 3) -> None:
    """Shards of a few rows, in half a dozen variants, which share a few images."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(_VARIANTS):
        (folder / "images" / f"{number}.png").write_bytes(generator.bytes(200))
    variants = ["".join(f"{_row(variant, row)}\n" for row in range(rows)) for variant in range(_VARIANTS)]
    for number in range(n_shards):
        (folder / f"shard-{number:06d}.jsonl").write_text(variants[number % _VARIANTS])


def _row(variant: int, row: int) -> str:
    turns = [
        {"role": "user", "content": f"<image>\nIs this {variant} or {row}?"},
        {"role": "assistant", "content": "It is."},
    ]
    return json.dumps({"id": row, "messages": turns, "images": [f"images/{(variant + row) % _VARIANTS}.png"]})


# Per shard


class StackSampler:
    """Splits the processor time of a block by what the main thread is doing in it.

    A signal comes every millisecond of processor time; all that has passed since the last one goes to the
    present stack, so that a call into compiled code, which no signal interrupts, is counted in full.

    Attributes:
        seconds: By part.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.seconds: Counter[str] = Counter()
        self._last = 0.0

    def __enter__(self) -> "StackSampler":
        self._last = time.process_time()
        self._before = signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, _SAMPLE_SECONDS, _SAMPLE_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._before)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        now = time.process_time()
        self.seconds[_part(frame)] += now - self._last
        self._last = now


_DAGSTER = {
    "_initdb": "Dagster: a new run's event file and its schema",
    "fetch_external_input_asset_version_info": "Dagster: versions of the inputs",
    "has_dynamic_partition": "Dagster: is it a partition?",
    "get_dynamic_partitions": "Dagster: is it a partition?",
    "store_event": "Dagster: events",
    "handle_run_event": "Dagster: the run's record",
    "get_run_by_id": "Dagster: the run's record",
    "add_run": "Dagster: the run's record",
    "as_ephemeral_job": "Dagster: job, plan and their snapshots",
    "create_execution_plan": "Dagster: job, plan and their snapshots",
    "get_job_snapshot": "Dagster: job, plan and their snapshots",
    "ensure_persisted_job_snapshot": "Dagster: job, plan and their snapshots",
    "ensure_persisted_execution_plan_snapshot": "Dagster: job, plan and their snapshots",
    "resource_initialization_event_generator": "Dagster: resources",
    "capture_logs": "Dagster: capturing stdout and stderr",
}
"""What Dagster does, by functions of it; those of the innermost calls come first."""


def _part(frame: FrameType | None) -> str:
    """The part of the path that a stack belongs to."""
    called: list[str] = []
    ours = refresh = False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if _SITE_PACKAGES + "lancedb" in file:
            return _LANCEDB
        called.append(name)
        # What our asset bodies call, down to Dagster's own storage, which they call, too.
        ours = ours or name == "invoke_compute_fn"
        refresh = refresh or file.endswith(_REFRESH_FILE)
        frame = frame.f_back
    named = next((part for name, part in _DAGSTER.items() if name in called), None)
    if named:
        return named
    if ours:
        return _OURS
    return _REST if "execute_in_process" in called else "our refresh" if refresh else "other"


def empty_assets(partitions: dg.DynamicPartitionsDefinition, n_checks: int) -> dg.Definitions:
    """As many assets by shard as ours, one after the other, that do nothing; and a job that does nothing."""

    def asset(number: int) -> dg.AssetsDefinition:
        key = dg.AssetKey(["empty", str(number)])
        checks = n_checks if number == 1 else 0
        names = [f"check_{check}" for check in range(checks)]

        @dg.asset(
            key=key,
            partitions_def=partitions,
            deps=[dg.AssetKey(["empty", str(number - 1)])] if number else [],
            check_specs=[shard_check(partitions, key, name, "Nothing is wrong.") for name in names],
        )
        def empty() -> dg.MaterializeResult:
            passed = [dg.AssetCheckResult(check_name=name, passed=True) for name in names]
            return dg.MaterializeResult(data_version=dg.DataVersion("1"), check_results=passed)

        return empty

    @dg.op
    def nothing() -> None:
        pass

    @dg.job(executor_def=dg.in_process_executor)
    def empty_job() -> None:
        nothing()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # of checks by partition
        assets = [asset(number) for number in range(len(BY_SHARD))]
    job = dg.define_asset_job("empty_assets", selection=assets, executor_def=dg.in_process_executor)
    return dg.Definitions(assets=assets, jobs=[job, empty_job], executor=dg.in_process_executor)


def per_shard(folder: Path, n_shards: int, rounds: int) -> dict[str, Any]:
    """Costs per shard by what is done, one for each round, and the split of the refresh's processor time."""
    costs: dict[str, list[ShardCost]] = {}
    parts: Counter[str] = Counter()
    for number in range(-1, rounds):  # the first round does not count: it imports
        found, split = _round(folder / f"round-{number}", n_shards if number >= 0 else 2)
        if number >= 0:
            for name, cost in found.items():
                costs.setdefault(name, []).append(cost)
            parts.update(split)
    return {
        "shards": n_shards,
        "costs": {name: [asdict(cost) for cost in of_rounds] for name, of_rounds in costs.items()},
        "split": {part: seconds / rounds / n_shards for part, seconds in parts.most_common()},
    }


def _round(folder: Path, n_shards: int) -> tuple[dict[str, ShardCost], Counter[str]]:
    write_tiny_pool(folder / "pool", n_shards)
    ours = Deployment(folder, StandInVlm(device="cpu"), compare=None, report=False)
    checks = ours.job.asset_layer.asset_graph.asset_check_keys
    n_checks = sum(check.asset_key.path[-1] in BY_SHARD for check in checks)
    empty = empty_assets(ours.selection.partitions, n_checks)
    jobs = {name: empty.resolve_job_def(name) for name in ("empty_job", "empty_assets")}
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    costs: dict[str, ShardCost] = {}
    with open_instance(ours.selection) as instance:
        report_discovery(ours.selection, instance, discover(ours.source, ours.artifacts))
        shards = instance.get_dynamic_partitions(shards_name(ours.selection.name))
        costs["an empty job"] = cost_of(
            lambda: [jobs["empty_job"].execute_in_process(quiet, instance) for _ in shards]
        ).per(n_shards)
        path = jobs["empty_assets"]
        costs[f"{len(BY_SHARD)} empty assets, {n_checks} checks"] = cost_of(
            lambda: [path.execute_in_process(quiet, instance, partition_key=shard) for shard in shards]
        ).per(n_shards)
        with StackSampler() as sampler:
            costs["refresh"] = cost_of(lambda: _refresh_shards(ours, instance, shards)).per(n_shards)
    again = Deployment(folder, StandInVlm(device="cpu"), store=str(folder / "by range"))
    with open_instance(again.selection) as instance:
        report_discovery(again.selection, instance, discover(again.source, again.artifacts))
        again.vlm.encoder(again.artifacts, **again.selection.target)
        costs["one run over all of them"] = cost_of(
            lambda: again.job.execute_in_process(
                quiet,
                instance,
                asset_selection=[again.selection.key(asset) for asset in BY_SHARD],
                tags={
                    "dagster/asset_partition_range_start": shards[0],
                    "dagster/asset_partition_range_end": shards[-1],
                },
            )
        ).per(n_shards)
    return costs, sampler.seconds


def _refresh_shards(ours: Deployment, instance: dg.DagsterInstance, shards: Sequence[str]) -> None:
    """The shards' part of a refresh: the runs that it makes for each, without what follows for the pool."""
    stop = iter([*(False for _ in shards), True])
    try:
        Refresh(
            ours.selection,
            job=ours.job,
            instance=instance,
            storage=ours.storage,
            vlm=ours.vlm,
            progress=LogProgress(),
            log=logging.getLogger("scalselect.benchmark"),
            log_level="CRITICAL",
            should_stop=lambda: next(stop),
        ).run()
    except dg.DagsterExecutionInterruptedError:
        return
    raise RuntimeError("Got a refresh with fewer runs than shards; it no longer does what is measured here.")


# Nights


def write_night_pool(folder: Path, n_shards: int) -> None:
    """Whole pools of the demo side by side, each of other scenes."""
    for number in range(-(-n_shards // _DEMO_SHARDS)):
        write_demo_pool(folder / f"{number:03d}", seed=number)
    for path in sorted(folder.glob("*/*.jsonl"))[n_shards:]:
        path.unlink()


def night(folder: Path, model: Path, what: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """One refresh, in a process of its own: what it cost, what it did, and what loading the model took."""
    start = time.perf_counter()
    from scalselect_assets.method.representation import (
        loading,  # imports torch and Transformers, as a night would, too
    )

    importing = time.perf_counter() - start
    loads: list[ShardCost] = []
    original = loading.load_encoder

    def counted(*arguments: Any, **more: Any) -> Any:
        with measured(loads):
            return original(*arguments, **more)

    loading.load_encoder = counted  # type: ignore[assignment]
    ours = Deployment(folder, LoadingVlm(device="cpu"), target_model=str(model), **options)
    reports: list[RefreshReport] = []
    with open_instance(ours.selection) as instance:
        cost = cost_of(lambda: reports.append(ours.refresh(instance)))
    return {
        "night": what,
        **asdict(cost),
        "runs": len(reports[0].runs),
        "embedded": len(reports[0].embedded),
        "model_loads": len(loads),
        "model_seconds": sum(load.seconds for load in loads),
        "import_seconds": importing,
    }


def nights(folder: Path, n_shards: int) -> list[dict[str, Any]]:
    """The first fill and the nights after it, one after the other, on one store."""
    from scalselect_assets.demo.demo_model import write_demo_vlm

    model = machine.fresh_process(write_demo_vlm, folder / "model")
    write_night_pool(folder / "pool", n_shards + 1)
    last = sorted((folder / "pool").glob("*/*.jsonl"))[-1]
    aside = last.rename(folder / "the shard more")
    options: dict[str, Any] = {"energy": 0.9, "budget": 0.16}
    results = [machine.fresh_process(night, folder, model, "first fill", options)]
    for what in NIGHTS:
        if what == "one shard more":
            aside.rename(last)
        elif what == "another energy threshold":
            options["energy"] = 0.8
        elif what == "another budget":
            options["budget"] = 0.2
        results.append(machine.fresh_process(night, folder, model, what, options))
    return results


# Discovery


def discovery(folder: Path, n_shards: int) -> dict[str, Any]:
    """Costs of discovering a pool and telling Dagster of it, each for the first time and again.

    Raises:
        RuntimeError: The second discovery reads a shard file, or finds something else.
    """
    write_tiny_pool(folder / "pool", n_shards)
    ours = Deployment(folder, StandInVlm(device="cpu"))
    costs: dict[str, list[ShardCost]] = {"discover": [], "report": []}
    read: list[str] = []
    original = SampleSource.index_shard
    found = []
    for _ in range(2):
        with measured(costs["discover"]):
            found.append(discover(ours.source, ours.artifacts))
        SampleSource.index_shard = lambda self, key: (read.append(key), original(self, key))[1]  # type: ignore[method-assign]
    SampleSource.index_shard = original  # type: ignore[method-assign]
    if read or found[0] != found[1]:
        raise RuntimeError(f"Got {len(read)} shard files read again; equal pools: {found[0] == found[1]}")
    with open_instance(ours.selection) as instance:
        for _ in range(2):
            with measured(costs["report"]):
                report_discovery(ours.selection, instance, found[0])
    return {"shards": n_shards, **{name: [asdict(cost) for cost in both] for name, both in costs.items()}}


# Telling


def print_per_shard(results: Mapping[str, Any]) -> None:
    """The costs, the floor beside them, and the split."""
    print(f"\n## Per shard, of {results['shards']}\n")
    print("| | seconds | median | processor s | of its children |\n|---|" + "---:|" * 4)
    for name, costs in results["costs"].items():
        print(
            f"| {name} | {min(cost['seconds'] for cost in costs):.3f} "
            f"| {median(cost['seconds'] for cost in costs):.3f} "
            f"| {min(cost['cpu'] for cost in costs):.3f} "
            f"| {min(cost['cpu_children'] for cost in costs):.3f} |"
        )
    total = sum(results["split"].values())
    print("\n| of the refresh's processor time | ms per shard | share |\n|---|---:|---:|")
    for part, seconds in results["split"].items():
        print(f"| {part} | {seconds * 1e3:.1f} | {seconds / total:.1%} |")


def print_nights(results: Sequence[Mapping[str, Any]]) -> None:
    """One line per night."""
    print(
        "\n## Nights\n\n| | seconds | processor s | Dagster runs | shards embedded | model loads "
        "| s for loading | importing s |\n|---|" + "---:|" * 7
    )
    for one in results:
        print(
            f"| {one['night']} | {one['seconds']:.2f} | {one['cpu'] + one['cpu_children']:.2f} "
            f"| {one['runs']} | {one['embedded']} | {one['model_loads']} | {one['model_seconds']:.2f} "
            f"| {one['import_seconds']:.2f} |"
        )


def print_discovery(results: Mapping[str, Any]) -> None:
    """First and again."""
    print(f"\n## Discovery of {results['shards']} shards\n")
    print("| | first, s | processor s | again, s | processor s |\n|---|" + "---:|" * 4)
    for name in ("discover", "report"):
        first, again = results[name]
        print(
            f"| {name} | {first['seconds']:.2f} | {first['cpu']:.2f} "
            f"| {again['seconds']:.2f} | {again['cpu']:.2f} |"
        )


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All that the options ask for, printed; returns the numbers."""
    header = machine.fresh_process(machine.describe)
    header["storage"] = ", ".join(f"{name} {version(name)}" for name in ("dagster", "lancedb", "polars"))
    print("# Orchestration\n")
    for name, value in header.items():
        print(f"- {name}: {value}")
    results: dict[str, Any] = {"header": header}
    asked = [mode for mode in ("per_shard", "night", "discover") if getattr(options, mode)]
    for mode in asked or ("per_shard", "night", "discover"):
        if mode == "per_shard":
            results[mode] = machine.fresh_process(per_shard, folder / mode, options.shards, options.rounds)
            print_per_shard(results[mode])
        elif mode == "night":
            results[mode] = nights(folder / mode, options.night_shards)
            print_nights(results[mode])
        else:
            results[mode] = machine.fresh_process(discovery, folder / mode, options.discover_shards)
            print_discovery(results[mode])
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print as Markdown, and delete what was generated."""
    options = parse_options(arguments)
    # As the command line does: LanceDB warns of every table before it is written for the first time.
    os.environ.setdefault("LANCEDB_LOG", "error")
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="orchestration-", dir=options.folder))
    try:
        results = run(options, folder)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.orchestration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--per-shard", action="store_true", help="the cost of a shard, split, beside an empty Dagster job")
    add("--night", action="store_true", help="the nights of a pool")
    add("--discover", action="store_true", help="discovery of a large pool")
    add("--shards", type=int, default=30, help="for --per-shard (30)")
    add("--rounds", type=int, default=3, help="for --per-shard (3)")
    add("--night-shards", type=int, default=200, help="for --night (200)")
    add("--discover-shards", type=int, default=10_000, help="for --discover (10000)")
    add("--folder", type=Path, required=True, help="where a folder for pools and stores is made")
    add("--json", type=Path, help="also write all numbers there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
