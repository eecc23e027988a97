"""The attention map of one sample: the parts of its images that its representation is made from.

p_j is the instruction's attention on vision token j, normalised to sum to one over the sample. Both p_j and
the kept tokens come from the same computation as the vector (`encoder.VlmEncoder.examine`). `token_layout`
gives the place of each token in its image, and `overlay` draws the map over the image.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from scalselect_assets.method.representation.encoder import ChatSample, Representation, VlmEncoder
from scalselect_assets.method.representation.images import decode_image
from scalselect_assets.method.representation.rejection import Rejection
from scalselect_assets.method.representation.token_layout import Box, ImageLayout, image_layouts

DEFAULT_MAX_SIDE = 768

# Dark blue, grey, yellow: lightness alone gives the order, and red is never next to green.
_HEAT: Final = np.array([[0, 34, 78], [66, 78, 107], [124, 123, 120], [187, 175, 106], [254, 232, 56]], float)
_SHADE = 0.45  # how much the image darkens the heat, so that its shapes stay visible
_UNSEEN = 0.35  # brightness of parts that no token shows
_PADDING = 48  # grey level outside the image
_KEPT, _KEPT_SHADOW = (255, 255, 255), (0, 0, 0)
_GAP = 8
_STRIP_HEIGHT = 28
_TEXT_HEIGHT = 14


@dataclass(frozen=True, slots=True, eq=False)
class GridAttention:
    """Attention over one grid of an image's tokens.

    Attributes:
        attention: (rows, columns) float64: p_j.
        kept: (rows, columns) bool: the dominant tokens, whose mean the vector is.
        box: The part of the image that the grid shows; see `token_layout.Grid`.
        line_ends: (e,) float64: p_j of the tokens that end its rows and show no part of the image.
        line_ends_kept: (e,) bool: which of those tokens are dominant.
    """

    attention: NDArray[np.float64]
    kept: NDArray[np.bool_]
    box: Box | None
    line_ends: NDArray[np.float64]
    line_ends_kept: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class ImageAttention:
    """Attention over one image.

    Attributes:
        layout: The places of the image's tokens.
        attention: (n_tokens,) float64: p_j, in the model's order.
        kept: (n_tokens,) bool: the dominant tokens, whose mean the vector is.
    """

    layout: ImageLayout
    attention: NDArray[np.float64]
    kept: NDArray[np.bool_]

    @property
    def grids(self) -> tuple[GridAttention, ...]:
        """The attention as grids over the image, in the model's order."""
        return tuple(
            GridAttention(
                self.attention[grid.tokens],
                self.kept[grid.tokens],
                grid.box,
                self.attention[grid.line_ends],
                self.kept[grid.line_ends],
            )
            for grid in self.layout.grids
        )

    @property
    def share(self) -> float:
        """The share of the sample's attention on vision that falls on this image, in [0, 1]."""
        return float(self.attention.sum())

    @property
    def n_kept(self) -> int:
        """The number of dominant tokens of this image."""
        return int(self.kept.sum())


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMap:
    """Attention over the images of one sample; p_j sums to 1 over all of them.

    Attributes:
        images: Attention over each image, in the order of the image marks.
        representation: The sample's representation, from the same computation.
    """

    images: tuple[ImageAttention, ...]
    representation: Representation


def attention_map(
    encoder: VlmEncoder, sample: ChatSample, read_image: Callable[[str], bytes]
) -> AttentionMap | Rejection:
    """The attention map of one sample, or its rejection if it has no vector.

    The map costs as much as the sample's vector, plus one more preparation of its images.

    Args:
        encoder: Encoder of the target model.
        sample: The sample.
        read_image: Function that returns the bytes of an image for its reference.

    Raises:
        OSError: An image cannot be read, for another reason than that it is missing.
    """
    examined = encoder.examine(sample, read_image)
    if isinstance(examined, Rejection):
        return examined
    sizes = [decode_image(read_image(image), encoder.preparer.max_pixels).size for image in sample.images]
    layouts = image_layouts(encoder.base_model, encoder.preparer, sample.conversation, sizes)
    attention = examined.state.attention.astype(np.float64)
    total = attention.sum()
    share = attention / total if total > 0 else np.full(len(attention), 1 / len(attention))
    kept = np.zeros(len(share), dtype=np.bool_)
    kept[examined.state.dominant] = True
    starts = accumulate((layout.n_tokens for layout in layouts[:-1]), initial=0)
    own = [slice(start, start + layout.n_tokens) for start, layout in zip(starts, layouts, strict=True)]
    images = tuple(
        ImageAttention(layout, share[tokens], kept[tokens])
        for layout, tokens in zip(layouts, own, strict=True)
    )
    return AttentionMap(images, examined.representation)


# Drawing the map


def overlay_png(image: Image.Image, seen: ImageAttention, *, max_side: int = DEFAULT_MAX_SIDE) -> bytes:
    """``overlay`` as the bytes of a PNG."""
    buffer = io.BytesIO()
    overlay(image, seen, max_side=max_side).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def overlay(image: Image.Image, seen: ImageAttention, *, max_side: int = DEFAULT_MAX_SIDE) -> Image.Image:
    """The image in grey, with attention drawn over it as heat and the kept tokens outlined in white.

    Heat goes from dark blue to yellow, which people who confuse red and green can read. It grows with the
    square root of p_j divided by the image's largest p_j, so weak attention is visible. Overlapping grids
    (tiles, and the whole image) are drawn side by side. Parts of the image that no token of a grid shows, for
    example cropped margins, are dark, and padding is plain grey. A grid without a known place is drawn as a
    strip with a sentence that says so, and a white line below the strip marks its kept tokens.

    Args:
        image: The upright image that `images.decode_image` returns.
        seen: The attention on this image.
        max_side: Longest side of the result in pixels, at least 32.

    Returns:
        An RGB image whose longer side is ``max_side`` pixels, or slightly less because of rounding.

    Raises:
        ValueError: ``seen`` belongs to another image, or ``max_side`` is too small.
    """
    if max_side < 32:
        raise ValueError(f"Got a longest side of {max_side} pixels; allowed is 32 or more.")
    if image.size != seen.layout.size:
        raise ValueError(
            f"Got an image of {image.width} × {image.height} pixels; the attention is of one of "
            f"{seen.layout.size[0]} × {seen.layout.size[1]}. Give the one that it was computed from, upright."
        )
    grids, largest = seen.grids, float(seen.attention.max())
    panels = _panels(grids)
    strips = [grid for grid in grids if grid.box is None]
    below = len(strips) * (_STRIP_HEIGHT + _GAP) + (_TEXT_HEIGHT if strips else 0)
    frames = [_frame(image.size, panel) for panel in panels]
    scale, beside = _fit(frames, max_side, max_side - below)
    drawn = [_panel(image, panel, frame, scale, largest) for panel, frame in zip(panels, frames, strict=True)]
    picture = _joined(drawn, beside=beside)
    if not strips:
        return picture
    lines = [_strip(grid, largest, max_side) for grid in strips]
    return _joined([*([picture] if panels else []), _sentence(max_side), *lines], beside=False)


def _panels(grids: Sequence[GridAttention]) -> list[list[GridAttention]]:
    """Grids that can be drawn over one image without covering each other."""
    panels: list[list[GridAttention]] = []
    for grid in grids:
        if grid.box is None:
            continue
        free = (panel for panel in panels if not any(_overlap(grid.box, other.box) for other in panel))
        panel = next(free, None)
        if panel is None:
            panels.append([grid])
        else:
            panel.append(grid)
    return panels


def _overlap(one: Box, other: Box | None) -> bool:
    """Whether two boxes overlap by more than the error with which their borders are measured."""
    if other is None:
        return False
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width > 0 and height > 0 and width * height > 0.1 * smaller


def _frame(size: tuple[int, int], panel: Sequence[GridAttention]) -> Box:
    """The smallest box that holds the image and everything that its tokens show."""
    boxes = [(0.0, 0.0, float(size[0]), float(size[1])), *(grid.box for grid in panel if grid.box)]
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _fit(frames: Sequence[Box], width: int, height: int) -> tuple[float, bool]:
    """Pixels drawn per pixel of the image, and whether panels stand side by side."""
    if not frames:
        return 1.0, True
    widths = [right - left for left, _, right, _ in frames]
    heights = [bottom - top for _, top, _, bottom in frames]
    gaps = _GAP * (len(frames) - 1) + len(frames)  # one pixel per frame for rounding
    beside = min((width - gaps) / sum(widths), (height - 1) / max(heights))
    below = min((width - 1) / max(widths), (height - gaps) / sum(heights))
    return max(beside, below, 1 / max(*widths, *heights)), beside >= below


def _panel(
    image: Image.Image, grids: Sequence[GridAttention], frame: Box, scale: float, largest: float
) -> Image.Image:
    left, top, right, bottom = frame
    width, height = max(1, ceil((right - left) * scale)), max(1, ceil((bottom - top) * scale))
    shown = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    grey = image.convert("L").resize(shown, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
    canvas = Image.new("L", (width, height), _PADDING)
    canvas.paste(grey, (round(-left * scale), round(-top * scale)))
    background = np.repeat(np.asarray(canvas, dtype=np.float64)[..., None], 3, axis=2)
    pixels = background * _UNSEEN
    outside = np.ones((height, width), dtype=np.bool_)
    x, y = round(-left * scale), round(-top * scale)
    outside[max(0, y) : y + shown[1], max(0, x) : x + shown[0]] = False
    pixels[outside] = _PADDING
    outlines = []
    for grid in grids:
        if grid.box is None:
            continue
        columns = _edges(grid.box[0] - left, grid.box[2] - left, grid.attention.shape[1], scale, width)
        rows = _edges(grid.box[1] - top, grid.box[3] - top, grid.attention.shape[0], scale, height)
        heat = _spread(_heat(grid.attention, largest), rows, columns)
        part = (slice(rows[0], rows[-1]), slice(columns[0], columns[-1]))
        pixels[part] = heat * (1 - _SHADE + _SHADE * background[part] / 255)
        outlines.append((grid.kept, rows, columns))
    picture = Image.fromarray(np.rint(pixels).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for kept, rows, columns in outlines:
        _outline(draw, kept, rows, columns)
    return picture


def _edges(start: float, end: float, count: int, scale: float, limit: int) -> NDArray[np.int64]:
    """The pixels at which cells begin and end, (count + 1,)."""
    edges: NDArray[np.int64] = np.rint(np.linspace(start, end, count + 1) * scale).astype(np.int64)
    return np.clip(edges, 0, limit)


def _spread(
    values: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The pixels of (r, c, 3) cells."""
    return np.repeat(np.repeat(values, np.diff(rows), axis=0), np.diff(columns), axis=1)


def _heat(attention: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """The colours of attention values, (..., 3)."""
    strength = np.sqrt(attention / largest) if largest > 0 else np.zeros_like(attention)
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(strength, stops, _HEAT[:, channel]) for channel in range(3)], axis=-1)


def _outline(
    draw: ImageDraw.ImageDraw, kept: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> None:
    """A white line with a black shadow on its inner side, where a kept token borders on one that is not."""
    around = np.pad(kept, 1)
    lines = []
    for row, column in np.argwhere(kept):
        top, bottom = int(rows[row]), int(rows[row + 1]) - 1
        left, right = int(columns[column]), int(columns[column + 1]) - 1
        if bottom < top or right < left:
            continue  # the cell is thinner than a pixel
        if not around[row, column + 1]:
            lines.append(((left, top), (right, top), (0, 1)))
        if not around[row + 2, column + 1]:
            lines.append(((left, bottom), (right, bottom), (0, -1)))
        if not around[row + 1, column]:
            lines.append(((left, top), (left, bottom), (1, 0)))
        if not around[row + 1, column + 2]:
            lines.append(((right, top), (right, bottom), (-1, 0)))
    cell = min(np.diff(rows).min(), np.diff(columns).min())
    thick = 1 if cell < 24 else 2
    if cell >= 6:
        for (x0, y0), (x1, y1), (dx, dy) in lines:
            for step in range(thick, 2 * thick):
                draw.line(((x0 + step * dx, y0 + step * dy), (x1 + step * dx, y1 + step * dy)), _KEPT_SHADOW)
    for (x0, y0), (x1, y1), (dx, dy) in lines:
        for step in range(thick):
            draw.line(((x0 + step * dx, y0 + step * dy), (x1 + step * dx, y1 + step * dy)), _KEPT)


def _strip(grid: GridAttention, largest: float, width: int) -> Image.Image:
    """A strip of the tokens in order from left to right, with a mark below each kept token."""
    attention, kept = grid.attention.reshape(1, -1), grid.kept.reshape(1, -1)
    of_pixel = np.arange(width) * attention.shape[1] // width
    pixels = np.zeros((_STRIP_HEIGHT, width, 3))
    pixels[: _STRIP_HEIGHT - 6] = _heat(attention, largest)[:, of_pixel]
    pixels[_STRIP_HEIGHT - 4 :] = 255 * kept[:, of_pixel, None]
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _sentence(width: int) -> Image.Image:
    line = Image.new("RGB", (width, _TEXT_HEIGHT), (0, 0, 0))
    caption = "Tokens in order; where they lie in the image is not known."
    ImageDraw.Draw(line).text((2, 1), caption, fill=_KEPT, font=ImageFont.load_default_imagefont())
    return line


def _joined(parts: Sequence[Image.Image], *, beside: bool) -> Image.Image:
    if not parts:
        return Image.new("RGB", (1, 1))
    if len(parts) == 1:
        return parts[0]
    gaps = _GAP * (len(parts) - 1)
    widths, heights = [part.width for part in parts], [part.height for part in parts]
    size = (sum(widths) + gaps, max(heights)) if beside else (max(widths), sum(heights) + gaps)
    whole = Image.new("RGB", size, (0, 0, 0))
    at = 0
    for part in parts:
        whole.paste(part, (at, 0) if beside else (0, at))
        at += (part.width if beside else part.height) + _GAP
    return whole
