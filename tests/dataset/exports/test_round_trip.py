"""An export that holds whole samples is a pool again, and all of its rows say what they said."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from upath import UPath

from scalselect_assets.resources.judged_rows import PoolRow
from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.trained_fields import trained_fields
from tests.dataset.exports.conftest import HOSTILE, MakeBench, said

GROUNDED = said(
    "<image>Find <ref-object>.", "At <bbox>.", images=["plain.png"],
    objects={"ref": ["the dog"], "bbox": [[1, 2, 3, 4]]},
)  # fmt: skip
WITH_TOOLS = said("<image>Call?", "Done.", images=["plain.png"], tools='[{"name": "f"}]')
UNTAUGHT = {
    "messages": [
        {"role": "user", "content": "<image>First?"},
        {"role": "assistant", "content": "Wrong.", "loss": False},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "Right."},
    ],
    "images": ["plain.png"],
}
WHOLE = [
    "llama_factory",
    "llava",
    "llava_next",
    "qwen_vl",
    "ms_swift",
    "axolotl",
    "trl",
    "internvl",
    "webdataset",
]


def read_back(folder: UPath) -> tuple[SampleSource, list[PoolRow]]:
    source = SampleSource(folder)
    return source, [row for key in source.shard_keys() for row in source.read_shard(key)]


def told(source: SampleSource, rows: list[PoolRow]) -> list[tuple[Any, ...]]:
    """What each row says: id, conversation and the bytes of its images."""
    return [
        (
            row.source_id,
            row.sample.conversation.to_json(),
            [source.open_image(path) for path in row.image_paths],
        )
        for row in rows
        if row.sample
    ]


@pytest.mark.parametrize("name", WHOLE)
def test_an_export_is_a_pool_again_with_the_same_rows(bench: MakeBench, name: str) -> None:
    rows = [row for row in HOSTILE if row["images"]]
    made = bench(rows)
    report, folder = made.write(name, images="copied")
    written = made.lines(folder / "selected_ids.jsonl")
    (made.folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = SampleSource(UPath(made.folder), UPath(made.folder))
    before = told(source, list(source.read_shard("pool.jsonl")))

    again, back = read_back(folder)

    assert [row.rejection for row in back] == [None] * report.written
    expected = [before[record["row"]] for record in written]
    found = told(again, back)
    assert [row[1:] for row in found] == [row[1:] for row in expected]
    assert {row.source_id for row in back} >= {row[0] for row in expected if row[0] is not None}


@pytest.mark.parametrize("row", [GROUNDED, WITH_TOOLS, UNTAUGHT], ids=["objects", "tools", "loss"])
@pytest.mark.parametrize("name", WHOLE)
def test_what_a_trainer_acts_on_is_passed_on_or_the_row_is_refused(
    bench: MakeBench, name: str, row: Mapping[str, Any]
) -> None:
    plain = said("<image>What?", "Noise.", images=["other.png"], id="plain")
    made = bench([plain, dict(row)])
    report, folder = made.write(name, images="copied")

    _, back = read_back(folder)

    assert report.preflight.passed, report.preflight.problems
    carried = [found for found in back if found.source_id != "plain"]
    if not carried:
        assert sum(report.refused.values()) == 1
        assert set(report.refused) <= {"objects_unread", "tools_unread", "turn_weight_unread"}
    else:
        before, after = trained_fields(json.dumps(row)), trained_fields(carried[0].text)
        assert (after.objects, after.tools, after.weights) == (before.objects, before.tools, before.weights)


def test_the_formats_that_pass_on_each_field_are_those_whose_trainers_read_it(bench: MakeBench) -> None:
    plain = said("<image>What?", "Noise.", images=["other.png"], id="plain")
    made = bench([plain, GROUNDED, WITH_TOOLS, UNTAUGHT])

    written = {name: made.write(name)[0].written for name in WHOLE}

    assert written == {
        **dict.fromkeys(WHOLE, 1), "llama_factory": 2, "ms_swift": 4, "webdataset": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    "objects",
    [
        {"ref": ["a"], "bbox": []},
        {"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]]},
        {"ref": ["a"], "bbox": [[1, 2, 3, 4]], "image_id": [1]},
        {"ref": ["a"]},
        None,
    ],
)
def test_boxes_that_do_not_fit_the_placeholders_are_refused(bench: MakeBench, objects: Any) -> None:
    row = said("<image>Find <ref-object>.", "At <bbox>.", images=["plain.png"], objects=objects)
    made = bench([said("<image>What?", "Noise.", images=["other.png"]), row])

    report, _ = made.write("ms_swift")

    assert report.refused == {"objects_unread": 1}


def test_a_row_with_each_column_leads_where_the_reader_takes_types_from_the_first(bench: MakeBench) -> None:
    plain = [said(f"<image>{n}?", "Noise.", images=["other.png"], id=n) for n in range(3)]
    made = bench([*plain, GROUNDED, said("<image>What tools?", "None.", images=["plain.png"]), WITH_TOOLS])

    report, folder = made.write("ms_swift")

    assert [record["row"] for record in made.lines(folder / "selected_ids.jsonl")] == [0, 3, 5, 1, 2, 4]
    assert len(report.leading) == 3
    assert report.preflight.passed
