"""The protocol of the path: every asset module keeps it, and a new asset is declared in one place."""

import hashlib
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import dagster as dg
import polars as pl
import pytest

import scalselect_assets
from scalselect_assets.asset_path import OutputHeader, PoolAsset, ShardAsset, StoreState, all_assets
from scalselect_assets.dataset.training_manifest import read_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.explain.sample_lineage import trace
from scalselect_assets.operations.automation import following_condition
from scalselect_assets.operations.cleaning import clean
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.materialization import Output, at_work, materialize_shards
from scalselect_assets.resources.artifacts import FRAME
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import importance_scores
from tests.bench import WHOLE, Bench

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


def test_every_asset_module_declares_its_asset_under_its_name() -> None:
    assets = all_assets()
    assert [asset.name for asset in assets] == list(scalselect_assets.ASSET_MODULES)
    assert all(isinstance(asset, ShardAsset | PoolAsset) for asset in assets)
    assert len({asset.name for asset in assets}) == len(assets)


# A new asset by shard and one over the pool: nothing but these and their lines in the table is added.


def toy_by_shard() -> ShardAsset:
    """Counts the scores of each shard."""

    def expected(state: StoreState, shard: str) -> str | None:
        if importance_scores.expected(state, shard) is None:
            return None
        return provenance(state.version(importance_scores.ASSET, shard))

    def provenance(scores_version: str) -> str:
        return data_versions.provenance("score_counts", "1", importance_scores=scores_version)

    def build(selection: Selection) -> dg.AssetsDefinition:
        @dg.asset(
            **selection.asset_options("score_counts", by_shard=True),
            deps=[selection.key(importance_scores.NAME)],
            code_version="1",
        )
        def score_counts(context: dg.AssetExecutionContext, storage: StorageResource) -> dg.MaterializeResult:
            artifacts = storage.artifacts(selection.store)

            def count(shard: str) -> Output:
                scores, header = artifacts.read_frame(importance_scores.NAME, shard)
                version, made_from = f"{scores.height} rows", provenance(header["data_version"])
                frame = pl.DataFrame({"n": [scores.height]})
                artifacts.write_frame("score_counts", frame, data_versions.header(version, made_from), shard)
                return Output(version, made_from, {"seconds": 0.0})

            return materialize_shards(context, storage.locks(selection.store), count, work="score_counts")

        return score_counts

    return ShardAsset(
        name="score_counts",
        code_version="1",
        build=build,
        expected=expected,
        header=lambda state, shard: state.frame_header("score_counts", shard),
        shard_files=(("score_counts", FRAME),),
    )


def toy_over_the_pool(counts: ShardAsset) -> PoolAsset:
    """Adds up the counts of all shards."""

    def expected(state: StoreState) -> str:
        return provenance(sorted(state.version(counts, shard) for shard in state.shards))

    def provenance(versions: list[str]) -> str:
        return data_versions.provenance("score_total", "1", counts=versions)

    def header(state: StoreState) -> OutputHeader:
        return state.frame_header("score_total")

    def build(selection: Selection) -> dg.AssetsDefinition:
        @dg.asset(
            **selection.asset_options("score_total", by_shard=False),
            deps=[selection.key("score_counts")],
            code_version="1",
        )
        def score_total(context: dg.AssetExecutionContext, storage: StorageResource) -> dg.MaterializeResult:
            with at_work(context, storage.locks(selection.store)):
                artifacts = storage.artifacts(selection.store)
                shards = selection.partitions.get_partition_keys(dynamic_partitions_store=context.instance)
                read = [artifacts.read_frame("score_counts", shard) for shard in shards]
                total = pl.DataFrame({"n": [sum(frame["n"].sum() for frame, _ in read)]})
                version = hashlib.sha256(total.write_ndjson().encode()).hexdigest()
                made_from = provenance(sorted(stated["data_version"] for _, stated in read))
                artifacts.write_frame("score_total", total, data_versions.header(version, made_from))
                return Output(version, made_from, {"seconds": 0.0}).result()

        return score_total

    return PoolAsset(name="score_total", code_version="1", build=build, expected=expected, header=header)


@pytest.fixture
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = toy_by_shard()
    for asset in (counts, toy_over_the_pool(counts)):
        module = ModuleType(f"toy_{asset.name}")
        module.ASSET = asset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(scalselect_assets.ASSET_MODULES, asset.name, module.__name__)


@pytest.fixture
def bench(standing: Callable[..., Path], demo_vlm: Path) -> Bench:
    folder = standing({"a.jsonl": 5, "b.jsonl": 4})
    return Bench(folder / "pool", folder / "store", demo_vlm)


@pytest.mark.usefixtures("_toys")
def test_a_new_asset_is_declared_in_one_place(bench: Bench) -> None:
    first = bench.refresh()
    assert [run.split("[")[0] for run in first.runs][2:] == [*WHOLE, "score_counts", "score_total"]
    assert bench.artifacts.read_frame("score_total")[0]["n"].item() == 9
    assert not bench.refresh().runs

    manifest = read_manifest(bench.artifacts)
    assert {"score_counts", "score_total"} <= set(manifest["code"])
    with open_instance(bench.selection) as instance:
        lineage = trace(bench.selection, bench.storage, instance, "a.jsonl#0")
    steps = {step.asset: step for step in lineage.steps}
    assert list(steps)[-2:] == ["score_counts", "score_total"]
    assert steps["score_counts"].made_by is not None
    assert steps["score_total"].made_by is not None

    (bench.pool / "b.jsonl").unlink()
    assert "score_total" in [run.split("[")[0] for run in bench.refresh().runs]
    assert bench.artifacts.exists("score_counts", "b.jsonl", suffix=FRAME)
    with open_instance(bench.selection) as instance:
        clean(bench.selection, bench.storage, instance, retention=timedelta(0))
    assert not bench.artifacts.exists("score_counts", "b.jsonl", suffix=FRAME)
    assert bench.artifacts.exists("score_counts", "a.jsonl", suffix=FRAME)


@pytest.mark.usefixtures("_toys")
def test_a_new_asset_is_requested_after_the_one_before_it(bench: Bench) -> None:
    bench.options["automation"] = "declarative"
    graph = build_defs([bench.selection]).resolve_asset_graph()
    for name, before in (("score_counts", "training_dataset"), ("score_total", "score_counts")):
        condition = graph.get(bench.selection.key(name)).automation_condition
        assert condition == following_condition(bench.selection, before)
