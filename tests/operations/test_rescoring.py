"""From moments to scores through Dagster: what changed is read, what may stay stays, numbers are right."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from scalselect_assets.charts import in_dagster
from scalselect_assets.charts.in_dagster import energy_curve
from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.subspace.verification import rebuild_difference
from tests.bench import WHOLE, Bench, ran
from tests.conftest import write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


@pytest.fixture
def bench(standing: Callable[..., Path], demo_vlm: Path) -> Bench:
    folder = standing({f"{name}.jsonl": 4 for name in "abcd"})
    return Bench(folder / "pool", folder / "store", demo_vlm)


def expected_scores(bench: Bench, k: int | None = None) -> tuple[dict[str, float], int]:
    """Scores of a full SVD of the preprocessed vectors, and k."""
    vectors = bench.vectors()
    X = np.array(list(vectors.values()), np.float64)
    if bench.selection.unit_rows:
        X /= np.linalg.norm(X, axis=1, keepdims=True)
    X -= X.mean(axis=0)
    if bench.selection.standardise:
        X /= X.std(axis=0)
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    k = k or int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.9)) + 1
    return dict(zip(vectors, np.square(U[:, :k]).sum(axis=1), strict=True)), k


def assert_exact(bench: Bench, k: int | None = None) -> None:
    expected, k = expected_scores(bench, k)
    scores = bench.scores()
    assert scores.keys() == expected.keys()
    np.testing.assert_allclose([scores[key] for key in expected], list(expected.values()), rtol=1e-5)
    assert bench.metadata("subspace_basis")["rank"] == k


def test_a_new_a_changed_and_a_removed_shard_each_cost_their_own_moments(bench: Bench) -> None:
    bench.first_refresh()
    assert (
        bench.metadata("subspace_basis")["rebuilt"],
        bench.metadata("subspace_basis")["moments_read"],
    ) == (
        True,
        4,
    )
    write_pool_shard(bench.pool, "e.jsonl", 3, seed=9000)
    bench.refresh()
    added = bench.metadata("subspace_basis")
    assert (added["rebuilt"], added["moments_read"]) == (False, 1)
    assert_exact(bench)

    write_pool_shard(bench.pool, "b.jsonl", 5, seed=8000)
    (bench.pool / "c.jsonl").unlink()
    bench.refresh()
    changed = bench.metadata("subspace_basis")
    assert (changed["rebuilt"], changed["moments_read"]) == (False, 3)
    assert (changed["shards_added"], changed["shards_removed"]) == (1, 2)
    assert_exact(bench)
    assert max(rebuild_difference(bench.artifacts).values()) < 1e-12


def test_a_rebuild_is_one_switch_and_changes_no_score(bench: Bench) -> None:
    bench.first_refresh()
    before = bench.scores()
    report = bench.refresh(rebuild_basis=True)
    assert ran(report) == ["subspace_basis"]
    assert bench.metadata("subspace_basis")["rebuilt"] is True
    assert bench.scores() == before
    assert bench.refresh().runs == []


def test_the_comparison_with_a_rebuild_tells_equal_from_different(bench: Bench) -> None:
    bench.first_refresh()
    selection = bench.selection
    job = build_defs([selection], {"storage": bench.storage, "vlm": bench.vlm}).resolve_job_def(
        "bench_verify_basis"
    )
    with open_instance(selection) as instance:
        job.execute_in_process(instance=instance)
        (observed,) = instance.fetch_observations(selection.key("subspace_basis"), limit=5).records
    assert observed.asset_observation is not None
    seen = {name: value.value for name, value in observed.asset_observation.metadata.items()}
    assert seen == rebuild_difference(bench.artifacts)
    assert max(seen.values()) < 1e-9

    arrays, header = bench.artifacts.read_arrays("subspace_basis")
    tilted = {**arrays, "singular_values": arrays["singular_values"] * (1 + 1e-6)}
    bench.artifacts.write_arrays("subspace_basis", tilted, header)
    with open_instance(selection) as instance, pytest.raises(dg.Failure, match="rebuild: true"):
        job.execute_in_process(instance=instance)


@pytest.mark.parametrize(
    ("options", "moments_anew"),
    [
        ({"standardise": True}, False),
        ({"unit_rows": True}, True),
        ({"standardise": True, "unit_rows": True}, True),
    ],
)
def test_preprocessing_gives_the_scores_of_the_preprocessed_matrix(
    bench: Bench, options: dict[str, bool], moments_anew: bool
) -> None:
    bench.first_refresh()
    versions = {bench.artifacts.read_header("subspace_basis", suffix=".safetensors")["data_version"]}
    bench.options.update(options)
    report = bench.refresh()
    shards = [f"embedding_moments[{name}.jsonl]" for name in "abcd"] if moments_anew else []
    assert ran(report) == [*shards, *WHOLE]
    assert report.embedded == []
    assert_exact(bench)
    versions.add(bench.artifacts.read_header("subspace_basis", suffix=".safetensors")["data_version"])
    assert len(versions) == 2


@pytest.mark.parametrize(("rule", "k"), [(3, 3), ("effective_rank", None), ("gavish_donoho", None)])
def test_a_rank_rule_chooses_the_rank(bench: Bench, rule: str | int, k: int | None) -> None:
    bench.first_refresh()
    spectrum = bench.artifacts.read_arrays("subspace_basis")[0]["spectrum"]
    bench.options["rank"] = rule
    bench.refresh()
    assert_exact(bench, k or bench.selection.rank_rule.rank(spectrum, 16, 128))


def test_the_basis_shows_its_curve_its_alternatives_and_its_drift(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_dagster, "energy_curve", energy_curve)  # `quick_dagster` draws none
    bench.refresh()
    first = bench.metadata("subspace_basis")
    assert "drift_score_change" not in first
    assert first["energy_curve"].startswith(f"![{first['rank']} of ")
    assert "](data:image/png;base64," in first["energy_curve"]
    by_rule = {record.data["rule"]: record.data for record in first["rank_alternatives"].records}
    assert next(iter(by_rule)) == "energy 0.9"  # the present rule
    assert set(by_rule) >= {"energy 0.8", "energy 0.85", "energy 0.95", "effective_rank"}
    assert (by_rule["energy 0.9"]["overlap"], by_rule["energy 0.9"]["k"]) == (1.0, first["rank"])
    assert (by_rule["energy 0.9"]["chosen_samples"], by_rule["energy 0.9"]["compared_samples"]) == (8, 16)

    write_pool_shard(bench.pool, "e.jsonl", 3, seed=9000)
    bench.refresh()
    second = bench.metadata("subspace_basis")
    assert second["drift_score_change"] > 0
    assert 0 < second["drift_largest_angle_degrees"] <= 90
    assert 0 < second["drift_energy_kept"] <= 1
    manifest = bench.artifacts.read_json("training_dataset", "manifest")
    assert manifest["basis_drift"]["score_change"] == second["drift_score_change"]
    scored_with = {shard["scored_with_basis"] for shard in manifest["shards"].values()}
    assert scored_with == {manifest["basis_version"]}


def test_moments_that_could_not_be_prepared_anew_leave_the_selection_as_it_was(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.first_refresh()
    before = bench.scores()
    bench.options["unit_rows"] = True
    write_arrays = ArtifactStore.write_arrays

    def fails_for_b(store: ArtifactStore, asset: str, *arguments: Any) -> Any:
        if asset == "embedding_moments" and arguments[-1] == "b.jsonl":
            raise OSError("disk full")
        return write_arrays(store, asset, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "write_arrays", fails_for_b)
        with pytest.raises(RefreshError, match=r"embedding_moments of b\.jsonl .*shard b\.jsonl failed"):
            bench.refresh()
    assert bench.scores() == before
    assert bench.refresh().failed == {}
    assert bench.scores() != before
    assert_exact(bench)  # all of unit length


def test_vectors_that_are_gone_when_moments_need_them_are_made_again_by_the_next_run(bench: Bench) -> None:
    bench.first_refresh()
    for data in bench.store.glob("lance/*a_2ejsonl.lance/data"):
        shutil.rmtree(data)
    bench.options["unit_rows"] = True
    assert list(bench.refresh().failed) == ["a.jsonl"]
    assert bench.refresh().embedded == ["a.jsonl"]
    assert_exact(bench)
