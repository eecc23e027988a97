"""The fields of a row that a trainer acts on: boxes, tools, and which turns are to be learnt.

A trainer that does not read such a field trains on the wrong content: on a bare placeholder, or on an
answer that must not be learnt. Code that writes rows for a trainer uses this module to find these fields.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalselect_assets.resources.row_layout import WrittenTurn, lay_out, plain
from scalselect_assets.resources.samples import decoded_row

GROUNDING_MARKS = re.compile(r"<bbox>|<ref-object>")
"""The places that ms-swift fills from `objects`."""

_TAUGHT_FIELDS = ("loss", "loss_scale", "loss_weight", "weight", "train", "training", "trainable")
_UNTAUGHT_FIELDS = ("mask", "masked", "loss_mask", "ignore")


@dataclass(frozen=True, slots=True)
class TrainedFields:
    """The fields of a row, beside its turns and images, that a trainer must read.

    Attributes:
        objects: Boxes and names that placeholders in the turns stand for; None where there are none.
        tools: The tools that the model may call, as JSON text; None where there are none.
        weights: Training weight of each turn; 1 unless the row says otherwise.
        loss_scales: The ``loss_scale`` of each turn as written; None for a turn without one.
    """

    objects: dict[str, Any] | None
    tools: str | None
    weights: tuple[float, ...]
    loss_scales: tuple[Any, ...]

    @property
    def weighs_turns(self) -> bool:
        """Whether some answer is to be learnt less than in full."""
        return any(weight != 1 for weight in self.weights) or any(
            scale is not None for scale in self.loss_scales
        )

    @property
    def has_fractions(self) -> bool:
        """Whether some answer is to be learnt neither in full nor not at all."""
        return any(weight not in (0, 1) for weight in self.weights)


def trained_fields(text: str) -> TrainedFields:
    """The fields of a row that ``parse_row`` takes, or refuses as ``text_only`` only.

    Raises:
        ValueError: ``parse_row`` would refuse the row for what it says.
    """
    row = decoded_row(text)
    turns = lay_out(row).turns
    return TrainedFields(
        _objects(plain(row.get("objects"))),
        _tools(plain(row.get("tools"))),
        tuple(_weight(turn) for turn in turns),
        tuple(plain((turn.fields or {}).get("loss_scale")) for turn in turns),
    )


def _objects(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):  # some tables keep it as JSON text
        try:
            value = json.loads(value)
        except ValueError:
            return {"text": value} if value.strip() else None
    if isinstance(value, dict):
        return value if any(item not in (None, [], "") for item in value.values()) else None
    return {"list": value} if value else None


def _tools(value: Any) -> str | None:
    if isinstance(value, str):
        return value if value.strip() not in ("", "[]", "{}", "null") else None
    return json.dumps(value, ensure_ascii=False) if value else None


def _weight(turn: WrittenTurn) -> float:
    """The training weight of a turn. It matters for answers only: other turns are never learnt."""
    if turn.role != "assistant" or turn.fields is None:
        return 1
    said = [
        *(_as_weight(plain(turn.fields[name])) for name in _TAUGHT_FIELDS if _says(turn.fields, name)),
        *(1 - _as_weight(plain(turn.fields[name])) for name in _UNTAUGHT_FIELDS if _says(turn.fields, name)),
    ]
    return 0 if 0 in said else next((weight for weight in said if weight != 1), 1)


def _says(fields: Mapping[str, object], name: str) -> bool:
    return fields.get(name) not in (None, "")


def _as_weight(value: object) -> float:
    """The weight in a field. An unreadable one becomes neither 0 nor 1, so that no trainer gets the row."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return float(value.strip().lower() in ("true", "1"))
    return float("nan")
