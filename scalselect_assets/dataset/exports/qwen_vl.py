"""Qwen-VL's own fine-tuning code (Qwen2-VL to Qwen3-VL): JSON Lines of LLaVA turns, and a registry entry.

Rules from its source (QwenLM/Qwen3-VL at 23d3cce, ``qwen-vl-finetune/qwenvl/data``): ``data_processor.py``
(``_build_messages``: every role but human becomes assistant, so a system turn would be taught as an answer;
marks are filled in human turns only, and images that are left over are an error; ``__getitem__``: a row that
fails is silently replaced by its neighbour; files are opened in the locale's encoding; ``image`` is a path or
a list, joined with ``data_path``); ``__init__.py`` (datasets are entries of a dict in the code, a name that
ends with ``%`` and digits is sampled).
"""

import ast
from collections.abc import Iterable

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedRow,
    Preflight,
    Refusal,
    Setting,
    is_text_list,
    llava_row,
    read_json_rows,
    refuse_images_of,
    refuse_reserved,
    refuse_system,
    refuse_turn_order,
    require_ascii,
    require_filled,
    require_images,
    require_marks,
    unpaired,
    write_companion,
    write_json_lines,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.folders import NewFolder

FILE, ENTRY = "train.jsonl", "data_dict_entry.py"
_RESERVED = ("<video>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>")


class QwenVl:
    """One JSON Lines file, and the entry to add to ``data_dict`` in ``qwenvl/data/__init__.py``."""

    name = "qwen_vl"
    embeds_images = False
    carries = frozenset[Carried]()
    image_row_first = False

    def refuses(self, row: ExportRow) -> Refusal | None:
        """Refuse rows that the trainer would teach with another meaning or silently replace."""
        return (
            refuse_system(row)
            or refuse_turn_order(row.turns)
            or refuse_images_of(row, "assistant")
            or refuse_reserved((text for _, text in row.turns), _RESERVED)
        )

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write the files; ``image`` is one path, a list of several paths, or absent."""
        write_json_lines((llava_row(placed) for placed in rows), folder, FILE, escaped=True)
        entry = {setting.name: {"annotation_path": folder.place(FILE), "data_path": setting.images_base}}
        write_companion(folder, ENTRY, f"data_dict.update({entry!a})\n")

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """Report every row that `_build_messages` would alter or fail at."""
        verdict = Preflight()
        entry = folder.path(ENTRY).read_text(encoding="ascii")
        written = ast.literal_eval(entry.removeprefix("data_dict.update(").removesuffix(")\n"))
        verdict.require(
            written
            == {setting.name: {"annotation_path": folder.place(FILE), "data_path": setting.images_base}},
            f"{ENTRY} does not name {FILE} and the images",
        )
        require_ascii(folder.path(FILE), verdict)
        for row in read_json_rows(folder.path(FILE), verdict):
            where, images = f"row {verdict.rows}", row.get("image", [])
            images = [images] if isinstance(images, str) else images
            if not verdict.require(is_text_list(images), f"{where}: `image` is no path or list of paths"):
                continue
            verdict.row(len(images))
            turns = row["conversations"]
            require_filled((turn["value"] for turn in turns), where, verdict)
            fault = unpaired([turn["from"] for turn in turns], "human", "gpt")
            verdict.require(fault is None, f"{where}: {fault}")
            require_marks(
                (turn["value"] for turn in turns if turn["from"] == "human"), len(images), where, verdict
            )
            verdict.require(
                not any(mark in turn["value"] for mark in _RESERVED for turn in turns),
                f"{where}: a mark of the trainer's own in its text",
            )
            require_images(images, where, setting, verdict)
        return verdict
