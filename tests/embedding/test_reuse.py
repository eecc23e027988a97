"""A sample is embedded once per model: a changed shard costs its changed rows, a killed run what was left."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalselect_assets.embedding import reuse
from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.resources.vlm import VlmResource
from tests.bench import Bench
from tests.conftest import RunPython, png_bytes, sharegpt_row, write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


@pytest.fixture
def bench(tmp_path: Path, demo_vlm: Path) -> Bench:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 6, seed=0)
    return Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples the model is given, call by call."""
    calls: list[int] = []
    original = VlmEncoder.encode_as_done

    def noted(self: VlmEncoder, samples: Any, *more: Any, **options: Any) -> Iterator[Any]:
        calls.append(len(samples))
        return original(self, samples, *more, **options)

    monkeypatch.setattr(VlmEncoder, "encode_as_done", noted)
    return calls


def rows(bench: Bench, shard: str = "a.jsonl") -> list[Any]:
    return [json.loads(line) for line in (bench.pool / shard).read_text().splitlines()]


def assert_as_if_embedded_afresh(bench: Bench, fresh: Bench) -> None:
    """Vectors do not depend on the way on which they came."""
    fresh.refresh()
    expected, got = fresh.vectors(), bench.vectors()
    assert got.keys() == expected.keys()
    for name, vector in expected.items():
        np.testing.assert_allclose(got[name], vector, atol=1e-5, rtol=0)


@pytest.fixture
def fresh(bench: Bench, tmp_path: Path) -> Bench:
    """The same pool with an empty store."""
    return Bench(bench.pool, tmp_path / "fresh store", Path(bench.options["target_model"]))


def test_a_changed_row_is_embedded_alone(bench: Bench, fresh: Bench, embedded: list[int]) -> None:
    bench.refresh()
    changed = rows(bench)
    changed[2]["messages"][0]["content"] = "<image>\nAnd now something else?"
    write_lines(bench.pool / "a.jsonl", changed)
    bench.refresh()
    assert embedded == [6, 1]
    assert bench.metadata("attention_embeddings")["reused_rows"] == 5
    assert_as_if_embedded_afresh(bench, fresh)


def test_rows_that_only_move_go_or_come_cost_what_comes(bench: Bench, embedded: list[int]) -> None:
    bench.refresh()
    (bench.pool / "images" / "77.png").write_bytes(png_bytes(77))
    new = sharegpt_row("images/77.png", "<image>\nNew?", "Yes", id=77)
    write_lines(bench.pool / "a.jsonl", [new, *reversed(rows(bench)[1:])])
    bench.refresh()
    assert embedded == [6, 1]
    assert len(bench.vectors()) == 6


def test_a_shard_without_any_vector_gets_its_first(bench: Bench, embedded: list[int]) -> None:
    write_lines(bench.pool / "b.jsonl", [sharegpt_row(None, "What is one plus one?", "Two.")])
    bench.refresh()
    write_lines(bench.pool / "b.jsonl", [sharegpt_row("images/0.png")])
    embedded.clear()
    assert bench.refresh().problems() == []
    assert embedded == [1]
    assert any(key.startswith("b.jsonl") for key in bench.vectors())


def test_an_image_that_is_replaced_under_its_name_is_embedded_again(
    bench: Bench, embedded: list[int]
) -> None:
    bench.refresh()
    (bench.pool / "images" / "3.png").write_bytes(png_bytes(999, (52, 40)))
    bench.refresh()
    assert embedded == [6, 1]
    assert len(bench.vectors()) == 6


def test_an_image_that_is_gone_for_good_is_rejected_and_nothing_else_is_embedded(
    bench: Bench, embedded: list[int]
) -> None:
    bench.refresh()
    (bench.pool / "images" / "3.png").unlink()
    bench.refresh(accept_missing_images=True)
    assert embedded == [6]
    assert len(bench.vectors()) == 5
    assert bench.artifacts.read_frame("rejected_rows", "a.jsonl")[0]["reason"].to_list() == ["missing_image"]


def test_what_changes_representations_embeds_everything_and_what_does_not_nothing(
    bench: Bench, embedded: list[int]
) -> None:
    bench.refresh()
    for option, value in {"budget": 1, "energy": 0.5, "rank": 2}.items():
        bench.options[option] = value
        bench.refresh()
    assert embedded == [6]
    bench.options["attention_mass"] = 0.8
    bench.refresh()
    assert embedded == [6, 6]


def test_going_back_to_an_earlier_model_embeds_nothing(
    bench: Bench, fresh: Bench, embedded: list[int]
) -> None:
    bench.refresh()
    for attention_mass in (0.8, 0.9):
        bench.options["attention_mass"] = attention_mass
        bench.refresh()
    assert embedded == [6, 6]
    assert_as_if_embedded_afresh(bench, fresh)


def test_another_pixel_limit_embeds_everything(bench: Bench, embedded: list[int]) -> None:
    """A vector may stand for an image that the new limit refuses."""
    bench.refresh()
    bench.vlm = VlmResource(device="cpu", batch_tokens=512, max_image_pixels=2000)
    bench.refresh()
    assert embedded == [6, 6]


def refresh_that_fails_after(bench: Bench, n_outcomes: int) -> None:
    """Each shard's embedding fails on its way; finished rows are set aside one by one."""
    original = VlmEncoder.encode_as_done

    def failing(self: VlmEncoder, *arguments: Any, **options: Any) -> Iterator[Any]:
        for number, done in enumerate(original(self, *arguments, **options)):
            if number == n_outcomes:
                raise RuntimeError("the device is gone")
            yield done

    bench.vlm = VlmResource(device="cpu", batch_tokens=512, set_aside_seconds=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VlmEncoder, "encode_as_done", failing)
        with pytest.raises(RefreshError, match="the device is gone"):
            bench.refresh()


def test_work_that_fails_on_its_way_goes_on_where_it_was_set_aside(bench: Bench, embedded: list[int]) -> None:
    refresh_that_fails_after(bench, 4)
    assert len(bench.artifacts.paths(reuse.SET_ASIDE, suffix=".parquet")) == 4
    bench.refresh()
    assert embedded == [6, 2]
    assert bench.artifacts.paths(reuse.SET_ASIDE, suffix=".parquet") == []
    assert len(bench.vectors()) == 6


def test_a_part_that_is_damaged_costs_its_own_rows(bench: Bench, embedded: list[int]) -> None:
    refresh_that_fails_after(bench, 4)
    parts = bench.artifacts.paths(reuse.SET_ASIDE, suffix=".parquet")
    Path(parts[1].path).write_bytes(b"PAR1")
    bench.refresh()
    assert embedded == [6, 3]
    assert len(bench.vectors()) == 6
    assert bench.artifacts.paths(reuse.SET_ASIDE, suffix=".parquet") == []


def test_what_was_set_aside_under_another_model_is_not_taken(bench: Bench, embedded: list[int]) -> None:
    refresh_that_fails_after(bench, 4)
    bench.options["attention_mass"] = 0.8
    bench.refresh()
    assert embedded == [6, 6]


def test_a_removed_shard_leaves_nothing_set_aside(bench: Bench, tmp_path: Path) -> None:
    write_pool_shard(bench.pool, "b.jsonl", 3, seed=50)
    refresh_that_fails_after(bench, 2)
    assert len(bench.artifacts.paths(reuse.SET_ASIDE, suffix=".parquet")) == 4
    (bench.pool / "b.jsonl").unlink()
    bench.refresh()
    assert bench.artifacts.paths(reuse.SET_ASIDE, suffix=".parquet") == []


KILLED = """
import os, signal, sys
from pathlib import Path
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.method.representation.encoder import VlmEncoder
from tests.bench import Bench

original = VlmEncoder.encode_as_done

def killed(self, *arguments, **options):
    for number, done in enumerate(original(self, *arguments, **options)):
        if number == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield done

VlmEncoder.encode_as_done = killed
bench = Bench(*map(Path, sys.argv[1:4]))
bench.vlm = VlmResource(device="cpu", batch_tokens=512, set_aside_seconds=0)
bench.refresh()
"""


def test_a_killed_run_loses_what_it_had_not_set_aside(
    bench: Bench,
    fresh: Bench,
    embedded: list[int],
    fresh_python: RunPython,
) -> None:
    model = bench.options["target_model"]
    killed = fresh_python("-c", KILLED, bench.pool, bench.store, model, 3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    bench.refresh()
    assert embedded == [3]
    assert len(bench.artifacts.read_frame("raw_samples", "a.jsonl")[0]) == len(bench.vectors()) == 6
    assert_as_if_embedded_afresh(bench, fresh)
