"""Drawing the pictures of the demo pool."""

import io
import math
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from scalselect_assets.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIDE,
    SHAPES,
    Look,
    Picture,
    RarePicture,
    Scene,
    Thing,
    pick,
)

NOT_A_PICTURE: Final = "images/bad-not-a-picture.png"
CUT_PICTURE: Final = "images/bad-cut-short.png"


def png(image: Image.Image) -> bytes:
    """The bytes of a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw(picture: Picture) -> Image.Image:
    """Draw a scene or a rare picture."""
    return _draw_scene(picture) if isinstance(picture, Scene) else _draw_rare(picture)


def _draw_scene(scene: Scene) -> Image.Image:
    background = BACKGROUNDS[scene.background].rgb
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), background)
    draw = ImageDraw.Draw(image)
    if scene.gridded:
        line = (background[0] - 36, background[1] - 36, background[2] - 36)
        for at in range(7, IMAGE_SIDE, 14):
            draw.line((at, 0, at, IMAGE_SIDE), fill=line)
            draw.line((0, at, IMAGE_SIDE, at), fill=line)
    for thing in scene.things:
        _draw_thing(draw, thing)
    return image


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    """Draw a thing with the area of a circle of its radius, so that its radius alone decides its size."""
    x, y, fill = thing.x, thing.y, COLOURS[thing.kind.colour].rgb
    if thing.kind.shape == "circle":
        r = thing.radius
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        return
    n_corners, inner = {"square": (4, None), "triangle": (3, None), "star": (5, 0.5)}[thing.kind.shape]
    n = n_corners if inner is None else 2 * n_corners
    # The polygon is n triangles with two circumradii (one of them the inner one for a star) as sides.
    unit_area = n / 2 * (inner or 1.0) * math.sin(2 * math.pi / n)
    outer = thing.radius * math.sqrt(math.pi / unit_area)
    turn = math.pi / 4 if thing.kind.shape == "square" else 0.0
    corners = []
    for i in range(n):
        reach = outer * (inner if inner is not None and i % 2 else 1.0)
        angle = turn + 2 * math.pi * i / n - math.pi / 2
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    draw.polygon(corners, fill=fill)


def _draw_rare(picture: RarePicture) -> Image.Image:
    side, variant = IMAGE_SIDE, picture.variant
    rng = np.random.default_rng([picture.seed, variant])
    image = Image.new("RGB", (side, side), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    match picture.kind:
        case "noise":
            # Grains of two pixels disturb the patches as much as single pixels, at a quarter of the bytes.
            grains = rng.integers(0, 256, size=(side // 2, side // 2, 3), dtype=np.uint8)
            image = Image.fromarray(grains.repeat(2, axis=0).repeat(2, axis=1))
        case "negative":
            things = tuple(
                Thing(Look(pick(rng, list(SHAPES)), pick(rng, list(COLOURS))), x, y, 10)
                for x in (24, 56, 88)
                for y in (30, 80)
            )
            image = ImageOps.invert(_draw_scene(Scene("white", False, things)))
        case "sketch":
            left, top = 24 + 6 * variant, 46 - 4 * variant
            draw.rectangle((left, top, left + 60, 100), outline=0)
            draw.line((left - 6, top, left + 30, top - 30, left + 66, top), fill=0)
            draw.rectangle((left + 10, 70, left + 24, 100), outline=0)
            draw.rectangle((left + 36, 62, left + 50, 76), outline=0)
        case "specks":
            for cell in rng.choice(28 * 28, size=240, replace=False):
                x, y = 4 * (int(cell) % 28), 4 * (int(cell) // 28)
                draw.rectangle((x + 1, y + 1, x + 2, y + 2), fill=(20, 60 + 60 * variant, 20))
        case "rings":
            for radius in range(54, 0, -8):
                draw.ellipse(
                    (56 - radius, 56 - radius, 56 + radius, 56 + radius),
                    fill=(0, 90, 140) if radius == 6 else None,
                    outline=(160 * variant, 0, 60),
                    width=3,
                )
        case "stripes":
            ramp = (
                np.add.outer(np.arange(side), np.arange(side))
                if variant
                else np.subtract.outer(np.arange(side), np.arange(side))
            )
            image = Image.fromarray(np.where(ramp % 16 < 8, 0, 255).astype(np.uint8)).convert("RGB")
        case "gradient":
            ramp = np.add.outer(np.arange(side), np.arange(side)) / (2 * side - 2)
            tint = np.array(((255, 120, 200), (110, 255, 160))[variant])
            image = Image.fromarray((ramp[..., None] * tint).astype(np.uint8))
    return image
