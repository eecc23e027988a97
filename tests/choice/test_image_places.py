"""Questions before their images are counted, warned of, and compared with what the basis follows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from scalselect_assets.choice.image_places import CHECK
from scalselect_assets.deployment import open_instance
from scalselect_assets.embedding import receipts
from scalselect_assets.resources.row_hashes import ROW_HASH
from scalselect_assets.subspace import subspace_basis
from tests.bench import Bench
from tests.conftest import png_bytes, sharegpt_row, write_lines

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.method.zoo import write_tiny_vlm

    return write_tiny_vlm("qwen2_vl", tmp_path_factory.mktemp("zoo") / "qwen2_vl")


@pytest.fixture
def make_bench(tmp_path: Path, qwen: Path) -> Callable[..., Bench]:
    """A pool of two shards; ``late`` are the rows of each whose mark is written last."""

    def make(late: dict[str, set[int]], **options: Any) -> Bench:
        for seed, (shard, last) in enumerate(late.items()):
            rows = []
            for number in range(12):
                image, text = f"{shard}-{number}.png", f"Is this picture {number}?"
                (tmp_path / "pool").mkdir(exist_ok=True)
                (tmp_path / "pool" / image).write_bytes(png_bytes(100 * seed + number))
                written = f"{text}\n<image>" if number in last else f"<image>\n{text}"
                rows.append(sharegpt_row(image, written, "Yes", id=number))
            write_lines(tmp_path / "pool" / f"{shard}.jsonl", rows)
        bench = Bench(tmp_path / "pool", tmp_path / "store", qwen)
        bench.options |= {"budget": 6, **options}
        return bench

    return make


def check_of(bench: Bench) -> dg.AssetCheckEvaluation:
    key = dg.AssetCheckKey(bench.selection.key("selected_subset"), CHECK)
    with open_instance(bench.selection) as instance:
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    assert record.event is not None
    found: dg.AssetCheckEvaluation = record.event.dagster_event.asset_check_evaluation_data  # type: ignore[union-attr]
    return found


def test_by_default_marks_behind_the_question_are_no_question_before_its_image(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench({"a": {1, 2}, "b": {5}})
    assert not bench.refresh().problems()
    assert check_of(bench).passed
    assert bench.metadata("selected_subset")["asked_before_image"] == 0
    assert "direction_1_follows_image_place" not in bench.metadata("selected_subset")


@pytest.mark.parametrize("late", [{"a": {1, 2}, "b": {5}}, {"a": set(range(2, 12)), "b": set(range(11))}])
def test_as_written_they_are_counted_and_compared_with_the_strongest_directions(
    late: dict[str, set[int]], make_bench: Callable[..., Bench]
) -> None:
    """The comparison equals the one by its definition, whichever kind of row is the rarer one."""
    bench = make_bench(late, image_place="as_written")
    report = bench.refresh()
    assert not report.failed
    assert not report.problems()  # it warns, and fails nothing
    told, chosen = bench.metadata("selected_subset"), bench.artifacts.read_frame("selected_subset")[0]
    n_late = sum(len(rows) for rows in late.values())
    assert told["asked_before_image"] == n_late
    assert told["asked_before_image_share"] == pytest.approx(n_late / 24)
    late_chosen = sum(
        row in late[shard.removesuffix(".jsonl")] for shard, row in chosen.select("shard", "row").rows()
    )
    assert told["asked_before_image_share_of_choice"] == pytest.approx(late_chosen / 6)

    vectors, subspace = bench.vectors(), subspace_basis.read_basis(bench.artifacts)[0]
    keys = sorted(vectors)
    marked = np.array([int(key.split("#")[1]) in late[key.split(".")[0]] for key in keys])
    u = (np.array([vectors[key] for key in keys], np.float64) - subspace.mean) @ subspace.whitening
    for direction in range(min(3, subspace.k)):
        own = u[:, direction]
        between = sum(mask.sum() * (own[mask].mean() - own.mean()) ** 2 for mask in (marked, ~marked))
        found = told[f"direction_{direction + 1}_follows_image_place"]
        assert found == pytest.approx(between / ((own - own.mean()) ** 2).sum(), abs=1e-6)

    check = check_of(bench)
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description is not None
    assert f"in {n_late} of 24 rows no question follows the last image" in check.description
    assert "declare image_place: first" in check.description


def test_a_shard_that_an_earlier_release_has_embedded_counts_as_unknown(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench({"a": set(), "b": {3}}, image_place="as_written")
    bench.refresh()
    forget_the_column(bench, "b.jsonl")

    bench.options["budget"] = 7
    assert not bench.refresh().problems()

    check = check_of(bench)
    assert check.passed
    assert {name: value.value for name, value in check.metadata.items()}.items() >= {
        "asked_before_image": 0,
        "embedded": 24,
        "unknown": 12,
    }.items()


def forget_the_column(bench: Bench, shard: str) -> None:
    """Write the shard's table again without the column, as earlier releases did."""
    tables = bench.storage.embeddings(str(bench.store))
    table, header = receipts.recorded_table(bench.artifacts, shard)
    held = tables.read_all(table)
    known = ("row", "sample_key", "vector", "source_id", "asks_before_image", ROW_HASH)
    again = tables.replace(
        table.fingerprint,
        shard,
        dimension=table.dimension,
        rows=held["row"].to_pylist(),
        sample_keys=held["sample_key"].to_pylist(),
        source_ids=held["source_id"].to_pylist(),
        vectors=np.array(held["vector"].to_pylist(), np.float32),
        attributes={name: held[name].combine_chunks() for name in held.schema.names if name not in known},
        notes={"max_image_pixels": header["max_image_pixels"]},
    )
    bench.artifacts.write_json(receipts.NAME, {"table": again.to_json(), "header": header}, shard)
