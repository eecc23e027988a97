"""The rows of the exports: they are read once from the pool's tables, then in any order and repeatedly.

A `RowSpool` keeps the chosen rows' texts in a temporary file and 41 bytes of each row in memory (the
offset of its text, its rank, a hash that identifies it, and whether a trainer may have to read more than its
turns). So each further export costs one pass over that file, with seeks if its order is not the pool's, and
no shard is read twice.
"""

import hashlib
import json
import re
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.representation.conversation import Conversation, Role
from scalselect_assets.resources.forms.embedded import address_of
from scalselect_assets.resources.samples import conversation_of, written_turns
from scalselect_assets.resources.trained_fields import TrainedFields, trained_fields

NO_LABEL = "unlabelled"
"""The label of a row in which the field is missing or empty."""
_NO_RANK = np.iinfo(np.int64).max  # rows without an image come last
_HASH_BYTES = 16
_TRAINED_FIELD = re.compile(r'"(?:objects|tools|loss|weight|train|mask|ignore)')
"""A text without any of these has no `TrainedFields`; one with them may have."""


@dataclass(frozen=True)
class ExportRow:
    """One chosen row: its content, its origin and its scores.

    Attributes:
        sample_key: Content key, unique within the shard.
        source_id: The row's own id; None if it has none.
        shard: Partition key.
        row: Position in the shard.
        text: The row's JSON, verbatim as it was embedded.
        images: Paths relative to the pool's image root, one for each mark and in their order.
        image_sha256: Hash of each image's bytes at the time of embedding.
        rank: Place by score, from 1; None for a row without an image, like the other measurements.
        leverage: Score under the basis.
        normalised_leverage: The leverage times n/k.
        n_tokens: Length of the target model's input.
    """

    sample_key: str
    source_id: str | None
    shard: str
    row: int
    text: str
    images: tuple[str, ...] = ()
    image_sha256: tuple[str, ...] = ()
    rank: int | None = None
    leverage: float | None = None
    normalised_leverage: float | None = None
    n_tokens: int | None = None

    @property
    def text_only(self) -> bool:
        """Whether the row has no image; such rows are kept without a score."""
        return not self.images

    @property
    def id(self) -> str:
        """The row's id in trainers' files: its own id, or else its key."""
        return self.sample_key if self.source_id is None else self.source_id

    @cached_property
    def turns(self) -> tuple[tuple[Role, str], ...]:
        """Role and text of each turn as written, with an image mark for each image."""
        return written_turns(self.text)

    @cached_property
    def conversation(self) -> Conversation:
        """The turns with their texts split at the marks, which is the model's input."""
        return conversation_of(self.turns)

    @cached_property
    def trained(self) -> TrainedFields:
        """The fields that the trainer has to read in addition to the turns and images."""
        return trained_fields(self.text)

    @property
    def system(self) -> str | None:
        """The text of a leading system turn."""
        return self.turns[0][1] if self.turns[0][0] == "system" else None

    @property
    def dialogue(self) -> tuple[tuple[Role, str], ...]:
        """The turns behind a leading system turn."""
        return self.turns if self.system is None else self.turns[1:]

    def label(self, name: str) -> str:
        """The row's field ``name`` as text, or `NO_LABEL` if it is missing or empty."""
        # Numbers stay as written, whatever their length.
        row = json.loads(self.text, parse_int=str, parse_float=str, parse_constant=str)
        value = row.get(name)
        if value in (None, "", [], {}):
            return NO_LABEL
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)

    def identity(self) -> dict[str, Any]:
        """The fields that identify the row in every record."""
        return {"sample_key": self.sample_key, "id": self.source_id, "shard": self.shard, "row": self.row}

    def where(self) -> str:
        """The row's place and id, for messages."""
        named = "" if self.source_id is None else f" (id {self.source_id!r})"
        return f"row {self.row} of shard {self.shard!r}{named}"


class RowSpool:
    """The chosen rows and the pool's rejections, on disk until it is closed.

    Rows are added in the pool's order: by shard, then by row.
    """

    def __init__(self) -> None:
        # The files have no name, so that nothing is left of them even if the process is killed.
        self._rows = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - closed by close
        self._rejections = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115
        self._offsets, self._ranks, self._identities = array("q"), array("q"), bytearray()
        self._may_be_trained = bytearray()
        self.has_embedded = False
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, place: int) -> ExportRow:
        """The row that was added as number ``place``, from 0."""
        self._rows.seek(self._offsets[place])
        values = json.loads(self._rows.readline())
        for name in ("images", "image_sha256"):
            values[name] = tuple(values[name])
        return ExportRow(**values)

    def close(self) -> None:
        """Delete the files on disk."""
        self._rows.close()
        self._rejections.close()

    def add(self, row: ExportRow) -> None:
        """Keep one more row."""
        if self._rows.tell() != self._end:
            self._rows.seek(self._end)
        self._offsets.append(self._end)
        self._ranks.append(_NO_RANK if row.rank is None else row.rank)
        self._may_be_trained.append(_TRAINED_FIELD.search(row.text) is not None)
        self.has_embedded |= any(address_of(path) for path in row.images)
        who = json.dumps([row.sample_key, row.shard]).encode()
        self._identities += hashlib.sha256(who).digest()[:_HASH_BYTES]
        values = {name: getattr(row, name) for name in ExportRow.__dataclass_fields__}
        self._end += self._rows.write(json.dumps(values).encode() + b"\n")

    def has_image(self, place: int) -> bool:
        """Whether a row has an image, without reading it."""
        return self._ranks[place] != _NO_RANK

    def may_have_trained_fields(self, place: int) -> bool:
        """Whether a row's text may have boxes, tools or weights, without reading it."""
        return bool(self._may_be_trained[place])

    def order(self, order: Literal["shuffled", "score", "pool"], seed: int) -> NDArray[np.int64]:
        """The rows' numbers in an order that is the same on every machine and for every version of NumPy.

        In shuffled order, a row's place follows from a hash of the seed, its key and its shard, so that rows
        that stay from one night to the next keep their relative order.
        """
        if order == "pool":
            return np.arange(len(self), dtype=np.int64)
        if order == "score":
            return np.argsort(np.frombuffer(self._ranks, np.int64), kind="stable")
        salt = f"{seed}:".encode()
        hashes = bytearray()
        for start in range(0, len(self._identities), _HASH_BYTES):
            who = self._identities[start : start + _HASH_BYTES]
            hashes += hashlib.sha256(salt + who).digest()[:_HASH_BYTES]
        high_low = np.frombuffer(hashes, ">u8").reshape(-1, 2)
        return np.lexsort((high_low[:, 1], high_low[:, 0])).astype(np.int64)

    def add_rejection(self, record: dict[str, Any]) -> None:
        """Keep the pool's record of a rejected row; all records must be added before the first is read."""
        self._rejections.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def rejections(self) -> Iterator[bytes]:
        """The records of the pool's rejected rows, as JSON lines."""
        self._rejections.seek(0)
        yield from self._rejections
