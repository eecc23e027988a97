"""What an evaluation set holds is neither trained on nor a reason to remove anything else."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.conftest import png_bytes, sharegpt_row, write_lines

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")

HELD = "Which of the two instruments on the left table was restored by the museum in the year after fire {}?"


def pool_with_evaluation_texts(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_lines(folder / "pool" / "a.jsonl", rows)
    for index in range(6):
        (folder / "pool" / f"{index}.png").write_bytes(png_bytes(index))
    (folder / "texts.txt").write_text("".join(f"{HELD.format(index)}\n" for index in range(6)))


def trained_ids(bench: Bench) -> set[str]:
    return {json.loads(line)["id"] for line in (bench.store / "training_dataset" / "train.jsonl").open()}


def text_row(name: str, text: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "The lute."}]
    return {"id": name, "messages": turns}


def test_a_row_without_an_image_that_the_evaluation_set_holds_is_not_trained_on(
    tmp_path: Path, demo_vlm: Path
) -> None:
    rows = [
        sharegpt_row(f"{index}.png", f"<image>\nIs it {index}?", id=f"image {index}") for index in range(6)
    ]
    texts = [text_row("held", HELD.format(3)), text_row("own", "Say something about lutes.")]
    pool_with_evaluation_texts(tmp_path, [*rows, *texts])
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.options |= {"budget": 1.0, "text_only": "keep"}
    bench.refresh()
    assert {"held", "own"} < trained_ids(bench)

    bench.options["decontamination"] = {"texts": str(tmp_path / "texts.txt")}
    bench.refresh()
    assert "own" in trained_ids(bench)
    assert "held" not in trained_ids(bench)


def test_a_sample_that_the_evaluation_set_holds_removes_no_duplicate_of_itself(
    tmp_path: Path, demo_vlm: Path
) -> None:
    """Each picture has a question of the evaluation set and one of its own, and vectors that are near."""
    rows = [
        sharegpt_row(f"{index}.png", f"<image>\n{text}", id=f"{kind} {index}")
        for index in range(6)
        for kind, text in (("held", HELD.format(index)), ("own", f"What is in picture {index}?"))
    ]
    pool_with_evaluation_texts(tmp_path, rows)
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)
    bench.options |= {
        "budget": 6,
        "near_duplicates": {"cosine": 0.7, "text_likeness": 0},
        "decontamination": {"texts": str(tmp_path / "texts.txt")},
    }
    bench.refresh()
    assert trained_ids(bench) == {f"own {index}" for index in range(6)}
    removed, _ = bench.artifacts.read_frame("removed_samples")
    assert set(removed["row"]) == {row for row in range(12) if rows[row]["id"].startswith("held")}
