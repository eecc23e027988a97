"""Partition keys as file and table names: ASCII, reversible, legal in LanceDB and on file systems.

If two keys differ only in case, so do their names, like the shard files themselves.
"""

import hashlib
import re

_UNSAFE = re.compile(rb"[^A-Za-z0-9-]")
_ESCAPE = re.compile(r"_([0-9a-f]{2})")
_MAX_LENGTH = 180  # leaves room for a fingerprint and a suffix within the 255 bytes of a file name


def encode_name(key: str) -> str:
    """Write any string with ASCII letters, digits, ``-`` and ``_`` only.

    Every other byte of the UTF-8 text becomes ``_`` and two hexadecimal digits, which ``decode_name``
    reverses. A result beyond 180 characters is cut and closed with ``__`` and a hash of the key, which is
    unique to the key but cannot be decoded. Files and tables with such a name carry the key inside.
    """
    encoded = _UNSAFE.sub(lambda unsafe: b"_%02x" % unsafe[0][0], key.encode("utf-8")).decode("ascii")
    if len(encoded) <= _MAX_LENGTH:
        return encoded
    return f"{encoded[: _MAX_LENGTH - 34]}__{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def decode_name(name: str) -> str:
    """Inverse of ``encode_name``.

    Raises:
        ValueError: ``name`` is not a name that ``encode_name`` wrote in full.
    """
    raw = b"".join(
        bytes([int(piece, 16)]) if index % 2 else piece.encode("utf-8", errors="replace")
        for index, piece in enumerate(_ESCAPE.split(name))
    )
    key = raw.decode("utf-8", errors="replace")
    if encode_name(key) != name:
        raise ValueError(f"{name!r} is not a reversibly encoded name")
    return key
