"""LLaVA-NeXT (OneVision): a JSON array like that of LLaVA, with several images, and the YAML that names it.

Rules from its source (LLaVA-VL/LLaVA-NeXT at df17966, 2026-04, ``llava/train/train.py``): a data path that
ends with ``.yaml`` holds ``datasets`` with ``json_path`` and ``sampling_strategy`` (``first:N`` takes the
first), one with braces is taken for several files; ``image`` is a path or a list, joined with
``--image_folder``; the preprocessings know human and gpt only, and that of Vicuna asserts that they
alternate; a row of length 0 in words is an error; a row that fails is silently replaced by its neighbour.
"""

from collections.abc import Iterable

import yaml

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedRow,
    Preflight,
    Refusal,
    Setting,
    is_text_list,
    llava_row,
    read_json_rows,
    refuse_system,
    refuse_turn_order,
    refuse_wordless,
    require_ascii,
    require_images,
    write_json_array,
)
from scalselect_assets.dataset.exports.llava import check_llava_turns
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.folders import NewFolder

FILE, DATA = "train.json", "data.yaml"


class LlavaNext:
    """One JSON file, and the YAML for ``--data_path``."""

    name = "llava_next"
    embeds_images = False
    carries = frozenset[Carried]()
    image_row_first = False

    def refuses(self, row: ExportRow) -> Refusal | None:
        """Refuse rows with system text, with roles out of turn, or without a word."""
        return refuse_system(row) or refuse_turn_order(row.turns) or refuse_wordless(row)

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:  # noqa: ARG002
        """Write the files; ``image`` is one path, a list of several paths, or absent."""
        write_json_array((llava_row(placed) for placed in rows), folder, FILE)
        data = {"datasets": [{"json_path": folder.place(FILE), "sampling_strategy": "all"}]}
        folder.write(DATA, yaml.safe_dump(data, sort_keys=False).encode("ascii"))

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """Report every row that the dataset or a preprocessing would fail at or alter."""
        verdict = Preflight()
        data = yaml.safe_load(folder.path(DATA).read_bytes())
        verdict.require(
            data == {"datasets": [{"json_path": folder.place(FILE), "sampling_strategy": "all"}]},
            f"{DATA} does not name all of {FILE}",
        )
        braces = set("{}") <= set(folder.place(DATA))
        verdict.require(
            not braces, f"{folder.place(DATA)} has braces: the trainer takes it for several files"
        )
        require_ascii(folder.path(FILE), verdict)
        for row in read_json_rows(folder.path(FILE), verdict):
            where, images = f"row {verdict.rows}", row.get("image", [])
            images = [images] if isinstance(images, str) else images
            if not verdict.require(is_text_list(images), f"{where}: `image` is no path or list of paths"):
                continue
            verdict.require("image" not in row or images, f"{where}: `image` is empty")
            verdict.row(len(images))
            check_llava_turns(row, len(images), where, verdict)
            require_images(images, where, setting, verdict)
        return verdict
