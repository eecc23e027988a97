"""What a trainer acts on is told from what only looks like it."""

import json
import math
from typing import Any

import pytest

from scalselect_assets.resources.trained_fields import trained_fields


def fields_of(turn: dict[str, Any] | None = None, **row: Any) -> Any:
    messages = [
        {"role": "user", "content": "What?", "weight": 0},
        {"role": "assistant", "content": "A.", **(turn or {})},
    ]
    return trained_fields(json.dumps({"messages": messages, **row}))


@pytest.mark.parametrize(
    ("turn", "weight"),
    [
        ({}, 1),
        ({"loss": True}, 1),
        ({"loss": False}, 0),
        ({"weight": 0}, 0),
        ({"weight": 1.0}, 1),
        ({"weight": 0.5}, 0.5),
        ({"train": False}, 0),
        ({"training": "false"}, 0),
        ({"mask": True}, 0),
        ({"mask": 0}, 1),
        ({"loss": None, "weight": ""}, 1),
        ({"loss": True, "mask": True}, 0),
        ({"loss_scale": 0.25}, 0.25),
    ],
)
def test_how_much_an_answer_is_learnt(turn: dict[str, Any], weight: float) -> None:
    fields = fields_of(turn, system="Be brief.")

    assert fields.weights == (1, 1, weight)
    assert fields.weighs_turns is (weight != 1)
    assert fields.has_fractions is (weight not in (0, 1))


def test_a_weight_that_cannot_be_read_is_no_weight_that_any_trainer_takes() -> None:
    fields = fields_of({"weight": "a lot"})

    assert math.isnan(fields.weights[1])
    assert fields.has_fractions


@pytest.mark.parametrize("tools", [None, "", "[]", " {} ", [], "null"])
def test_no_tools_are_no_tools(tools: object) -> None:
    assert fields_of(tools=tools).tools is None


def test_tools_are_json_text() -> None:
    assert fields_of(tools='[{"name": "f"}]').tools == '[{"name": "f"}]'
    assert json.loads(fields_of(tools=[{"name": "f", "n": 1}]).tools) == [{"name": "f", "n": 1}]


@pytest.mark.parametrize("objects", [None, {}, {"ref": [], "bbox": []}, "", [], "{}"])
def test_no_objects_are_no_objects(objects: object) -> None:
    assert fields_of(objects=objects).objects is None


def test_objects_keep_their_numbers() -> None:
    objects = {"ref": ["a"], "bbox": [[1, 2.5, 3, 4]]}

    assert fields_of(objects=objects).objects == objects
    assert fields_of(objects=json.dumps(objects)).objects == objects
