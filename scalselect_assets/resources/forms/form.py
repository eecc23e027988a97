"""The common interface of all forms of shard: rows as JSON texts, and embedded images.

The file's suffix names the form. Rows are JSON texts in every form; embedded images leave the text and
are named by their address (`forms.embedded`). Opening one such image must not cost the reading
of the whole shard each time, so unpacked images are kept in a temporary file: see ``Unpacked``.
"""

import atexit
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, BinaryIO, Protocol, TypeVar

from upath import UPath

from scalselect_assets.resources.forms.embedded import Address
from scalselect_assets.resources.pool_files import open_shard_file
from scalselect_assets.resources.shard_reader import Container, RowText

_IN_MEMORY_BYTES = 64 << 20
_KEPT_SHARDS = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """The file of a shard, opened so that no link leads out of its folder.

    Attributes:
        folder: The pool's folder.
        name: The file's path from that folder, also used in the addresses of embedded images.
    """

    folder: UPath
    name: str

    def __str__(self) -> str:
        return str(self.folder / self.name)

    @property
    def path(self) -> UPath:
        """The location of the file, for messages."""
        return self.folder / self.name

    def open(self) -> BinaryIO:
        """Open it for reading; raises as `open_shard_file`."""
        return open_shard_file(self.folder, self.name)

    def digest(self, digest: "Digest", chunk_bytes: int = 1 << 20) -> None:
        """Hash a file that is then read out of order; raises as ``open``."""
        with self.open() as stream:
            while chunk := stream.read(chunk_bytes):
                digest.update(chunk)


class Digest(Protocol):
    """A running hash over the bytes of a file as they are read."""

    def update(self, data: bytes, /) -> object:
        """Take in more bytes."""


class Form(Protocol):
    """One form of shard."""

    @property
    def name(self) -> str:
        """The name of the form in messages."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files' names, in lower case."""

    def rows(self, file: ShardFile, digest: Digest | None = None) -> Iterator[RowText]:
        """Every row of a shard, in order, in the memory of a few rows.

        Args:
            file: The file.
            digest: Hash that receives all bytes of the file, even if it turns out to be no shard.

        Raises:
            ShardFormatError: The file is not what its name says, or is cut off.
            OSError: The file cannot be read.
        """

    def container(self, file: ShardFile) -> Container:
        """Whether a training file of its rows is to be an array or lines.

        Raises:
            ShardFormatError: The file is damaged or of another form, as in ``rows``.
            OSError: The file cannot be read.
        """

    def read_image(self, file: ShardFile, version: str, address: Address) -> bytes:
        """An embedded image.

        Args:
            file: The file.
            version: Current version of the file; images unpacked from another version are forgotten.
            address: Address of the image.

        Raises:
            FileNotFoundError: The shard has no such row, or the row no such image.
            ShardFormatError: The file is damaged or of another form, as in ``rows``.
            OSError: The file cannot be read.
        """


class Unpacked:
    """Images of one shard, unpacked row by row as far as they were asked for, each row once.

    Memory: 64 MiB of images, beyond which they lie in a temporary file (``TMPDIR``), and their places.
    """

    def __init__(self, rows: Iterable[RowText]) -> None:
        self._rows = iter(rows)
        self._places: list[list[tuple[int, int]]] = []
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 - kept open
        self._end = 0

    def image(self, address: Address) -> bytes:
        """An image by its address.

        Raises:
            FileNotFoundError: There is no such image.
        """
        while len(self._places) <= address.row and (row := next(self._rows, None)) is not None:
            self._keep(row)
        if address.row >= len(self._places) or address.place >= len(self._places[address.row]):
            msg = f"{address} names an image that the shard does not hold; refer to one that it does"
            raise FileNotFoundError(msg)
        start, size = self._places[address.row][address.place]
        self._file.seek(start)
        return self._file.read(size)

    def _keep(self, row: RowText) -> None:
        self._file.seek(self._end)
        places = []
        for image in row.images:
            self._file.write(image)
            places.append((self._end, len(image)))
            self._end += len(image)
        self._places.append(places)


class KeptFile:
    """The last few shards that images were read from, by file and version; one for each process.

    A forked process has entries of its own: two of them must not move one file position.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[int, str, str], object] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, file: ShardFile, version: str, make: Callable[[], T], use: Callable[[T], bytes]) -> bytes:
        """The result of ``use`` on a shard's entry; ``make`` makes a missing entry.

        Raises:
            Exception: Whatever ``make`` and ``use`` raise; an entry that failed is forgotten.
        """
        key = (os.getpid(), str(file), version)
        with self._lock:
            if not self._entries:
                atexit.register(self._entries.clear)  # while files can still be closed in order
            entry: T = self._entries.pop(key, None) or make()  # type: ignore[assignment]
            found = use(entry)
            self._entries[key] = entry
            while len(self._entries) > _KEPT_SHARDS:
                self._entries.popitem(last=False)
            return found


UNPACKED = KeptFile()


def read_unpacked(form: Form, file: ShardFile, version: str, address: Address) -> bytes:
    """``Form.read_image`` for forms whose images can be reached in the order of the rows only."""
    return UNPACKED.get(
        file,
        version,
        lambda: Unpacked(form.rows(file)),
        lambda unpacked: unpacked.image(address),
    )
