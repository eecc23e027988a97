"""LLaVA: a JSON array of rows with ``from`` and ``value``, at most one image each.

Rules from its source (haotian-liu/LLaVA at c121f04, 2024-05, ``llava/train/train.py``):
``LazySupervisedDataset`` loads the array whole with ``json.load`` of a file opened in the locale's encoding,
tests ``'image' in row`` (so the key is absent where there is no image) and joins its one string with
``--image_folder``; ``preprocess_v1`` knows the roles human and gpt only, drops a first turn that is not
human's, asserts that they alternate, splits at ``</s>`` and `` ASSISTANT: `` and then gives a row whose parts
do not add up no labels at all; the sampler by modality (``llava_trainer.py``) asserts that no row has length
0, counted in words.
"""

import shlex
from collections.abc import Iterable
from typing import Any

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedRow,
    Preflight,
    Refusal,
    RefusalReason,
    Setting,
    llava_row,
    read_json_rows,
    refuse_reserved,
    refuse_system,
    refuse_turn_order,
    refuse_wordless,
    require_ascii,
    require_filled,
    require_images,
    require_marks,
    unpaired,
    write_json_array,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.folders import NewFolder

FILE, ARGUMENTS = "train.json", "arguments.txt"
_SEPARATORS = ("</s>", " ASSISTANT: ")


class Llava:
    """One JSON file, and the arguments of ``llava/train/train.py`` that name it and the images."""

    name = "llava"
    embeds_images = False
    carries = frozenset[Carried]()
    image_row_first = False

    def refuses(self, row: ExportRow) -> Refusal | None:
        """Refuse rows with several images, system text or roles out of turn, and rows without labels."""
        if len(row.images) > 1:
            detail = f"it has {len(row.images)} images, and `image` is joined with a folder as one path"
            return Refusal(RefusalReason.SEVERAL_IMAGES, detail)
        return (
            refuse_system(row)
            or refuse_turn_order(row.turns)
            or refuse_reserved((text for _, text in row.turns), _SEPARATORS)
            or refuse_wordless(row)
        )

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write the rows and the arguments; a row without an image has no ``image`` key."""
        write_json_array((llava_row(placed) for placed in rows), folder, FILE)
        arguments = ["--data_path", folder.place(FILE), "--image_folder", setting.images_base]
        text = shlex.join(arguments)
        # A path that is not ASCII is still a path: the shell takes UTF-8.
        folder.write(ARGUMENTS, f"{text}\n".encode())

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """Report every row that the dataset, the preprocessing or the sampler would fail at or alter."""
        verdict = Preflight()
        arguments = shlex.split(folder.path(ARGUMENTS).read_text(encoding="utf-8"))
        verdict.require(
            dict(zip(arguments[::2], arguments[1::2], strict=True))
            == {"--data_path": folder.place(FILE), "--image_folder": setting.images_base},
            f"{ARGUMENTS} does not name {FILE} and the images",
        )
        require_ascii(folder.path(FILE), verdict)
        for row in read_json_rows(folder.path(FILE), verdict):
            where = f"row {verdict.rows}"
            if not verdict.require(is_path(row.get("image", "-")), f"{where}: `image` is no single path"):
                continue
            images = [row["image"]] if "image" in row else []
            verdict.row(len(images))
            check_llava_turns(row, len(images), where, verdict)
            texts = [turn["value"] for turn in row["conversations"]]
            verdict.require(
                not any(separator in text for separator in _SEPARATORS for text in texts),
                f"{where}: a separator of the template in its text",
            )
            require_images(images, where, setting, verdict)
        return verdict


def is_path(value: object) -> bool:
    """Whether a JSON value names one file."""
    return isinstance(value, str) and value != ""


def check_llava_turns(row: dict[str, Any], n_images: int, where: str, verdict: Preflight) -> None:
    """Require human and gpt in turn, an answer at the end, a mark for each image, and at least a word."""
    turns = row["conversations"]
    fault = unpaired([turn["from"] for turn in turns], "human", "gpt")
    verdict.require(fault is None, f"{where}: {fault}")
    texts = [turn["value"] for turn in turns]
    verdict.require(any(text.split() for text in texts), f"{where}: length 0")
    require_marks(texts, n_images, where, verdict)
    require_filled(texts, where, verdict)
