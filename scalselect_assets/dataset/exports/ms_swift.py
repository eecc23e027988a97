"""ms-swift: its standard JSON Lines format with ``channel``, and ``dataset_info.json``.

Rules from its source (modelscope/ms-swift at 3602360, 2026-08): ``docs/.../Custom-dataset.md`` (``images``
are preferably absolute paths; ``channel`` with ``--enable_channel_loss true`` reports the loss by source);
``swift/dataset/preprocessor/core.py`` (``_check_messages``: known roles, no null content, else the row is
deleted; columns that are not standard are dropped); ``swift/template/base.py`` (``_swift_prepare_inputs``:
neighbours of one role are merged; ``_swift_encode``: user and assistant alternate after that, else it fails;
``_add_default_tags``: marks beyond the images stay in the text; ``_pre_tokenize`` and ``normalize_bbox``:
each ``<ref-object>`` takes the next of ``objects.ref`` and each ``<bbox>`` that of ``objects.bbox``, marks
that are left over stay in the text, ``bbox`` has to be there and ``image_id`` counts the row's images);
``swift/template/template_inputs.py`` (``tools``; ``loss`` and ``loss_scale`` of a message);
``swift/dataset/register.py`` (paths in ``dataset_info.json`` start from its folder).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedRow,
    Preflight,
    Refusal,
    RefusalReason,
    Setting,
    ascii_json,
    carries_weights,
    is_text_list,
    read_json_rows,
    require_images,
    require_marks,
    require_soon,
    unpaired,
    weighted_turns,
    write_companion,
    write_json_lines,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.folders import NewFolder

FILE, INFO = "train.jsonl", "dataset_info.json"
_PLACEHOLDERS = re.compile("<ref-object>|<bbox>")


class MsSwift:
    """One JSON Lines file with absolute image paths, and the file for ``--custom_dataset_info``."""

    name = "ms_swift"
    embeds_images = False
    carries = frozenset(Carried)
    image_row_first = True

    def refuses(self, row: ExportRow) -> Refusal | None:
        """Refuse rows that do not alternate after merging neighbours, and rows with boxes that do not fit."""
        roles = [role for role, _ in row.turns]
        if fault := _unpaired_merged(roles):
            return Refusal(RefusalReason.TURN_ORDER, f"{fault}; the trainer deletes such rows")
        if fault := _misplaced(row.trained.objects, [text for _, text in row.turns], len(row.images)):
            return Refusal(RefusalReason.OBJECTS_UNREAD, f"{fault}; the rest would be taught as placeholders")
        return _refuse_weights(row, roles)

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write the files; every row has ``images`` and ``channel``."""
        write_json_lines((_row(placed, setting) for placed in rows), folder, FILE)
        write_companion(folder, INFO, ascii_json([{"dataset_name": setting.name, "dataset_path": FILE}]))

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """Report every row that the preprocessor would delete or that the template would fail at or alter."""
        verdict = Preflight()
        (described,) = json.loads(folder.path(INFO).read_bytes())
        path = folder.path(described["dataset_path"])
        if not verdict.require(path.exists(), f"{INFO} names {path.name}, which is not there"):
            return verdict
        for row in read_json_rows(path, verdict):
            where = f"row {verdict.rows}"
            images: Any = row.get("images")
            if not verdict.require(is_text_list(images), f"{where}: `images` is no list of paths"):
                continue
            verdict.row(len(images))
            roles = [message["role"] for message in row["messages"]]
            texts = [message["content"] for message in row["messages"]]
            verdict.require(all(isinstance(text, str) for text in texts), f"{where}: a content is no text")
            fault = _unpaired_merged(roles)
            verdict.require(fault is None, f"{where}: {fault}")
            require_marks(texts, len(images), where, verdict)
            fault = _misplaced(row.get("objects"), texts, len(images))
            verdict.require(fault is None, f"{where}: {fault}")
            verdict.carried[Carried.OBJECTS] += bool(row.get("objects"))
            verdict.carried[Carried.TOOLS] += bool(row.get("tools"))
            verdict.carried[Carried.TURN_WEIGHTS] += carries_weights(row["messages"])
            verdict.require(
                isinstance(row.get("channel"), str) and row["channel"], f"{where}: `channel` is no text"
            )
            relative = [setting.relative(image) for image in images]
            verdict.require(
                [setting.absolute(image) for image in relative] == images, f"{where}: a path is not absolute"
            )
            require_images(relative, where, setting, verdict)
        features = {
            "an image": lambda row: bool(row["images"]),
            "objects": lambda row: "objects" in row,
            "tools": lambda row: "tools" in row,
            "turn weights": lambda row: carries_weights(row["messages"]),
        }
        require_soon(path, features, verdict)
        return verdict


def _unpaired_merged(roles: Sequence[str]) -> str | None:
    """The fault in the order of roles, ignoring a leading system turn and repeated roles; None if right."""
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    merged = [role for role, _ in groupby(spoken)]
    # The trainer puts an empty question before a leading answer.
    return unpaired(["user", *merged] if merged[:1] == ["assistant"] else merged, "user", "assistant")


def _misplaced(objects: Any, texts: Sequence[str], n_images: int) -> str | None:
    """The first mismatch between the placeholders in the texts and the boxes and names; None if none."""
    objects = objects or {}
    if not isinstance(objects, dict):
        return "`objects` is no object with `ref` and `bbox`"
    found = Counter(mark for text in texts for mark in _PLACEHOLDERS.findall(text))
    for mark, name in (("<ref-object>", "ref"), ("<bbox>", "bbox")):
        held = objects.get(name, [] if name == "ref" or not objects else None)
        if not isinstance(held, list):
            return f"`objects` has no list `{name}`"
        if found[mark] != len(held):
            return f"its text holds {found[mark]} {mark} for {len(held)} in `objects.{name}`"
    images = objects.get("image_id") or []
    if objects and not all(isinstance(image, int) and 0 <= image < n_images for image in [*images, 0]):
        return f"`objects` speaks of images {images or [0]}, and the row has {n_images}"
    return None


def _refuse_weights(row: ExportRow, roles: Sequence[str]) -> Refusal | None:
    """Refuse rows with loss weights in a form that the trainer does not read."""
    fields = row.trained
    if not fields.weighs_turns:
        return None
    unread = any(
        weight not in (0, 1) and scale is None
        for weight, scale in zip(fields.weights, fields.loss_scales, strict=True)
    )
    if unread:
        detail = "an answer has a share of the loss that is no `loss_scale`, and the trainer reads no other"
        return Refusal(RefusalReason.TURN_WEIGHT_UNREAD, detail)
    if len(list(groupby(roles))) < len(roles):
        detail = "it weighs its answers, and the trainer merges neighbours of one role"
        return Refusal(RefusalReason.TURN_WEIGHT_UNREAD, detail)
    return None


def _row(placed: PlacedRow, setting: Setting) -> dict[str, Any]:
    fields = placed.row.trained
    return {
        "id": placed.row.id,
        "sample_key": placed.row.sample_key,
        "messages": weighted_turns(placed.row),
        "images": [setting.absolute(reference) for reference in placed.references],
        "channel": placed.row.label(setting.spec.channel_field),
        **({"objects": fields.objects} if fields.objects else {}),
        **({"tools": fields.tools} if fields.tools else {}),
    }
