"""Axolotl: OpenAI messages whose contents are lists of parts, and the YAML that loads them.

Rules from its source (axolotl-ai-cloud/axolotl at 067b021, 2026-07): ``docs/multimodal.qmd`` (an image part
has a ``path``; the dataset is not prepared beforehand, not packed, and keeps its columns);
``src/axolotl/processing_strategies.py`` (of a column ``images`` or ``image`` only the first one is used, so
there is none here; nulls from merged schemas are removed). Paths are absolute, because Axolotl joins no
folder with them.
"""

from collections.abc import Iterable
from typing import Any

import yaml

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedRow,
    Preflight,
    Refusal,
    Setting,
    read_json_rows,
    require_filled,
    require_images,
    require_soon,
    write_json_lines,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.method.representation.conversation import IMAGE
from scalselect_assets.resources.folders import NewFolder

FILE, CONFIG = "train.jsonl", "axolotl.yaml"
_PART_KEYS = {"text": "text", "image": "path"}
_NEEDED = {"skip_prepare_dataset": True, "remove_unused_columns": False, "sample_packing": False}


class Axolotl:
    """One JSON Lines file, and the part of Axolotl's configuration that names it."""

    name = "axolotl"
    embeds_images = False
    carries = frozenset[Carried]()
    image_row_first = True

    def refuses(self, row: ExportRow) -> Refusal | None:  # noqa: ARG002 - every row can be written
        """Refuse no row: the model's chat template decides which roles may follow each other."""
        return None

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write the files; each image is a part at its place in the text."""
        write_json_lines((_row(placed, setting) for placed in rows), folder, FILE)
        config = {
            "datasets": [
                {
                    "path": folder.place(FILE),
                    "ds_type": "json",
                    "type": "chat_template",
                    "field_messages": "messages",
                }
            ],
            "processor_type": "AutoProcessor",
            **_NEEDED,
        }
        folder.write(CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """Check the parts and their fields, that all images exist, and that no column hides the images."""
        verdict = Preflight()
        config = yaml.safe_load(folder.path(CONFIG).read_bytes())
        verdict.require(config["datasets"][0]["path"] == folder.place(FILE), f"{CONFIG} does not name {FILE}")
        verdict.require(_NEEDED.items() <= config.items(), f"{CONFIG} lacks one of {sorted(_NEEDED)}")
        path = folder.path(FILE)
        for row in read_json_rows(path, verdict):
            where = f"row {verdict.rows}"
            hiding = [key for key in row if "image" in key]
            verdict.require(not hiding, f"{where}: of the column {hiding} the trainer uses one image only")
            parts = [part for message in row["messages"] for part in message["content"]]
            verdict.require(
                any(message["role"] == "assistant" for message in row["messages"]), f"{where}: no answer"
            )
            known = all(isinstance(part.get(_PART_KEYS.get(part.get("type"), "?")), str) for part in parts)
            if not verdict.require(known, f"{where}: a part that is neither a text nor an image with a path"):
                continue
            require_filled((part["text"] for part in parts if part["type"] == "text"), where, verdict)
            images = [part["path"] for part in parts if part["type"] == "image"]
            verdict.row(len(images))
            relative = [setting.relative(image) for image in images]
            verdict.require(
                [setting.absolute(image) for image in relative] == images, f"{where}: a path is not absolute"
            )
            require_images(relative, where, setting, verdict)
        require_soon(path, {"an image": _has_image}, verdict)
        return verdict


def _has_image(row: dict[str, Any]) -> bool:
    return any(part["type"] == "image" for message in row["messages"] for part in message["content"])


def _row(placed: PlacedRow, setting: Setting) -> dict[str, Any]:
    references = iter(placed.references)
    return {
        "id": placed.row.id,
        "sample_key": placed.row.sample_key,
        "messages": [
            {
                "role": turn.role,
                "content": [
                    {"type": "image", "path": setting.absolute(next(references))}
                    if part is IMAGE
                    else {"type": "text", "text": part}
                    for part in turn.parts
                ],
            }
            for turn in placed.row.conversation.turns
        ],
    }
