"""InternVL: JSON Lines of LLaVA turns, and the meta file with the number of rows.

Rules from its source (OpenGVLab/InternVL at 2410d1d, 2025-09, ``internvl_chat/internvl/train``):
``internvl_chat_finetune.py`` (the meta file's ``root``, ``annotation`` ending with ``jsonl``,
``repeat_time``, ``data_augment`` and ``length``; where ``image`` is one path and the first turn has no mark,
one is put there, so such rows have a list of one; ``length`` of a row is its number of tokens, for grouping
by length; a row that fails is silently replaced by a random one); ``dataset.py`` (``preprocess_internvl2_5``,
the template of InternVL 2.5 and later: a leading system turn, human and gpt in any order, marks in human
turns only, as many as images; the image tokens are counted in the finished text).
"""

import json
from collections.abc import Iterable
from typing import Any

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedRow,
    Preflight,
    Refusal,
    RefusalReason,
    Setting,
    ascii_json,
    is_text_list,
    llava_turns,
    read_json_rows,
    refuse_images_of,
    refuse_reserved,
    require_ascii,
    require_filled,
    require_images,
    require_marks,
    write_companion,
    write_json_lines,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.folders import NewFolder
from scalselect_assets.resources.row_images import IMAGE_MARK

FILE, META = "train.jsonl", "meta.json"
_RESERVED = ("<img>", "</img>", "<IMG_CONTEXT>")


class InternVl:
    """One JSON Lines file, and the file for ``--meta_path``."""

    name = "internvl"
    embeds_images = False
    carries = frozenset[Carried]()
    image_row_first = False

    def refuses(self, row: ExportRow) -> Refusal | None:
        """Refuse rows that the template does not support or that the dataset would silently replace."""
        if any(role == "system" for role, _ in row.dialogue):
            detail = "a system turn stands behind others, which the template does not know"
            return Refusal(RefusalReason.SYSTEM_TURN, detail)
        return refuse_images_of(row, "assistant", "system") or refuse_reserved(
            (text for _, text in row.turns), _RESERVED
        )

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write the rows and the meta file; ``length`` is the token count of the model input, where known."""
        write_json_lines((_row(placed) for placed in rows), folder, FILE, escaped=True)
        meta = {
            setting.name: {
                "root": setting.images_base,
                "annotation": folder.place(FILE),
                "data_augment": False,
                "repeat_time": 1,
                "length": folder.files[FILE].rows or 0,
            }
        }
        write_companion(folder, META, ascii_json(meta))

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """Report every row that the dataset or the template would fail at or alter, and wrong counts."""
        verdict = Preflight()
        described = json.loads(folder.path(META).read_bytes()).get(setting.name, {})
        verdict.require(
            described.get("annotation") == folder.place(FILE)
            and described.get("root") == setting.images_base,
            f"{META} does not name {FILE} and the images",
        )
        verdict.require(described.get("repeat_time") == 1, f"{META}: below 1, only the first rows are read")
        require_ascii(folder.path(FILE), verdict)
        for row in read_json_rows(folder.path(FILE), verdict):
            _check(row, setting, verdict)
        verdict.require(described.get("length") == verdict.rows, f"{META}: length is not {verdict.rows}")
        return verdict


def _check(row: dict[str, Any], setting: Setting, verdict: Preflight) -> None:
    where, images, turns = f"row {verdict.rows}", row.get("image", []), row["conversations"]
    one = isinstance(images, str)
    images = [images] if one else images
    if not verdict.require(is_text_list(images), f"{where}: `image` is no path or list of paths"):
        return
    verdict.row(len(images))
    verdict.require(
        not one or IMAGE_MARK in turns[0]["value"], f"{where}: a mark would be put before its text"
    )
    require_filled((turn["value"] for turn in turns), where, verdict)
    roles = [turn["from"] for turn in turns]
    verdict.require(
        set(roles[1:] if roles[0] == "system" else roles) <= {"human", "gpt"},
        f"{where}: roles {sorted(roles)}",
    )
    require_marks((turn["value"] for turn in turns if turn["from"] == "human"), len(images), where, verdict)
    verdict.require(
        not any(mark in turn["value"] for mark in _RESERVED for turn in turns),
        f"{where}: an image token in text",
    )
    length = row.get("length", 1)
    verdict.require(isinstance(length, int) and length > 0, f"{where}: length {length!r}")
    require_images(images, where, setting, verdict)


def _row(placed: PlacedRow) -> dict[str, Any]:
    turns, references = llava_turns(placed.row), placed.references
    images: dict[str, Any] = {}
    if references:
        one = len(references) == 1 and IMAGE_MARK in turns[0]["value"]
        images = {"image": references[0] if one else references}
    length = {} if placed.row.n_tokens is None else {"length": placed.row.n_tokens}
    return {
        "id": placed.row.id,
        "sample_key": placed.row.sample_key,
        **images,
        **length,
        "conversations": turns,
    }
