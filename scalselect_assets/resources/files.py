"""The properties of a file that need no reading, locally and in an object store."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upath import UPath

_LOCAL_PROTOCOLS = ("", "file", "local")
_STORE_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "updated", "created")


@dataclass(frozen=True, slots=True)
class FileState:
    """The properties of a file that need no reading."""

    size: int
    version: str
    """Modification time in nanoseconds, or an object store's ETag (failing that, its date)."""


def is_local(path: UPath) -> bool:
    """Whether a path is on this machine's file system, so that the system can be asked about links."""
    return path.protocol in _LOCAL_PROTOCOLS


def file_state(path: UPath) -> FileState:
    """Size and version of any file, local or in an object store.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The system cannot report on the file.
    """
    return local_file_state(path.path) if is_local(path) else store_state(path.fs.info(path.path))


def local_file_state(path: str) -> FileState:
    """``file_state`` of a path on this machine, without the cost of a path object.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The system cannot report on the file.
    """
    status = os.stat(path)  # noqa: PTH116 - see above
    return FileState(status.st_size, str(status.st_mtime_ns))


def store_state(info: Mapping[str, Any]) -> FileState:
    """The state that an object store's listing gives."""
    version = next((info[field] for field in _STORE_VERSION_FIELDS if info.get(field)), "")
    return FileState(int(info["size"]), str(version))
