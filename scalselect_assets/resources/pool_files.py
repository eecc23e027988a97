"""The shard files of a pool, opened under the rule that holds for images: no link leads out of the pool.

A link to another file of the pool is followed. One that leads out of it, in circles or nowhere is a shard
that cannot be read: only this shard fails, and the target of the link is not opened.
"""

import errno
import os
import posixpath
import stat
from typing import BinaryIO

from upath import UPath

from scalselect_assets.resources.beneath import Beneath, NoRegularFileError, OutsideError
from scalselect_assets.resources.files import FileState, file_state, is_local
from scalselect_assets.resources.shard_reader import ShardFormatError

_REMEDY = "Put the file itself into the pool, or remove the link."


def open_shard_file(folder: UPath, relative: str) -> BinaryIO:
    """Open the shard at a path below the pool's folder.

    Raises:
        ShardFormatError: The path is a link that cannot be followed, or no regular file.
        FileNotFoundError: There is no such file.
        OSError: The file cannot be opened.
    """
    path = folder / relative
    if not is_local(folder):
        stream: BinaryIO = path.open("rb")
        return stream
    try:
        return Beneath(folder.path).open(relative)
    except OutsideError as error:
        raise ShardFormatError(
            f"{path} is reached by a link that leads out of the pool. {_REMEDY}"
        ) from error
    except NoRegularFileError as error:
        raise ShardFormatError(f"{path} is no regular file. Move it out of the pool.") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ShardFormatError(f"{path} is a link that leads in a circle. {_REMEDY}") from error
        if error.errno == errno.ENOENT and os.path.lexists(path.path):
            raise ShardFormatError(f"{path} is a link to a file that is not there. {_REMEDY}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def shard_file_state(folder: UPath, relative: str) -> FileState:
    """Size and version of the shard at a path below the pool's folder.

    A link that cannot be followed has a size and a version of its own.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The system cannot report on the file.
    """
    if not is_local(folder):
        return file_state(folder / relative)
    status = os.lstat(posixpath.join(folder.path, relative))
    if stat.S_ISLNK(status.st_mode):
        try:
            status = Beneath(folder.path).status(relative)
        except (OutsideError, NoRegularFileError):
            pass  # the state of the link itself: it changes when the link is replaced
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOENT):
                raise
    return FileState(status.st_size, str(status.st_mtime_ns))
