"""ms-swift: its standard JSON Lines format with ``channel``, and ``dataset_info.json``.

Rules from its source (modelscope/ms-swift at 3602360, 2026-08): ``docs/.../Custom-dataset.md`` (``images``
are preferably absolute paths; ``channel`` with ``--enable_channel_loss true`` reports the loss by source);
``swift/dataset/preprocessor/core.py`` (``_check_messages``: known roles, no null content, else the row is
deleted; columns that are not standard are dropped); ``swift/template/base.py`` (``_swift_prepare_inputs``:
neighbours of one role are merged; ``_swift_encode``: user and assistant alternate after that, else it fails;
``_add_default_tags``: marks beyond the images stay in the text); ``swift/dataset/register.py`` (paths in
``dataset_info.json`` start from its folder).
"""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from scalselect_assets.dataset.exports.base import (
    PlacedRow,
    Preflight,
    Refusal,
    RefusalReason,
    Setting,
    ascii_json,
    is_text_list,
    openai_turns,
    read_json_rows,
    require_image_soon,
    require_images,
    require_marks,
    unpaired,
    write_companion,
    write_json_lines,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.folders import NewFolder

FILE, INFO = "train.jsonl", "dataset_info.json"


class MsSwift:
    """One JSON Lines file with absolute image paths, and the file for ``--custom_dataset_info``."""

    name = "ms_swift"
    embeds_images = False
    image_row_first = True

    def refuses(self, row: ExportRow) -> Refusal | None:
        """Rows that do not alternate once neighbours of one role are merged."""
        if fault := _unpaired_merged([role for role, _ in row.turns]):
            return Refusal(RefusalReason.TURN_ORDER, f"{fault}; the trainer deletes such rows")
        return None

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """``images`` and ``channel`` are there in every row."""
        write_json_lines((_row(placed, setting) for placed in rows), folder, FILE)
        write_companion(folder, INFO, ascii_json([{"dataset_name": setting.name, "dataset_path": FILE}]))

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """What the preprocessor would delete, and the template would stop at or show otherwise."""
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
            verdict.require(
                isinstance(row.get("channel"), str) and row["channel"], f"{where}: `channel` is no text"
            )
            relative = [setting.relative(image) for image in images]
            verdict.require(
                [setting.absolute(image) for image in relative] == images, f"{where}: a path is not absolute"
            )
            require_images(relative, where, setting, verdict)
        require_image_soon(path, lambda line: bool(json.loads(line)["images"]), verdict)
        return verdict


def _unpaired_merged(roles: Sequence[str]) -> str | None:
    """What is wrong with the order of roles, a leading system and repeated neighbours aside."""
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    merged = [role for role, _ in groupby(spoken)]
    # An answer that comes first is given an empty question by the trainer.
    return unpaired(["user", *merged] if merged[:1] == ["assistant"] else merged, "user", "assistant")


def _row(placed: PlacedRow, setting: Setting) -> dict[str, Any]:
    return {
        "id": placed.row.id,
        "sample_key": placed.row.sample_key,
        "messages": openai_turns(placed.row),
        "images": [setting.absolute(reference) for reference in placed.references],
        "channel": placed.row.label(setting.spec.channel_field),
    }
