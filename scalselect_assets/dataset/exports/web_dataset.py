"""WebDataset: tar shards in which files of one base name are one sample.

Rules from its source (webdataset 1.0, ``tariterators.base_plus_ext`` and ``group_by_keys``): the key of a
sample is the path up to the first dot of the file's name, the rest is the field; the files of a sample stand
together; a field twice in one sample is an error. So each image has a field of its own (``0.jpg``,
``1.png``), which the usual decoders identify by the part behind the last dot, and a row without an image is a
sample with a ``json`` field only. The index is of the form that ``wids`` reads. The loader of Hugging Face
``datasets`` wants the same fields in every sample and takes such shards only if all rows have equally many
images.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, cast

from PIL import Image, UnidentifiedImageError
from upath import UPath

from scalselect_assets.dataset.exports.base import (
    Carried,
    PlacedImage,
    PlacedRow,
    Preflight,
    Refusal,
    Setting,
    ascii_json,
    carries_weights,
    require_marks,
    safe_suffix,
    weighted_turns,
    write_companion,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.resources.folders import HashedStream, NewFolder

INDEX = "shards.json"
# `webdataset.autodecode` decodes these suffixes; a user needs an own decoder for other formats.
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "PPM": "ppm", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_MEMBER = re.compile(r"([^./]+)\.(.+)")


@dataclass(frozen=True)
class WebDataset:
    """Tar shards ``train-000000.tar``, ..., and an index with their numbers of samples.

    Attributes:
        shard_bytes: Size in bytes above which a shard is closed.
    """

    shard_bytes: int = 256 << 20

    name = "webdataset"
    embeds_images = True
    carries = frozenset(Carried)
    image_row_first = False

    def refuses(self, row: ExportRow) -> Refusal | None:  # noqa: ARG002 - every row can be written
        """Refuse no row: a sample may have any number of fields."""
        return None

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write one sample per row, in shards of ``shard_bytes``, with one row's images in memory."""
        iterator = iter(rows)
        first = next(iterator, None)
        place = 0
        shards: list[dict[str, Any]] = []
        while first is not None or not shards:
            name = f"train-{len(shards):06d}.tar"
            with folder.stream(name) as file:
                first = self._write_shard(file, first, iterator, place)
                n_rows = file.rows or 0
            place += n_rows
            shards.append({"url": name, "nsamples": n_rows, "filesize": folder.files[name].bytes})
        index = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": setting.name,
            "shardlist": shards,
        }
        write_companion(folder, INDEX, ascii_json(index))

    def _write_shard(
        self, file: HashedStream, first: PlacedRow | None, rows: Iterator[PlacedRow], place: int
    ) -> PlacedRow | None:
        """Write one shard that begins with ``first``; returns the row that the next one begins with."""
        file.rows = 0
        with tarfile.open(fileobj=cast("BinaryIO", file), mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            while first is not None and (tar.offset < self.shard_bytes or not file.rows):
                for field, data in _fields(first):
                    # The entry has no time, owner or machine, so that equal rows give equal files.
                    member = tarfile.TarInfo(f"{place + file.rows:09d}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                file.rows += 1
                first = next(rows, None)
        return first

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:  # noqa: ARG002 - of the protocol
        """Check the names, the grouping, the fields and the counts, and open every image."""
        verdict = Preflight()
        shards = json.loads(folder.path(INDEX).read_bytes())["shardlist"]
        tars = sorted(name for name in folder.files if name.endswith(".tar"))
        verdict.require(tars == [shard["url"] for shard in shards], f"{INDEX} names other shards")
        for shard in shards:
            before = verdict.rows
            for key, fields in _samples(folder.path(shard["url"]), verdict):
                verdict.require(key == f"{verdict.rows:09d}", f"sample {key} where {verdict.rows} is next")
                _check(key, fields, verdict)
            n = verdict.rows - before
            verdict.require(
                n == shard["nsamples"], f"{shard['url']} has {n} samples, not {shard['nsamples']}"
            )
            size = folder.path(shard["url"]).stat().st_size
            verdict.require(size == shard["filesize"], f"{shard['url']} has {size} bytes")
        return verdict


def _fields(placed: PlacedRow) -> list[tuple[str, bytes]]:
    """The files of one sample: its JSON, which names the images' fields in order, then the images."""
    images = [(f"{n}.{_suffix(image)}", image.data or b"") for n, image in enumerate(placed.images)]
    fields = placed.row.trained
    described = {
        **placed.row.identity(),
        "messages": weighted_turns(placed.row),
        "images": [field for field, _ in images],
        **({"objects": fields.objects} if fields.objects else {}),
        **({"tools": fields.tools} if fields.tools else {}),
    }
    return [("json", json.dumps(described, ensure_ascii=False).encode()), *images]


def _suffix(image: PlacedImage) -> str:
    """The suffix for the image format of the bytes, since a file name may state another format."""
    try:
        with Image.open(io.BytesIO(image.data or b"")) as opened:
            named = opened.format or ""
    except UnidentifiedImageError:
        named = ""
    return _SUFFIXES.get(named) or named.lower() or safe_suffix(image.reference)[1:] or "img"


def _samples(path: UPath, verdict: Preflight) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The key and the fields of each sample; one sample is in memory at a time."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
        members = ((_MEMBER.fullmatch(member.name), member) for member in tar)
        for key, group in groupby(members, key=lambda named: named[0][1] if named[0] else None):
            fields: dict[str, bytes] = {}
            for match, member in group:
                if not verdict.require(match, f"{path.name}: {member.name!r} is no key with a field"):
                    continue
                field = match[2] if match else ""
                verdict.require(field.lower() not in fields, f"{path.name}: {member.name!r} is there twice")
                content = tar.extractfile(member)
                fields[field.lower()] = content.read() if content else b""
            if key is not None:
                yield key, fields


def _check(key: str, fields: dict[str, bytes], verdict: Preflight) -> None:
    if not verdict.require("json" in fields, f"sample {key} has no json"):
        return
    described: dict[str, Any] = json.loads(fields["json"])
    images = described["images"]
    verdict.row(len(images))
    verdict.carried[Carried.OBJECTS] += bool(described.get("objects"))
    verdict.carried[Carried.TOOLS] += bool(described.get("tools"))
    verdict.carried[Carried.TURN_WEIGHTS] += carries_weights(described["messages"])
    verdict.require(
        set(images) | {"json"} == set(fields), f"sample {key} has the fields {sorted(fields)} for {images}"
    )
    require_marks((turn["content"] for turn in described["messages"]), len(images), f"sample {key}", verdict)
    for name in images:
        try:
            Image.open(io.BytesIO(fields.get(name, b""))).close()
        except (UnidentifiedImageError, OSError, ValueError) as error:
            verdict.problem(f"sample {key}: image {name} cannot be opened: {error}")
