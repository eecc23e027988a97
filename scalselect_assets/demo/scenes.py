"""The scenes that the demo pool draws."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, TypeVar

import numpy as np

IMAGE_SIDE: Final = 112

_Rgb: TypeAlias = tuple[int, int, int]
Pair: TypeAlias = tuple[str, str]
_T = TypeVar("_T")


# Vocabulary


@dataclass(frozen=True, slots=True)
class _Colour:
    rgb: _Rgb
    en: str
    ko: str
    ko_adjective: str


@dataclass(frozen=True, slots=True)
class _Shape:
    en: str
    ko: str


# Each Korean shape ends in a consonant, so the particles 은, 이, 과 fit all of them.
SHAPES: Final = {
    "circle": _Shape("circle", "원"),
    "square": _Shape("square", "정사각형"),
    "triangle": _Shape("triangle", "삼각형"),
    "star": _Shape("star", "별"),
}
COLOURS: Final = {
    "red": _Colour((214, 40, 40), "red", "빨간색", "빨간"),
    "blue": _Colour((38, 84, 200), "blue", "파란색", "파란"),
    "green": _Colour((34, 139, 74), "green", "초록색", "초록색"),
    "yellow": _Colour((240, 196, 25), "yellow", "노란색", "노란"),
    "purple": _Colour((122, 60, 170), "purple", "보라색", "보라색"),
    "orange": _Colour((243, 120, 20), "orange", "주황색", "주황색"),
}
BACKGROUNDS: Final = {
    "white": _Colour((252, 252, 252), "white", "흰색", "흰색"),
    "grey": _Colour((206, 208, 212), "light grey", "연한 회색", "연한 회색"),
    "beige": _Colour((240, 230, 206), "beige", "베이지색", "베이지색"),
    "sky": _Colour((204, 226, 246), "pale blue", "연한 하늘색", "연한 하늘색"),
}
EN_NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KO_NUMBERS: Final = ("영", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉")


# Scenes


@dataclass(frozen=True, slots=True)
class Look:
    """The look of a thing: its shape and its colour."""

    shape: str
    colour: str

    @property
    def en(self) -> str:
        """The English name."""
        return f"{COLOURS[self.colour].en} {SHAPES[self.shape].en}"

    @property
    def ko(self) -> str:
        """The Korean name."""
        return f"{COLOURS[self.colour].ko_adjective} {SHAPES[self.shape].ko}"

    def counted_en(self, n: int) -> str:
        """The English name with a number before it."""
        return f"{EN_NUMBERS[n]} {self.en}{'s' if n > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape of one colour at one place of a scene."""

    kind: Look
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Things on a background; these fields answer all questions about the scene."""

    background: str
    gridded: bool
    things: tuple[Thing, ...]

    @property
    def kinds(self) -> tuple[Look, ...]:
        """The distinct kinds of things in the scene."""
        return tuple(dict.fromkeys(thing.kind for thing in self.things))

    def count(self, kind: Look) -> int:
        """The number of things of one kind in the scene."""
        return sum(thing.kind == kind for thing in self.things)


@dataclass(frozen=True, slots=True)
class RarePicture:
    """One picture of the rare tail; ``variant`` is 0 or 1 and also seeds its noise."""

    kind: "RareKind"
    variant: int
    seed: int


Source: TypeAlias = Literal["counting", "colour", "layout"]
RareKind: TypeAlias = Literal["noise", "negative", "sketch", "specks", "rings", "stripes", "gradient"]
Picture: TypeAlias = Scene | RarePicture


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of the options, drawn uniformly."""
    return options[int(rng.integers(len(options)))]


def _jitter(rng: np.random.Generator, reach: float) -> float:
    return float(rng.uniform(-reach, reach))


def _counting_scene(variant: int, rng: np.random.Generator) -> Scene:
    """One to six equal things, in some templates one odd thing, in the cells of a 3 x 3 board."""
    background, gridded, main, odd = (
        ("grey", False, Look("circle", "red"), Look("square", "blue")),
        ("white", True, Look("star", "yellow"), None),
        ("beige", False, Look("triangle", "green"), Look("circle", "orange")),
        ("sky", True, Look("square", "purple"), None),
    )[variant % 4]
    kinds = [*([odd] if odd else []), *[main] * int(rng.integers(1, 7))]
    # A fixed order of cells keeps scenes with the same count near-identical up to the jitter.
    cells = (4, 0, 8, 2, 6, 1, 7)
    return Scene(
        background,
        gridded,
        tuple(
            Thing(kind, 19 + 37 * (cell % 3) + _jitter(rng, 3), 20 + 37 * (cell // 3) + _jitter(rng, 3), 8)
            for kind, cell in zip(kinds, cells, strict=False)
        ),
    )


def _colour_scene(variant: int, rng: np.random.Generator) -> Scene:
    """Two large things of different shape and colour, side by side."""
    background, gridded, shapes, palette = (
        ("white", False, ("circle", "star"), ("red", "blue")),
        ("grey", True, ("square", "triangle"), ("green", "yellow")),
        ("sky", False, ("triangle", "circle"), ("orange", "purple")),
        ("beige", True, ("star", "square"), ("blue", "red")),
    )[variant % 4]
    if rng.random() < 0.25:
        palette = palette[::-1]
    return Scene(
        background,
        gridded,
        tuple(
            Thing(Look(shape, colour), x + _jitter(rng, 4), 58 + _jitter(rng, 10), 14)
            for shape, colour, x in zip(shapes, palette, (31, 82), strict=True)
        ),
    )


def _layout_scene(variant: int, rng: np.random.Generator) -> Scene:
    """Three things of clearly different size in a row, sometimes mirrored."""
    background, gridded, kinds = (
        ("white", False, (Look("circle", "blue"), Look("star", "red"), Look("square", "green"))),
        ("beige", False, (Look("triangle", "purple"), Look("circle", "yellow"), Look("star", "blue"))),
        ("grey", True, (Look("square", "orange"), Look("triangle", "blue"), Look("circle", "green"))),
        ("sky", True, (Look("star", "purple"), Look("square", "red"), Look("triangle", "orange"))),
    )[variant % 4]
    columns = (19, 56, 93) if rng.random() < 0.7 else (93, 56, 19)
    return Scene(
        background,
        gridded,
        tuple(
            Thing(kind, x + _jitter(rng, 2), 58 + _jitter(rng, 20), radius)
            for kind, x, radius in zip(kinds, columns, (12, 7, 9), strict=True)
        ),
    )


SCENES: Final[Mapping[Source, Callable[[int, np.random.Generator], Scene]]] = MappingProxyType(
    {"counting": _counting_scene, "colour": _colour_scene, "layout": _layout_scene}
)
