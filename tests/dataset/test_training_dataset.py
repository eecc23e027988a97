"""What is written for the trainer is the pool's own rows, and the manifest leads back to all of them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scalselect_assets.dataset import training_manifest
from scalselect_assets.declaration.export_specs import FORMAT_NAMES
from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.operations.summary import summary
from tests.bench import Bench, ran
from tests.conftest import SHARED_DATA, png_bytes, sharegpt_row, write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


def written(bench: Bench) -> Path:
    return Path(summary(bench.artifacts)["training_dataset"])


def test_json_lines_stay_json_lines_and_each_row_its_own_text(
    make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path
) -> None:
    bench = Bench(make_pool({"a.jsonl": 4, "b.jsonl": 3}), tmp_path / "store", demo_vlm)
    line = (
        '{"extra": {"weight": 1.50, "n": 12345678901234567890}, "id":0,"images":["images/0.png"],'
        '"messages" : [{"role":"human","content":"<image>caf\\u00e9?"},{"role":"gpt","content":"Ja"}]}'
    )
    write_lines(bench.pool / "a.jsonl", [line, *(bench.pool / "a.jsonl").read_text().splitlines()])
    bench.options["budget"] = 1.0
    bench.refresh()
    assert written(bench).name == "train.jsonl"
    pool = (bench.pool / "a.jsonl").read_text() + (bench.pool / "b.jsonl").read_text()
    assert written(bench).read_text() == pool


def test_llava_rows_in_an_array_stay_llava_rows_in_an_array(tmp_path: Path, demo_vlm: Path) -> None:
    rows: list[dict[str, Any]] = []
    for index in range(4):
        (tmp_path / "pool").mkdir(exist_ok=True)
        (tmp_path / "pool" / f"{index}.png").write_bytes(png_bytes(index))
        rows.append(
            {
                "id": f"{index}",
                "image": f"{index}.png" if index % 2 else [f"{index}.png"],
                "conversations": [
                    {"from": "human", "value": f"<image>\n그림 {index}?"},
                    {"from": "gpt", "value": "예"},
                ],
                "source": "coco",
            }
        )
    (tmp_path / "pool" / "llava.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2))
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.refresh()
    assert written(bench).name == "train.json"
    chosen, _ = bench.artifacts.read_frame("selected_subset")
    expected = [rows[row] for row in sorted(chosen["row"])]
    assert json.loads(written(bench).read_text()) == expected


def test_image_paths_of_shards_in_folders_become_relative_to_the_pool(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "deep/er/a.jsonl", 3, seed=0)
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.options["budget"] = 1.0
    bench.refresh()
    base = Path(bench.artifacts.read_json("training_dataset", "manifest")["images_relative_to"])
    for line in written(bench).read_text().splitlines():
        (image,) = json.loads(line)["images"]
        assert Image.open(base / image).size == (48, 40)


def test_text_only_rows_are_added_when_they_are_kept(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 4, seed=0)
    text_row = sharegpt_row(None, "Tell me a story.", "Once.", id="text")
    rows = (tmp_path / "pool" / "a.jsonl").read_text().splitlines()
    write_lines(tmp_path / "pool" / "a.jsonl", [rows[0], text_row, *rows[1:]])
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.options["budget"] = 2
    bench.refresh()
    assert len(written(bench).read_text().splitlines()) == 2
    bench.options["text_only"] = "keep"
    bench.refresh()
    lines = [json.loads(line) for line in written(bench).read_text().splitlines()]
    assert len(lines) == 3
    assert text_row in lines
    manifest = bench.artifacts.read_json("training_dataset", "manifest")
    assert (manifest["selected"], manifest["text_only_kept"], manifest["written"]) == (2, 1, 3)


def test_a_pool_that_changes_its_kind_leaves_no_old_file(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 3, seed=0)
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.refresh()
    rows = [json.loads(line) for line in (bench.pool / "a.jsonl").read_text().splitlines()]
    (bench.pool / "a.jsonl").write_text(json.dumps(rows))
    bench.refresh()
    assert sorted(path.name for path in written(bench).parent.iterdir()) == ["manifest.json", "train.json"]


def test_a_shard_without_rows_does_not_change_the_kind(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 3, seed=0)
    (tmp_path / "pool" / "b.json").write_text("[]")
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.refresh()
    assert written(bench).name == "train.jsonl"


def test_rows_that_move_within_their_shard_are_still_the_chosen_ones(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 6, seed=0)
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.options["budget"] = 2
    bench.refresh()
    before = written(bench).read_text()
    rows = (bench.pool / "a.jsonl").read_text().splitlines()
    write_lines(bench.pool / "a.jsonl", [sharegpt_row(None, "Text alone."), *rows])
    bench.refresh()
    assert written(bench).read_text() == before
    chosen = set(bench.artifacts.read_frame("selected_subset")[0]["source_id"])
    assert {str(json.loads(line)["id"]) for line in written(bench).read_text().splitlines()} == chosen
    assert summary(bench.artifacts)["rows"] == 7


def test_a_changed_shard_that_cannot_be_embedded_leaves_its_last_good_rows(
    tmp_path: Path, demo_vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 6, seed=0)
    write_pool_shard(tmp_path / "pool", "b.jsonl", 2, seed=50)
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.refresh()
    before = written(bench).read_text()
    rows = (bench.pool / "a.jsonl").read_text().splitlines()
    write_lines(bench.pool / "a.jsonl", [rows[-1].replace("picture", "drawing"), *rows[:-1]])

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(VlmEncoder, "encode_as_done", out_of_memory)
        assert list(bench.refresh().failed) == ["a.jsonl"]
    bench.options["budget"] = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(VlmEncoder, "encode_as_done", out_of_memory)
        bench.refresh()
    assert len(written(bench).read_text().splitlines()) == 8
    write_lines(bench.pool / "a.jsonl", [rows[-1], *rows[:-1]])
    bench.options["budget"] = 0.5
    bench.refresh()
    assert sorted(written(bench).read_text().splitlines()) == sorted(before.splitlines())


def test_the_manifest_follows_the_settings(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 6, seed=0)
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.refresh()
    for option, value in (("budget", 3), ("energy", 0.9000001)):  # the same rows are chosen
        bench.options[option] = value
        bench.refresh()
    manifest = bench.artifacts.read_json("training_dataset", "manifest")
    assert (manifest["budget"], manifest["rank_rule"]) == (3, {"rule": "energy", "threshold": 0.9000001})
    assert manifest["basis_version"] == bench.artifacts.read_arrays("subspace_basis")[1]["data_version"]


def test_the_manifest_names_the_shards_that_are_left_out(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 3, seed=0)
    (tmp_path / "pool" / "picture.json").write_bytes(png_bytes(1))
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.refresh()
    assert bench.artifacts.read_json("training_dataset", "manifest")["shards_left_out"] == ["picture.json"]
    (tmp_path / "pool" / "picture.json").unlink()
    bench.refresh()
    assert bench.artifacts.read_json("training_dataset", "manifest")["shards_left_out"] == []


def test_the_manifest_tells_what_the_files_are(
    make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path
) -> None:
    bench = Bench(make_pool({"a.jsonl": 4, "b.jsonl": 3}), tmp_path / "store", demo_vlm)
    bench.refresh()
    manifest = bench.artifacts.read_json("training_dataset", "manifest")
    folder = written(bench).parent
    for name, file in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == file["sha256"]
    assert manifest["model"]["model"] == str(demo_vlm)
    assert len(manifest["model"]["fingerprint"]) == 16
    assert set(manifest["shards"]) == {"a.jsonl", "b.jsonl"}
    basis = bench.artifacts.read_arrays("subspace_basis")[1]
    assert manifest["basis_version"] == basis["data_version"]
    tables = bench.storage.embeddings(str(bench.store)).table_names()
    for shard, versions in manifest["shards"].items():
        assert versions["lance_table"] in tables
        assert versions["raw_samples"] == bench.artifacts.read_header("raw_samples", shard)["data_version"]
    assert manifest["rows"] == manifest["embedded"] + sum(manifest["rejected"].values()) == 7


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the sample data is not beside this checkout")
def test_real_rows_without_ids_with_several_images_and_chinese_text(tmp_path: Path, demo_vlm: Path) -> None:
    bench = Bench(SHARED_DATA / "mllm_demo", tmp_path / "store", demo_vlm)
    bench.options["budget"] = 1.0
    bench.refresh()
    assert summary(bench.artifacts)["rows"] == summary(bench.artifacts)["embedded"] == 6
    source = json.loads((SHARED_DATA / "mllm_demo" / "mllm_demo.json").read_text())
    assert json.loads(written(bench).read_text()) == source


def exported(bench: Bench, format_name: str) -> tuple[dict[str, Any], Path]:
    """What the manifest tells of an export, and its folder."""
    manifest = bench.artifacts.read_json("training_dataset", "manifest")
    folder = bench.store / "training_dataset" / "exports" / format_name
    return manifest["exports"][format_name], folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


EVERY_FORMAT = [{"format": name} for name in FORMAT_NAMES]


def test_the_selected_rows_are_exported_in_every_format(tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "pool", "deep/a.jsonl", 4, seed=0)
    write_pool_shard(tmp_path / "pool", "b.jsonl", 3, seed=50)
    with (tmp_path / "pool" / "b.jsonl").open("a") as shard:
        shard.write(json.dumps(sharegpt_row(None, "Tell me a story.", "Once.", id="text")) + "\nnot JSON\n")
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.options |= {"budget": 5, "text_only": "keep", "exports": EVERY_FORMAT}
    assert not bench.refresh().failed_checks
    manifest = bench.artifacts.read_json("training_dataset", "manifest")
    subset, _ = bench.artifacts.read_frame("selected_subset")
    for format_name in FORMAT_NAMES:
        report, folder = exported(bench, format_name)
        assert report["preflight"]["passed"], report
        assert (report["order"], report["seed"]) == ("shuffled", 0)
        selected = {record["sample_key"]: record for record in lines(folder / "selected_ids.jsonl")}
        assert len(selected) == report["written"] == 6
        for chosen in subset.iter_rows(named=True):
            told = selected[chosen["sample_key"]]
            assert {name: told[name] for name in ("shard", "row", "rank", "leverage")} == {
                name: chosen[name] for name in ("shard", "row", "rank", "leverage")
            }
        assert [told["id"] for told in selected.values() if told["rank"] is None] == ["text"]
        (rejected,) = lines(folder / "rejected.jsonl")
        assert (rejected["by"], rejected["reason"], rejected["line"]) == ("pool", "malformed_row", 5)
        for name in report["files"]:
            file = manifest["files"][f"exports/{format_name}/{name}"]
            data = (folder / name).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (file["sha256"], file["bytes"])


def test_exports_leave_the_dataset_as_it_is_without_them(
    make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path
) -> None:
    pool = make_pool({"a.jsonl": 4, "b.jsonl": 3})
    plain = Bench(pool, tmp_path / "plain", demo_vlm)
    plain.refresh()
    assert "exports" not in plain.artifacts.read_json("training_dataset", "manifest")
    bench = Bench(pool, tmp_path / "store", demo_vlm)
    bench.options["exports"] = EVERY_FORMAT[:1]
    bench.refresh()
    assert written(bench).read_bytes() == written(plain).read_bytes()


@pytest.mark.parametrize(
    "change", [lambda data: data + b"\n", lambda data: data[:-1]], ids=["longer", "shorter"]
)
@pytest.mark.parametrize("name", ["train.jsonl", "exports/ms_swift/train.jsonl"])
def test_a_dataset_with_a_file_of_another_size_is_not_complete(
    name: str, change: Callable[[bytes], bytes], tmp_path: Path, demo_vlm: Path
) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 4, seed=0)
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.options["exports"] = [{"format": "ms_swift"}]
    bench.refresh()
    assert training_manifest.is_complete(bench.artifacts)
    file = bench.store / "training_dataset" / name
    whole = file.read_bytes()
    file.write_bytes(change(whole))
    assert not training_manifest.is_complete(bench.artifacts)
    bench.refresh()
    assert file.read_bytes() == whole


def test_declaring_exports_makes_the_dataset_again_and_nothing_else(
    make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path
) -> None:
    bench = Bench(make_pool({"a.jsonl": 4}), tmp_path / "store", demo_vlm)
    bench.refresh()
    for exports in (EVERY_FORMAT[:2], [{"format": "llava", "order": "score"}], []):
        bench.options["exports"] = exports
        assert ran(bench.refresh()) == ["training_dataset"]
        folder = bench.store / "training_dataset" / "exports"
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        assert found == [export["format"] for export in exports]
    assert not folder.exists()
    assert ran(bench.refresh()) == []


def test_a_damaged_export_is_made_again(
    make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path
) -> None:
    bench = Bench(make_pool({"a.jsonl": 4}), tmp_path / "store", demo_vlm)
    bench.options["exports"] = [{"format": "llama_factory"}]
    bench.refresh()
    _, folder = exported(bench, "llama_factory")
    before = (folder / "train.jsonl").read_bytes()
    for damage in ((folder / "train.jsonl").unlink, lambda: (folder / "dataset_info.json").write_text("{}")):
        damage()
        assert ran(bench.refresh()) == ["training_dataset"]
        assert (folder / "train.jsonl").read_bytes() == before


def test_a_failed_preflight_fails_the_check(
    make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path
) -> None:
    bench = Bench(make_pool({"a.jsonl": 1}), tmp_path / "store", demo_vlm)
    row = {**sharegpt_row(["images/0.png", "images/0.png"], "<image><image>?"), "id": "two"}
    write_lines(bench.pool / "a.jsonl", [row])
    bench.options |= {"budget": 1.0, "exports": [{"format": "llama_factory"}]}
    bench.refresh()
    before = bench.files()
    bench.options["exports"] = [{"format": "llama_factory", "order": "shuffled"}, {"format": "llava"}]
    for _ in range(2):
        with pytest.raises(RefreshError) as refused:
            bench.refresh()
        assert "training_dataset: check failed: exports_pass_their_preflight" in str(refused.value)
        assert "{'llava': {'several_images': 1}}" in str(refused.value)
        assert "no row is left to train on" in str(refused.value)
        assert bench.files() == before


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the sample data is not beside this checkout")
def test_real_rows_are_exported_in_every_format(tmp_path: Path, demo_vlm: Path) -> None:
    bench = Bench(SHARED_DATA / "mllm_demo", tmp_path / "store", demo_vlm)
    bench.options |= {"budget": 1.0, "exports": EVERY_FORMAT}
    assert not bench.refresh().failed_checks
    for format_name in FORMAT_NAMES:
        report, _ = exported(bench, format_name)
        several = {"several_images": 2} if format_name == "llava" else {}
        assert (report["chosen"], report["refused"]) == (6, several)
        assert report["preflight"]["rows"] == report["written"]
