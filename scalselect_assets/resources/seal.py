"""A hash inside a file of all its other bytes, so that a byte that changes on the disk is noticed on reading.

The hash stands in the header of a file: in the metadata of Parquet and safetensors, under a key of JSON. A
second hash covers the header alone, which is often read without the rest. Files from before seals existed
have neither hash and are read as they are. Costs: one pass of SHA-256
over the bytes, about a second for each gigabyte.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any, TypeAlias

from scalselect_assets.resources.identity import digest

PAYLOAD = "payload_sha256"
HEADER = "header_sha256"
_HASH = re.compile(r"[0-9a-f]{64}")
_BLANK = b"0" * 64

Pieces: TypeAlias = tuple[memoryview, bytes, memoryview]
"""The bytes of a sealed file, one after the other."""


class SealError(ValueError):
    """A file differs from what was written to it."""


def to_be_sealed(header: Mapping[str, str]) -> dict[str, str]:
    """The header of a file with room for its hashes; ``seal`` fills in the hash of the whole file."""
    return {**header, HEADER: digest(dict(header)), PAYLOAD: secrets.token_hex(32)}


def seal(data: bytes, header: Mapping[str, str]) -> Pieces:
    """Fill the hash of a file into the place that ``header``, made by ``to_be_sealed``, reserves for it.

    Raises:
        ValueError: The bytes do not hold the header.
    """
    place = _place(data, header[PAYLOAD])
    view = memoryview(data)
    return view[:place], _hash_around(view, place).encode(), view[place + len(_BLANK) :]


def checked_header(header: Mapping[str, str], written: bytes = b"") -> dict[str, str]:
    """The checked header of a file, without the hashes.

    Args:
        header: Header as a library read it.
        written: Bytes of the header in the file, if damage may hide parts of it from the library.

    Raises:
        SealError: The header differs from the one written.
    """
    hidden = [name for name in (HEADER, PAYLOAD) if name not in header and name.encode() in written]
    if hidden:
        raise SealError(f"its {hidden[0]} cannot be read")
    own = {name: value for name, value in header.items() if name not in {HEADER, PAYLOAD, "ARROW:schema"}}
    if (HEADER in header) != (PAYLOAD in header):
        raise SealError("one of its two hashes is missing")
    if HEADER in header and header[HEADER] != digest(own):
        raise SealError("what it says of itself is not what was written")
    return own


def check(data: bytes, header: Mapping[str, Any]) -> None:
    """Compare a file with the hash in its header, as read; a file without one passes.

    Raises:
        SealError: A byte of the file has changed.
    """
    if PAYLOAD not in header:
        return
    recorded = header[PAYLOAD]
    if not isinstance(recorded, str) or not _HASH.fullmatch(recorded):
        raise SealError("its hash is damaged")
    if (found := _hash_around(memoryview(data), _place(data, recorded))) != recorded:
        raise SealError(f"it has SHA-256 {found[:12]}..., written was {recorded[:12]}...")


def _place(data: bytes, value: str) -> int:
    """The place of a hash. The hash covers all other parts, or is random, so none of them can contain it."""
    place = data.rfind(value.encode())
    if place < 0:
        raise SealError("its hash cannot be found in it")
    return place


def _hash_around(view: memoryview, place: int) -> str:
    sha256 = hashlib.sha256(view[:place])
    sha256.update(_BLANK)
    sha256.update(view[place + len(_BLANK) :])
    return sha256.hexdigest()
