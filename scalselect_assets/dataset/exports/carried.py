"""Fields that a trainer acts on: a format either passes such a field on or refuses the row."""

from collections.abc import Iterator, Set

from scalselect_assets.dataset.exports.base import (
    OTHER_MEDIA,
    Carried,
    Refusal,
    RefusalReason,
    refuse_reserved,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.trained_fields import GROUNDING_MARKS


def refuse_uncarried(row: ExportRow, carries: Set[Carried]) -> Refusal | None:
    """Refuse, for any format, rows with fields that its trainer ignores or with placeholders left bare."""
    fields = row.trained
    texts = [text for _, text in row.turns]
    bare = next((mark[0] for text in texts if (mark := GROUNDING_MARKS.search(text))), None)
    if (fields.objects or bare) and Carried.OBJECTS not in carries:
        has = "it has `objects`" if fields.objects else f"its text holds {bare!r}"
        detail = f"{has}, which the trainer does not read: it would teach the bare placeholder"
        return Refusal(RefusalReason.OBJECTS_UNREAD, detail)
    if fields.tools and Carried.TOOLS not in carries:
        detail = "it has `tools`, which the trainer does not read: the model would call what it cannot see"
        return Refusal(RefusalReason.TOOLS_UNREAD, detail)
    if fields.weighs_turns and Carried.TURN_WEIGHTS not in carries:
        detail = "it says how much each answer is to be learnt, and the trainer would learn all of them"
        return Refusal(RefusalReason.TURN_WEIGHT_UNREAD, detail)
    return refuse_reserved(texts, OTHER_MEDIA)


def carried_fields(row: ExportRow) -> Iterator[Carried]:
    """The fields of a row that the preflight must find in the written file."""
    if row.trained.objects:
        yield Carried.OBJECTS
    if row.trained.tools:
        yield Carried.TOOLS
    if row.trained.weighs_turns:
        yield Carried.TURN_WEIGHTS
