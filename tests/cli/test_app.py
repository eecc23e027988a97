"""The command line as people use it: what it prints, what it exits with, what a second run does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from PIL import Image
from upath import UPath

from scalselect_assets.demo.demo_pool import DEMO_REJECTIONS
from scalselect_assets.resources.artifacts import ArtifactStore
from tests.cli.conftest import Command, summary_of
from tests.conftest import SHARED_DATA, png_bytes, sharegpt_row, write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


@pytest.fixture
def installed(processes: None, tmp_path: Path) -> Command:
    """Run the installed command in a folder of its own, as people do."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("scalselect")), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "60"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_demo_accounts_for_every_row_and_does_nothing_twice(
    installed: Command, scalselect: Command, tmp_path: Path
) -> None:
    first = summary_of(installed("demo", "--json"))
    assert first["rejected"] == {reason.value: n for reason, n in sorted(DEMO_REJECTIONS.items())}
    assert first["rows"] == first["embedded"] + sum(first["rejected"].values()) == 480
    assert first["selected"] == 74  # 0.16 · 463 = 74.08
    assert len(first["shards_embedded"]) == 8
    subset = pl.read_parquet(first["selected_subset"])
    assert {"sample_key", "source_id", "shard", "leverage", "rank"} <= set(subset.columns)
    assert subset["leverage"].is_sorted(descending=True)
    assert len(Path(first["training_dataset"]).read_text().splitlines()) == 74
    # Redundant scenes make up the pool; the rare tail is what spans the subspace.
    rows = [json.loads(line) for line in Path(first["training_dataset"]).read_text().splitlines()]
    assert sum(row["source"] == "rare" for row in rows) >= 8

    second = scalselect("demo")
    assert second.returncode == 0
    assert "Nothing to do" in second.stdout
    status = scalselect("status", "--store", ".scalselect/demo")
    assert "All 8 shards and what follows from them are up to date" in " ".join(status.stdout.split())
    state = summary_of(scalselect("status", "--store", ".scalselect/demo", "--json"))
    assert (state["shards"], state["pending"], state["embedded"]) == (8, [], 463)

    moved = (tmp_path / ".scalselect" / "demo").rename(tmp_path / "moved")
    assert summary_of(scalselect("status", "--store", "moved", "--json"))["manifest"].startswith(str(moved))
    (moved / "training_dataset" / "train.jsonl").unlink()
    assert summary_of(scalselect("status", "--store", "moved", "--json"))["pending"] == [
        "training_dataset",
        "selection_report",
    ]
    assert not (tmp_path / ".scalselect" / "demo").exists()


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the sample data is not beside this checkout")
def test_a_real_pool_end_to_end_and_then_with_one_more_shard(
    scalselect: Command, tmp_path: Path, demo_vlm: Path
) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "images").symlink_to(SHARED_DATA / "nlvr_sample" / "images")
    first_shard, second_shard = sorted((SHARED_DATA / "nlvr_sample").glob("*.jsonl"))[:2]
    copy_rows(first_shard, pool)
    # The link leads out of the pool, so the images' real folder is named as their root.
    options = ("--image-root", SHARED_DATA / "nlvr_sample", "--model", demo_vlm, "--budget", "16%")
    first = summary_of(scalselect("run", pool, *options, "--json"))
    assert (first["rows"], first["embedded"], first["selected"]) == (60, 60, 10)

    copy_rows(second_shard, pool)
    # What is left out stays as it was declared.
    second = summary_of(scalselect("run", pool, "--json"))
    assert second["shards_embedded"] == [second_shard.name]
    assert (second["rows"], second["selected"]) == (120, 19)


def copy_rows(shard: Path, pool: Path) -> None:
    """Put the first 60 rows of a shard into a pool."""
    rows = shard.read_text(encoding="utf-8").splitlines(keepends=True)
    (pool / shard.name).write_text("".join(rows[:60]), encoding="utf-8")


def test_a_failing_shard_is_named_and_the_exit_code_is_1(
    scalselect: Command, tmp_path: Path, demo_vlm: Path
) -> None:
    write_pool_shard(tmp_path / "pool", "good.jsonl", 3, seed=0)
    (tmp_path / "pool" / "picture.json").write_bytes(png_bytes(1))
    finished = scalselect("run", "pool", "--model", demo_vlm)
    assert finished.returncode == 1
    assert "rows in                 3" in finished.stdout
    assert "picture.json" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run",), 2, "SOURCE"),
        (("run", "nowhere"), 1, "nowhere"),
        (("run", "pool", "--model", "./no/model"), 1, "no folder './no/model'"),
        (("run", "pool", "--budget", "lots"), 2, "--budget"),
        (("run", "pool", "--energy", "1.5"), 2, "energy"),
        (("run", "pool", "--rank", "scree"), 2, "gavish_donoho"),
        (("run", "pool", "--rank", "0"), 2, "fixed rank of 0"),
        (("run", "pool", "--device", "tpu"), 2, "tpu"),
        (("verify", "--store", "nowhere"), 2, "is not a store"),
        (("run", "pool", "--name", "a-b"), 2, "name"),
        (("run", "empty", "--model", "MODEL"), 1, "no shard files"),
        (("run", "pool", "--model", "MODEL", "--budget", "1000"), 1, "1000"),
        (("run", "textual", "--model", "MODEL"), 1, "no sample of the pool is embedded"),
        (("status", "--store", "nowhere"), 2, "is not a store"),
        (("clean", "--store", "nowhere"), 2, "is not a store"),
        (("explain", "x", "--store", "nowhere"), 2, "is not a store"),
        (("clean", "--store", "pool", "--retention-days", "-1"), 2, "retention-days"),
        (("split", "pool/a.jsonl", "--rows", "0", "--out", "o"), 2, "rows"),
        (("split", "pool/images/0.png", "--rows", "2", "--out", "o"), 1, "0.png"),
    ],
)
def test_mistakes_are_answered_with_a_message_and_the_right_code(
    scalselect: Command,
    tmp_path: Path,
    demo_vlm: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 2, seed=0)
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "textual" / "a.jsonl", [sharegpt_row(None, "Hello?")])
    finished = scalselect(*(str(demo_vlm) if part == "MODEL" else part for part in arguments))
    assert finished.returncode == code, finished.stderr
    # The usage box is wrapped and framed.
    told = " ".join(finished.stderr.replace("│", " ").split())
    assert message in told
    assert "Traceback" not in finished.stderr


def test_a_store_belongs_to_one_pool(scalselect: Command, tmp_path: Path, demo_vlm: Path) -> None:
    for pool in ("one", "two"):
        write_pool_shard(tmp_path / pool, "a.jsonl", 2, seed=0)
    assert scalselect("run", "one", "--store", "s", "--model", demo_vlm).returncode == 0
    finished = scalselect("run", "two", "--store", "s")
    assert finished.returncode == 2
    assert "belongs to the pool" in " ".join(finished.stderr.replace("│", " ").split())


def test_a_basis_is_verified_rebuilt_and_told_apart_from_a_wrong_one(
    scalselect: Command, tmp_path: Path, demo_vlm: Path
) -> None:
    for name in "abc":
        write_pool_shard(tmp_path / "pool", f"{name}.jsonl", 3, seed=1000 * ord(name))
    options = ("--model", demo_vlm, "--rank", "2", "--standardise", "--store", "s")
    assert summary_of(scalselect("run", "pool", *options, "--json"))["rank"] == 2
    assert summary_of(scalselect("verify", "--store", "s", "--json"))["equal"] is True
    rebuilt = scalselect("run", "pool", "--store", "s", "--rebuild-basis")
    assert "1 Dagster runs" in rebuilt.stdout

    store = ArtifactStore(UPath(tmp_path / "s"))
    arrays, header = store.read_arrays("subspace_basis")
    tilted = {**arrays, "singular_values": arrays["singular_values"] * (1 + 1e-6)}
    store.write_arrays("subspace_basis", tilted, header)
    different = scalselect("verify", "--store", "s")
    assert different.returncode == 1
    assert "differs from its rebuild" in different.stdout
    assert "--store s --rebuild-basis" in different.stderr
    assert scalselect("run", "pool", "--store", "s", "--rebuild-basis").returncode == 0
    assert scalselect("verify", "--store", "s").returncode == 0


def test_a_sample_is_followed_back_and_the_store_cleaned(
    scalselect: Command, tmp_path: Path, demo_vlm: Path
) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 4, seed=0)
    first = summary_of(scalselect("run", "pool", "--model", demo_vlm, "--store", "s", "--json"))
    sample = pl.read_parquet(first["selected_subset"]).row(0, named=True)
    found = summary_of(scalselect("status", "--store", "s", "--sample", sample["sample_key"][:10], "--json"))
    assert found["sample"]["state"] == "selected"
    assert found["importance_scores"]["leverage"] == sample["leverage"]
    run_id = found["subspace_basis"]["made_by"]["run_id"]
    shown = scalselect("status", "--store", "s", "--sample", sample["source_id"])
    assert shown.returncode == 0
    assert f"\n  run                         /runs/{run_id}\n" in shown.stdout
    unknown = scalselect("status", "--store", "s", "--sample", "nobody")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "no sample 'nobody' among 4 rows of 1 shards" in unknown.stderr

    lance = tmp_path / "s" / "lance"
    before = sorted(lance.iterdir())
    assert scalselect("run", "pool", "--store", "s", "--attention-mass", "0.7").returncode == 0
    rehearsed = scalselect("clean", "--store", "s", "--retention-days", "0", "--dry-run")
    assert "would be removed        1 tables of other models, " in rehearsed.stdout
    assert len(list(lance.iterdir())) == 2
    kept = scalselect("clean", "--store", "s")
    assert "kept                    1 tables of other models, " in kept.stdout
    assert kept.stdout.endswith("\n0 bytes freed.\n")
    freed = sum(path.stat().st_size for path in before[0].rglob("*") if path.is_file())
    cleaned = summary_of(scalselect("clean", "--store", "s", "--retention-days", "0", "--json"))
    assert (cleaned["bytes_freed"], cleaned["removed"][0]["names"]) == (freed, [before[0].stem])
    assert "Nothing to do" in scalselect("run", "pool", "--store", "s").stdout

    shutil.rmtree(next(lance.iterdir()))
    gone = scalselect("status", "--store", "s", "--sample", sample["sample_key"])
    assert gone.returncode == 1
    assert "cannot be read" in gone.stderr
    assert "Traceback" not in gone.stderr


def test_a_sample_is_explained_without_the_model_and_drawn_with_it(
    scalselect: Command, tmp_path: Path, demo_vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 5, seed=0)
    (tmp_path / "pool" / "images" / "cut.png").write_bytes(png_bytes(1)[:50])
    row = sharegpt_row(["images/1.png", "images/2.png"], "<image><image>\nWhich?", id="[two]")
    write_lines(tmp_path / "pool" / "b.jsonl", [row, sharegpt_row("images/cut.png", id="cut")])
    first = summary_of(scalselect("run", "pool", "--model", demo_vlm, "--store", "s", "--json"))
    best = pl.read_parquet(first["selected_subset"]).row(0, named=True)

    with monkeypatch.context() as without:
        without.setattr("scalselect_assets.method.representation.loading.load_encoder", None)
        without.setattr("scalselect_assets.resources.vlm._LOADED", {})
        found = summary_of(
            scalselect("explain", best["sample_key"], "--store", "s", "--similar", 2, "--json")
        )
        assert (found["status"], found["selected_rank"], len(found["similar"])) == ("selected", 1, 2)
        assert (found["score"]["rank"], found["score"]["leverage"]) == (1, best["leverage"])
        shown = scalselect("explain", "[two]", "--store", "s")
        assert shown.returncode == 0, shown.stderr
        assert "source id               [two]\n" in shown.stdout
        assert "of the others rank below\n" in shown.stdout
        assert shown.stdout.count("cosine") == 1
        rejected = scalselect("explain", "cut", "--store", "s")
        assert "rejected as             undecodable_image\n" in rejected.stdout
        unknown = scalselect("explain", "nobody", "--store", "s")
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert "no sample 'nobody' among 7 rows of 2 shards" in unknown.stderr

    drawn = scalselect("explain", "[two]", "--store", "s", "--image", "out/map.png", "--max-side", 120)
    assert drawn.returncode == 0, drawn.stderr
    assert "looked at               images/1.png\n" in drawn.stdout
    assert "drawn in                out/map-2.png\n" in drawn.stdout
    for name in ("map.png", "map-2.png"):
        assert max(Image.open(tmp_path / "out" / name).size) <= 120
    seen = summary_of(scalselect("explain", "[two]", "--store", "s", "--attention", "--json"))
    shares = [image["share"] for image in seen["attention_map"]["images"]]
    assert sum(shares) == pytest.approx(1)
    assert seen["drawings"] == []


def test_split_makes_shards_that_run(scalselect: Command, tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "big", "all.jsonl", 5, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "big" / "all.jsonl").read_text().splitlines()]
    (tmp_path / "big" / "all.json").write_text(json.dumps(rows))
    finished = scalselect("split", "big/all.json", "--rows", 2, "--out", "shards")
    assert "5 rows in 3 shards" in " ".join(finished.stdout.split())
    assert "--image-root big" in " ".join(finished.stdout.split())
    result = summary_of(
        scalselect("run", "shards", "--image-root", "big", "--model", demo_vlm, "--budget", "1.0", "--json")
    )
    assert (result["embedded"], len(result["shards_embedded"])) == (5, 3)
    assert json.loads(Path(result["training_dataset"]).read_text()) == rows


def test_options_that_failed_are_not_remembered(scalselect: Command, tmp_path: Path, demo_vlm: Path) -> None:
    write_pool_shard(tmp_path / "2024", "a.jsonl", 4, seed=0)
    store = Path(".scalselect") / "2024"
    assert scalselect("run", "2024", "--model", "./nowhere").returncode == 1
    assert not (tmp_path / store / "selection.yaml").exists()
    assert scalselect("run", "2024", "--model", demo_vlm, "--budget", "1000").returncode == 1
    # The samples are embedded, and without its declaration no command could open their store.
    assert scalselect("status", "--store", store).returncode == 0
    assert scalselect("run", "2024", "--budget", "2").returncode == 0
    assert scalselect("run", "2024", "--budget", "1000").returncode == 1
    assert summary_of(scalselect("run", tmp_path / "x" / ".." / "2024", "--json"))["selected"] == 2


def test_a_split_into_the_files_own_folder_is_refused(scalselect: Command, tmp_path: Path) -> None:
    write_lines(tmp_path / "all.jsonl", [sharegpt_row("a.png")])
    assert scalselect("split", "all.jsonl", "--rows", 1, "--out", ".").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(("run", "nowhere"), 1, "nowhere"), (("status", "--store", "nowhere"), 2, "is not a store")],
)
def test_the_process_ends_with_the_code_and_the_message(
    installed: Command, arguments: tuple[str, ...], code: int, message: str
) -> None:
    finished = installed(*arguments)
    assert finished.returncode == code
    assert message in " ".join(finished.stderr.replace("│", " ").split())
    assert (finished.stdout, "Traceback" in finished.stderr) == ("", False)


def test_help_lists_the_commands(installed: Command) -> None:
    finished = installed("--help")
    assert finished.returncode == 0
    for command in ("run", "demo", "status", "explain", "verify", "clean", "split", "ui"):
        assert f" {command} " in finished.stdout
