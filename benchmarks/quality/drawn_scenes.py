"""Generated scenes: coloured shapes on a grid, and at times a sign with a character."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL: Final = 16
"""Pixels of a side of a cell."""

COLOURS: Final = {
    "red": (214, 40, 40),
    "blue": (40, 80, 214),
    "green": (40, 160, 60),
    "yellow": (236, 204, 40),
    "purple": (140, 60, 180),
    "orange": (240, 130, 30),
    "white": (250, 250, 250),
    "cyan": (60, 200, 220),
}
SHAPES: Final = ("circle", "square", "triangle", "cross", "diamond", "ring")
SIZES: Final = ("small", "large")
RARE: Final = frozenset({"white", "cyan", "diamond", "ring"})
"""Colours and shapes that a pool rarely has."""

_GLYPHS = "ABCEFHKLNPRTXZ2345789"
_ZOOM = 4  # pictures are drawn larger and reduced, so that edges are smooth


@dataclass(frozen=True, slots=True)
class DrawnThing:
    """One coloured shape."""

    colour: str
    shape: str
    size: str
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class DrawnScene:
    """Things on a grid; ``glyph`` is what the sign says, None without a sign."""

    things: tuple[DrawnThing, ...]
    glyph: str | None
    glyph_cell: tuple[int, int]
    background: tuple[int, int, int]
    grid: int


def draw_scene(rng: np.random.Generator, grid: int, *, tail: float, sign: bool) -> DrawnScene:
    """A scene of different things; a ``tail`` above 0 makes late colours and shapes rare."""
    n_cells = grid * grid
    n_things = int(rng.integers(2 if grid == 2 else 3, min(n_cells - 1, 6) + 1))
    cells = rng.permutation(n_cells).tolist()
    colours, shapes = list(COLOURS), list(SHAPES)
    weights = [1.0 / np.arange(1, len(names) + 1) ** tail for names in (colours, shapes)]
    by_colour, by_shape = (one / one.sum() for one in weights)
    kinds: set[tuple[str, str]] = set()
    things = []
    for cell in cells[:n_things]:
        kind = colours[rng.choice(len(colours), p=by_colour)], shapes[rng.choice(len(shapes), p=by_shape)]
        if kind not in kinds:
            kinds.add(kind)
            things.append(DrawnThing(*kind, SIZES[int(rng.integers(2))], cell // grid, cell % grid))
    glyph = _GLYPHS[int(rng.integers(len(_GLYPHS)))] if sign else None
    background = tuple(int(value) for value in rng.integers(90, 140, 3))
    return DrawnScene(tuple(things), glyph, divmod(cells[n_things], grid), background, grid)


def render(scene: DrawnScene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture of a scene, (side, side, 3); places and colours are off by a little."""
    side = scene.grid * CELL
    image = Image.new("RGB", (side * _ZOOM, side * _ZOOM), scene.background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(draw, thing, rng)
    if scene.glyph:
        y, x = (
            ((cell + 0.5) * CELL + shift) * _ZOOM
            for cell, shift in zip(scene.glyph_cell, rng.uniform(-1, 1, 2), strict=True)
        )
        half = 7 * _ZOOM
        draw.rectangle((x - half, y - half, x + half, y + half), fill=(245, 245, 235))
        draw.text((x, y), scene.glyph, fill=(20, 20, 20), font=_font(), anchor="mm")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.uint8)


def place_of(scene: DrawnScene, thing: DrawnThing) -> str:
    """Where a thing is, in words."""
    half = (scene.grid - 1) / 2
    vertical = "top" if thing.row < half else "bottom" if thing.row > half else "middle"
    horizontal = "left" if thing.column < half else "right" if thing.column > half else "centre"
    return f"{vertical} {horizontal}"


def _draw_thing(draw: ImageDraw.ImageDraw, thing: DrawnThing, rng: np.random.Generator) -> None:
    x, y = (
        ((cell + 0.5) * CELL + shift) * _ZOOM
        for cell, shift in zip((thing.column, thing.row), rng.uniform(-1.5, 1.5, 2), strict=True)
    )
    r = (6.0 if thing.size == "large" else 3.6) * _ZOOM
    colour = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-12, 13, 3), 0, 255)
    fill, box = tuple(colour.tolist()), (x - r, y - r, x + r, y + r)
    match thing.shape:
        case "circle":
            draw.ellipse(box, fill=fill)
        case "square":
            draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
        case "triangle":
            draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=fill)
        case "cross":
            draw.rectangle((x - 0.34 * r, y - r, x + 0.34 * r, y + r), fill=fill)
            draw.rectangle((x - r, y - 0.34 * r, x + r, y + 0.34 * r), fill=fill)
        case "diamond":
            draw.polygon([(x, y - r), (x - r, y), (x, y + r), (x + r, y)], fill=fill)
        case _:
            draw.ellipse(box, outline=fill, width=int(0.42 * r))


@lru_cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13 * _ZOOM)
