"""TRL and Hugging Face ``datasets``: Parquet with the images in it, and a dataset card.

Rules from the source (trl 1.16 ``data_utils.prepare_multimodal_messages`` and
``DataCollatorForVisionLanguageModeling``: contents are lists of parts, roles are system, user, assistant or
tool, each ``{"type": "image"}`` part takes the next of ``images``, and their numbers must be equal; a row
without an image has ``images: []``, and the key is in every row, since ``SFTTrainer`` looks at the first one
only; ``datasets`` 5: a column of type Image is a struct of bytes and path, and the Parquet schema's
``huggingface`` metadata says so; without a card that names the data files, ``load_dataset`` would read the
other JSON Lines files as data, too).
"""

import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, UnidentifiedImageError

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedRow,
    Preflight,
    Refusal,
    Setting,
    require_filled,
    write_companion,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.method.representation.conversation import IMAGE
from scalselect_assets.resources.folders import HashedStream, NewFolder

CARD = "README.md"
_PATTERN = "data/train-*.parquet"
_ROLES = {"system", "user", "assistant", "tool"}
_STRING = {"dtype": "string", "_type": "Value"}
# Lists as JSON lists: the notation that all versions of `datasets` read.
_FEATURES = {
    "id": _STRING,
    "sample_key": _STRING,
    "messages": [{"role": _STRING, "content": [{"type": _STRING, "text": _STRING}]}],
    "images": [{"_type": "Image"}],
}
_FEATURES_KEY = b"huggingface"
_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sample_key", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ],
    metadata={_FEATURES_KEY: json.dumps({"info": {"features": _FEATURES}})},
)


@dataclass(frozen=True)
class TrlParquet:
    """Parquet files in ``data``, and ``README.md`` with the configuration that loads them.

    Attributes:
        file_bytes: Size in bytes above which a file is closed.
        group_bytes: Size of the images in one row group, and so in memory.
        group_rows: Maximum number of rows in one row group.
    """

    file_bytes: int = 512 << 20
    group_bytes: int = 32 << 20
    group_rows: int = 500

    name = "trl"
    embeds_images = True
    carries = frozenset[Carried]()
    image_row_first = False

    def refuses(self, row: ExportRow) -> Refusal | None:  # noqa: ARG002 - every row can be written
        """Refuse no row: the format holds all roles, and any number of images in any place."""
        return None

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write files of ``file_bytes`` from row groups of ``group_bytes``, with one row group in memory."""
        iterator = iter(rows)
        first = next(iterator, None)
        number, n_rows = 0, 0
        while first is not None or not number:
            with folder.stream(f"data/train-{number:05d}.parquet") as file:
                first = self._write_file(file, first, iterator)
                n_rows += file.rows or 0
            number += 1
        card = {
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": _PATTERN}]}],
            "task_categories": ["image-text-to-text"],
            "size_categories": [_size_category(n_rows)],
        }
        write_companion(
            folder, CARD, f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n\n# {setting.name}\n"
        )

    def _write_file(
        self, file: HashedStream, first: PlacedRow | None, rows: Iterable[PlacedRow]
    ) -> PlacedRow | None:
        """Write one file that begins with ``first``; returns the row that the next one begins with."""
        file.rows = 0
        group: list[dict[str, Any]] = []
        n_bytes = 0
        iterator = iter(rows)
        with pq.ParquetWriter(pa.PythonFile(file, mode="w"), SCHEMA, compression="zstd") as writer:
            while first is not None and (file.tell() < self.file_bytes or not file.rows):
                group.append(_record(first))
                file.rows += 1
                n_bytes += sum(len(image.data or b"") for image in first.images)
                first = next(iterator, None)
                if first is None or n_bytes >= self.group_bytes or len(group) >= self.group_rows:
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                    group, n_bytes = [], 0
            if group:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
        return first

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:  # noqa: ARG002 - of the protocol
        """Check types, roles and parts, an image for each image part, and that Pillow opens each image."""
        verdict = Preflight()
        card = folder.path(CARD).read_text(encoding="ascii").split("---\n")
        configs = yaml.safe_load(card[1])["configs"]
        verdict.require(configs[0]["data_files"][0]["path"] == _PATTERN, f"{CARD} does not name the files")
        for name in sorted(name for name in folder.files if name.startswith("data/")):
            with folder.path(name).open("rb") as file:
                parquet = pq.ParquetFile(file)
                schema = parquet.schema_arrow
                features = (schema.metadata or {}).get(_FEATURES_KEY)
                verdict.require(schema.equals(SCHEMA), f"{name} has other columns or types")
                verdict.require(features == SCHEMA.metadata[_FEATURES_KEY], f"{name}: images untold")
                for batch in parquet.iter_batches(batch_size=32):
                    for row in batch.to_pylist():
                        _check(row, verdict)
        return verdict


def _record(placed: PlacedRow) -> dict[str, Any]:
    return {
        "id": placed.row.id,
        "sample_key": placed.row.sample_key,
        "messages": [
            {
                "role": turn.role,
                "content": [
                    {"type": "image", "text": None} if part is IMAGE else {"type": "text", "text": part}
                    for part in turn.parts
                ],
            }
            for turn in placed.row.conversation.turns
        ],
        "images": [{"bytes": image.data, "path": image.reference} for image in placed.images],
    }


def _check(row: dict[str, Any], verdict: Preflight) -> None:
    where, images = f"row {verdict.rows}", row["images"]
    if not verdict.require(isinstance(images, list), f"{where}: `images` is null; it is to be an empty list"):
        return
    verdict.row(len(images))
    roles = {message["role"] for message in row["messages"]}
    verdict.require(roles <= _ROLES, f"{where}: roles {sorted(roles - _ROLES)}")
    verdict.require("assistant" in roles, f"{where}: no answer")
    parts = [part for message in row["messages"] for part in message["content"]]
    kinds = [part["type"] for part in parts]
    verdict.require(set(kinds) <= {"image", "text"}, f"{where}: parts of types {sorted(set(kinds))}")
    verdict.require(
        kinds.count("image") == len(images), f"{where}: {kinds.count('image')} parts for {len(images)} images"
    )
    verdict.require(
        all(part["text"] is not None for part in parts if part["type"] == "text"), f"{where}: a text is null"
    )
    require_filled((part["text"] or "" for part in parts), where, verdict)
    for image in images:
        try:
            Image.open(io.BytesIO(cast("bytes", image["bytes"]))).close()
        except (UnidentifiedImageError, OSError, TypeError, ValueError) as error:
            verdict.problem(f"{where}: image {image['path']!r} cannot be opened: {error}")


def _size_category(n: int) -> str:
    """The Hub's name for a number of rows."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
    return names[min(max(int(math.log10(max(n, 1))) - 2, 0), len(names) - 1)]
