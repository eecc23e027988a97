"""The input of the method: a conversation of turns whose text and images keep their places.

This module is pure data. `scalselect_assets.resources.sample_source` reads the file formats, and
`scalselect_assets.method.representation.chat` applies the target model's chat template.
"""

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant"]


class ImageMark(enum.Enum):
    """The place of one image inside a turn; the n-th mark of a conversation is its n-th image."""

    IMAGE = "<image>"


IMAGE = ImageMark.IMAGE
Part: TypeAlias = str | Literal[ImageMark.IMAGE]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: its role and its text pieces and image marks, in order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole training sample as the model sees it, without the image data."""

    turns: tuple[Turn, ...]

    @property
    def n_images(self) -> int:
        """Number of image marks over all turns."""
        return sum(part is IMAGE for turn in self.turns for part in turn.parts)

    def texts(self, *roles: Role) -> Iterator[str]:
        """The text pieces of the turns spoken by ``roles``, in order."""
        return (
            part for turn in self.turns if turn.role in roles for part in turn.parts if isinstance(part, str)
        )

    def to_json(self) -> str:
        """The canonical JSON text: ``[[role, [text or null for an image, ...]], ...]``, no spaces, UTF-8."""
        turns = [[turn.role, [None if part is IMAGE else part for part in turn.parts]] for turn in self.turns]
        return json.dumps(turns, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """Inverse of ``to_json``."""
        return cls(
            tuple(
                Turn(role, tuple(IMAGE if part is None else part for part in parts))
                for role, parts in json.loads(text)
            )
        )
