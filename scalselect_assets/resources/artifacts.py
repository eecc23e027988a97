"""Everything that the assets write apart from vectors: Parquet frames, safetensors arrays and JSON.

One file per asset and shard, always replaced whole and atomically, so that a reader sees the old or the new
content and a rerun changes nothing. Each file carries its own header (data version, provenance, what it was
computed from), so that the record always belongs to the content read, and a hash of its bytes
(`resources.seal`), so that damage is noticed whenever the file is read. A file without a hash, from an
earlier release, is read as it is. Costs: one file in memory at a time, and hashing it.
"""

import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import safetensors
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from upath import UPath

from scalselect_assets.resources import seal
from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.names import encode_name

Header = Mapping[str, str]
FRAME, ARRAYS, RECORD = ".parquet", ".safetensors", ".json"
"""Suffixes of the three kinds of files: Parquet frames, safetensors arrays and JSON."""

_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit


class ArtifactMissingError(FileNotFoundError):
    """An asset's output is not in the store; the message names the asset, the shard and the remedy."""


class ArtifactCorruptError(RuntimeError):
    """An asset's output is there but cannot be read; the message names the file and the remedy.

    Attributes:
        path: The file.
    """

    def __init__(self, message: str, path: UPath) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class ArtifactStore:
    """The files of one selection below ``root`` (local or remote)."""

    root: UPath

    def path(self, asset: str, shard: str | None = None, *, suffix: str) -> UPath:
        """The path of the output of ``asset`` (for ``shard``), whether or not it exists."""
        name = asset if shard is None else encode_name(shard)
        return self.root / f"{asset}/{name}{suffix}"

    def write_frame(
        self, asset: str, frame: pl.DataFrame, header: Header, shard: str | None = None
    ) -> tuple[UPath, int]:
        """Replace a Parquet file; returns its path and size in bytes."""
        buffer, sealed = io.BytesIO(), seal.to_be_sealed(header)
        frame.write_parquet(buffer, metadata=sealed)
        pieces = seal.seal(buffer.getvalue(), sealed)
        return self._replace(self.path(asset, shard, suffix=FRAME), *pieces)

    def read_frame(
        self, asset: str, shard: str | None = None, *, columns: list[str] | None = None
    ) -> tuple[pl.DataFrame, dict[str, str]]:
        """A Parquet file, or some of its columns, and its header.

        Raises:
            ArtifactMissingError: The asset is not materialized.
            ArtifactCorruptError: The file is truncated or damaged. The whole file is checked, even if
                only a few columns are read.
        """
        path = self.path(asset, shard, suffix=FRAME)
        data = self._read(asset, shard, path)
        with self._readable(asset, shard, path):
            header, own = _parquet_header(io.BytesIO(data))
            seal.check(data, header)
            return pl.read_parquet(io.BytesIO(data), columns=columns), own

    def read_header(self, asset: str, shard: str | None = None, *, suffix: str = FRAME) -> dict[str, str]:
        """The header of a Parquet or safetensors file without its content; raises as ``read_frame``."""
        path = self.path(asset, shard, suffix=suffix)
        with (
            self._present(asset, shard, path),
            self._readable(asset, shard, path),
            path.open("rb") as file,
        ):
            if suffix == FRAME:
                return _parquet_header(file)[1]
            return seal.checked_header(_safetensors_header(file))

    def write_arrays(
        self, asset: str, arrays: Mapping[str, NDArray[Any]], header: Header, shard: str | None = None
    ) -> tuple[UPath, int]:
        """Replace a safetensors file; returns its path and size in bytes."""
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        sealed = seal.to_be_sealed(header)
        pieces = seal.seal(_in_order(save_safetensors(contiguous, metadata=sealed)), sealed)
        return self._replace(self.path(asset, shard, suffix=ARRAYS), *pieces)

    def read_arrays(
        self, asset: str, shard: str | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """A safetensors file and its header; raises as ``read_frame``."""
        path = self.path(asset, shard, suffix=ARRAYS)
        data = self._read(asset, shard, path)
        with self._readable(asset, shard, path):
            header = _safetensors_header(io.BytesIO(data))
            seal.check(data, header)
            return load_safetensors(data), seal.checked_header(header)

    def write_json(
        self, asset: str, value: Any, shard: str | None = None, *, durable: bool = True
    ) -> tuple[UPath, int]:
        """Replace a JSON file; returns its path and size in bytes.

        An object gets its hash as one more member. A file that is only a cache need not be ``durable``: it is
        written without waiting for the disk. A power cut may damage it, and the next read notices that.
        """
        path = self.path(asset, shard, suffix=RECORD)
        if not isinstance(value, dict):
            return self._replace(path, _json(value), durable=durable)
        place = {seal.PAYLOAD: seal.to_be_sealed({})[seal.PAYLOAD]}
        return self._replace(path, *seal.seal(_json({**value, **place}), place), durable=durable)

    def read_json(self, asset: str, shard: str | None = None, *, shape: Any = Any) -> Any:
        """A JSON file of a given shape (a type that pydantic validates); raises as ``read_frame``."""
        path = self.path(asset, shard, suffix=RECORD)
        data = self._read(asset, shard, path)
        with self._readable(asset, shard, path):
            value = json.loads(data)
            if isinstance(value, dict):
                seal.check(data, value)
                value.pop(seal.PAYLOAD, None)
            try:
                return TypeAdapter(shape).validate_json(_json(value))
            except ValidationError as error:
                messages = (": ".join([*map(str, one["loc"]), one["msg"]]) for one in error.errors())
                raise ValueError("; ".join(messages)) from error

    def check_file(self, path: UPath) -> None:
        """Read a file of any kind that carries its own hash, and compare it.

        Raises:
            ArtifactMissingError: There is no such file.
            ArtifactCorruptError: The file is truncated or damaged.
        """
        what = path.path.removeprefix(f"{self.root.path}/")
        data = self._read(what, None, path)
        with self._readable(what, None, path):
            if path.suffix == FRAME:
                header, _ = _parquet_header(io.BytesIO(data))
            elif path.suffix == ARRAYS:
                header = _safetensors_header(io.BytesIO(data))
                seal.checked_header(header)
            else:
                header = json.loads(data)
            if isinstance(header, dict):
                seal.check(data, header)

    def write_bytes(self, path: UPath, data: bytes) -> None:
        """Replace a file that is only a cache, without waiting for the disk."""
        self._replace(path, data, durable=False)

    def write_text(self, path: UPath, pieces: Iterable[str]) -> int:
        """Replace a text file from a stream of pieces, in constant memory; returns its size in bytes."""
        with self._atomic(path) as target:
            for piece in pieces:
                target.write(piece.encode())
            return int(target.tell())

    def rename(self, asset: str, shard: str, to_asset: str, to_shard: str, *, suffix: str) -> None:
        """Rename an output, replacing any output of the new name; atomic on a local disk."""
        source, target = self.path(asset, shard, suffix=suffix), self.path(to_asset, to_shard, suffix=suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_local(source):
            Path(source.path).replace(target.path)
        else:
            source.fs.mv(source.path, target.path)

    def paths(self, asset: str, *, suffix: str) -> list[UPath]:
        """The files of all shards of ``asset``, in any order."""
        folder = self.root / asset
        return [path for path in folder.iterdir() if path.suffix == suffix] if folder.exists() else []

    def exists(self, asset: str, shard: str | None = None, *, suffix: str) -> bool:
        """Whether the output exists."""
        return bool(self.path(asset, shard, suffix=suffix).exists())

    def _read(self, asset: str, shard: str | None, path: UPath) -> bytes:
        with self._present(asset, shard, path):
            return bytes(path.read_bytes())

    @contextmanager
    def _present(self, asset: str, shard: str | None, path: UPath) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ArtifactMissingError(
                f"{_what(asset, shard)} is not in the store ({path}); materialize it first"
            ) from error

    @contextmanager
    def _readable(self, asset: str, shard: str | None, path: UPath) -> Iterator[None]:
        try:
            yield
        # Polars panics on some damaged files, and a panic is not an Exception.
        except (
            pl.exceptions.PolarsError,
            pl.exceptions.PanicException,
            safetensors.SafetensorError,
            ValueError,
            RecursionError,
        ) as error:
            raise ArtifactCorruptError(
                f"{_what(asset, shard)} cannot be read ({path}: {error}); materialize it again", path
            ) from error

    def _replace(self, path: UPath, *pieces: bytes | memoryview, durable: bool = True) -> tuple[UPath, int]:
        with self._atomic(path, durable=durable) as target:
            for piece in pieces:
                target.write(piece)
        return path, sum(map(len, pieces))

    @contextmanager
    def _atomic(self, path: UPath, *, durable: bool = True) -> Iterator[Any]:
        """Open ``path`` for writing such that it appears complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            # An object store shows an object once its upload is complete; a failed block uploads nothing.
            with tempfile.NamedTemporaryFile() as upload:
                yield upload
                upload.flush()
                path.fs.put_file(upload.name, path.path)
            return
        target_path = Path(path.path)
        # The file is opened by name, because only their owner could read the files that tempfile makes.
        writing = target_path.with_name(f".writing-{uuid.uuid4().hex}")
        try:
            # The block includes closing, which retries a failed write.
            with named(path), writing.open("xb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            writing.replace(target_path)
        except BaseException:
            writing.unlink(missing_ok=True)
            raise


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file on this machine in one step, so that it is the old or the new one.

    Raises:
        OSError: The new file cannot be written; the old one is still there.
    """
    ArtifactStore(UPath(path.parent)).write_text(UPath(path), [text])


@contextmanager
def named(path: UPath) -> Iterator[None]:
    """Add the path to errors of writing and closing; errors of opening name it already."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _parquet_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, str]]:
    """The header of an open Parquet file, once as written and once without the hashes.

    Raises:
        ValueError: The file is truncated or damaged.
    """
    header = pl.read_parquet_metadata(file)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    file.seek(max(0, size - 8 - int.from_bytes(file.read(4), "little")))
    return header, seal.checked_header(header, file.read())


def _safetensors_header(file: BinaryIO) -> dict[str, str]:
    """The header of an open safetensors file, after a check of the length that it states.

    Raises:
        ValueError: The file is truncated or damaged.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_SAFETENSORS_HEADER:
        raise ValueError(f"a header of {length} bytes")
    described = json.loads(file.read(length))
    try:
        header: dict[str, str] = dict(described.pop("__metadata__", {}))
        size = 8 + length + max((array["data_offsets"][1] for array in described.values()), default=0)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError("its header is damaged") from error
    if file.seek(0, os.SEEK_END) != size:
        raise ValueError(f"{file.tell()} bytes where the header says {size}")
    return header


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its header in a fixed order; the library's own order varies."""
    length = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + length])
    described["__metadata__"] = dict(sorted(described["__metadata__"].items()))
    header = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(data)[8 + length :]])


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _what(asset: str, shard: str | None) -> str:
    return asset if shard is None else f"{asset}[{shard}]"
