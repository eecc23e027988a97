"""LLaMA-Factory: ``dataset_info.json`` and a ShareGPT file with OpenAI roles.

Rules from its source (hiyouga/LLaMA-Factory at ff6d4d1, 2026-08): ``data/README.md``; ``data/converter.py``
(``SharegptDatasetConverter``: a leading system message is taken off, then user and assistant alternate and
their number is even, anything else is skipped with a warning and trained on as nothing; ``tools`` is JSON);
``data/parser.py`` (``DatasetAttr.join``: where ``columns`` or ``tags`` are given, what they leave out is
unset, so all are given); ``data/mm_plugin.py`` (``_validate_messages``: image, video and audio marks are
counted in the messages, not in the system text, and must equal the files).
"""

import json
from collections.abc import Iterable
from typing import Any

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedRow,
    Preflight,
    Refusal,
    Setting,
    ascii_json,
    is_text_list,
    openai_turns,
    read_json_rows,
    refuse_images_of,
    refuse_turn_order,
    require_filled,
    require_images,
    require_marks,
    require_soon,
    unpaired,
    write_companion,
    write_json_lines,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.folders import NewFolder

FILE, INFO, ARGUMENTS = "train.jsonl", "dataset_info.json", "train_arguments.yaml"
_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


class LlamaFactory:
    """One JSON Lines file, ``dataset_info.json``, and the arguments that name both."""

    name = "llama_factory"
    embeds_images = False
    carries = frozenset({Carried.TOOLS})
    image_row_first = True

    def refuses(self, row: ExportRow) -> Refusal | None:
        """Refuse rows that the converter skips and rows with image marks that it miscounts."""
        return refuse_turn_order(row.dialogue) or refuse_images_of(row, "system")

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write the files; every row has ``images`` and ``tools``, which are empty if the row has none."""
        write_json_lines((_row(placed) for placed in rows), folder, FILE)
        info = {
            setting.name: {
                "file_name": FILE,
                "formatting": "sharegpt",
                "columns": {"messages": "messages", "images": "images", "tools": "tools"},
                "tags": _TAGS,
            }
        }
        write_companion(folder, INFO, ascii_json(info))
        arguments = {
            "dataset": setting.name,
            "dataset_dir": str(folder.target),
            "media_dir": setting.images_base,
        }
        write_companion(folder, ARGUMENTS, ascii_json(arguments))  # YAML takes JSON

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """Report every row that `DatasetAttr`, the converter or the plugin would fail at or alter."""
        verdict = Preflight()
        info = json.loads(folder.path(INFO).read_bytes())
        if not verdict.require(list(info) == [setting.name], f"{INFO} does not describe {setting.name}"):
            return verdict
        described = info[setting.name]
        path = folder.path(described["file_name"])
        if not verdict.require(path.exists(), f"{INFO} names {path.name}, which is not there"):
            return verdict
        tags, columns = described["tags"], described["columns"]
        for row in read_json_rows(path, verdict):
            self._check(row, tags, columns, setting, verdict)
        require_soon(path, {"an image": lambda row: bool(row[columns["images"]])}, verdict)
        return verdict

    @staticmethod
    def _check(
        row: dict[str, Any],
        tags: dict[str, str],
        columns: dict[str, str],
        setting: Setting,
        verdict: Preflight,
    ) -> None:
        where = f"row {verdict.rows}"
        messages: Any = row.get(columns["messages"])
        images: Any = row.get(columns["images"])
        if not verdict.require(is_text_list(images), f"{where}: `images` is no list of paths"):
            return
        verdict.row(len(images))
        tools = row.get(columns["tools"])
        verdict.require(isinstance(tools, str), f"{where}: `tools` is no text")
        verdict.carried[Carried.TOOLS] += bool(tools)
        roles = [message[tags["role_tag"]] for message in messages]
        texts = [message[tags["content_tag"]] for message in messages]
        if not verdict.require(
            all(isinstance(text, str) for text in texts), f"{where}: a content is no text"
        ):
            return
        if roles[:1] == [tags["system_tag"]]:
            roles, texts = roles[1:], texts[1:]
        fault = unpaired(roles, tags["user_tag"], tags["assistant_tag"])
        verdict.require(fault is None, f"{where}: {fault}")
        require_marks(texts, len(images), where, verdict)
        require_filled(texts, where, verdict)
        require_images(images, where, setting, verdict)


def _row(placed: PlacedRow) -> dict[str, Any]:
    return {
        "id": placed.row.id,
        "sample_key": placed.row.sample_key,
        "messages": openai_turns(placed.row),
        "images": placed.references,
        "tools": placed.row.trained.tools or "",
    }
