"""The places of a sample's vision tokens in its images.

The way in which a processor cuts an image (resizing, cropping, padding, tiles) is measured, not calculated.
The sample's own images are replaced by pictures in which each pixel's colour encodes its place, and the
processor's output shows which part each tile sees. Only the order in which the vision tower's patches become
tokens is known by family (`_FAMILIES`). For any other model, the tokens are one strip without places.

====================================  ====================================================================
family                                layout of an image
====================================  ====================================================================
LLaVA-1.5, Gemma 3                    one grid
InternVL, Idefics3, SmolVLM           one grid per tile, and one of the whole image, in the model's order
LLaVA-NeXT, LLaVA-OneVision           one grid of the whole image and one of all tiles together, whose rows
                                      each end in a token that shows nothing; where a OneVision row has
                                      several images, one grid and one such token for each
Qwen2-VL, Qwen2.5-VL, Qwen3-VL        one grid of merged patches
any other                             one strip, in order, without a place
====================================  ====================================================================
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scalselect_assets.method.representation.conversation import Conversation
from scalselect_assets.method.representation.preparation import Preparer

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the upright image; a padded image reaches beyond its edges."""

_MARK = 0.98  # least value of the third channel in the image; padding and its blurred edges are below it
_MIXED = 2  # number of pixels beside padding that its colour mixes with
_RESIDUAL = 0.01  # of the image's side, root mean square; with a larger error, a tile is not such a part
_FEWEST_PIXELS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Vision tokens that lie in rows and columns over a part of an image.

    Attributes:
        tokens: (rows, columns) int64: number of the image's token in each cell, counted from 0.
        box: The part of the image that the grid shows, divided into cells of one size; None if unknown.
        line_ends: (e,) int64: tokens that end the grid's rows, or the grid, and show no part of the image.
    """

    tokens: NDArray[np.int64]
    box: Box | None
    line_ends: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ImageLayout:
    """The vision tokens of one image.

    Attributes:
        size: Width and height of the upright image in pixels.
        n_tokens: Number of tokens of the image.
        grids: The grids in the model's order; together they hold each token once.
        note: One sentence that explains how to read the layout.
    """

    size: tuple[int, int]
    n_tokens: int
    grids: tuple[Grid, ...]
    note: str


def image_layouts(
    model: Any, preparer: Preparer, conversation: Conversation, sizes: Sequence[tuple[int, int]]
) -> list[ImageLayout]:
    """The layout of each image of a sample.

    This costs one more preparation of the sample, with other pixels. The vision tower does not run.

    Args:
        model: The base model; its configuration and its packing of tiles are used.
        preparer: Preparer of this model.
        conversation: A sample that was prepared before.
        sizes: Width and height of each of its images, upright.

    Raises:
        ChatTemplateError: The template refuses the conversation.
        ValueError: The processor refuses the conversation or an image.
    """
    pictures = [_picture_of_coordinates(*size) for size in sizes]
    inputs, n_tokens = preparer.stand_in(conversation, pictures)
    inputs = {name: value.cpu() for name, value in inputs.items()}
    kind = model.config.model_type
    family = _FAMILIES.get(kind)
    found = family(_Sample(model, preparer.image_processor, inputs, n_tokens, sizes)) if family else None
    if found is None or any(
        sum(grid.tokens.size + len(grid.line_ends) for grid in grids) != count
        for grids, count in zip(found, n_tokens, strict=True)
    ):
        note = (
            f"How a model of type {kind} lays out the {{count}} tokens of such an image is not known here, "
            "so they are shown in their order and not over the image."
        )
        return [
            ImageLayout(size, count, (_strip(count),), note.format(count=count))
            for size, count in zip(sizes, n_tokens, strict=True)
        ]
    return [
        ImageLayout(size, count, tuple(grids), _note(grids))
        for size, count, grids in zip(sizes, n_tokens, found, strict=True)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """The processor's outputs for the pictures of coordinates."""

    model: Any
    image_processor: Any
    inputs: Mapping[str, torch.Tensor]
    n_tokens: Sequence[int]
    sizes: Sequence[tuple[int, int]]

    @property
    def config(self) -> Any:
        return self.model.config


def _note(grids: Sequence[Grid]) -> str:
    lost = sum(grid.box is None for grid in grids)
    sentence = f"{len(grids)} grids of tokens" if len(grids) > 1 else "One grid of tokens"
    if ends := sum(len(grid.line_ends) for grid in grids):
        tokens = (
            "1 token at the end of it, which shows" if ends == 1 else f"{ends} at ends of lines, which show"
        )
        sentence += f", and {tokens} no part of the image"
    if lost:
        sentence += f"; where {lost} of the grids lie in the image could not be measured"
    return f"{sentence}."


def _strip(count: int) -> Grid:
    return Grid(np.arange(count, dtype=np.int64)[None], None, np.empty(0, np.int64))


# The order of the tokens, by family


def _tiles(sample: _Sample) -> list[list[Grid]] | None:
    """Layout in which all tiles give equally many tokens, row by row, and an image's tiles are in order."""
    pixels = sample.inputs["pixel_values"]
    tiles = pixels.reshape(-1, *pixels.shape[-3:])
    per_tile, odd = divmod(sum(sample.n_tokens), len(tiles))
    height, width = tiles.shape[-2:]
    rows = isqrt(per_tile * height // width)
    columns = isqrt(per_tile * width // height)
    if odd or rows * columns != per_tile or any(count % per_tile for count in sample.n_tokens):
        return None
    counts = [count // per_tile for count in sample.n_tokens]
    cells = np.arange(max(sample.n_tokens), dtype=np.int64).reshape(-1, rows, columns)
    return [
        [
            Grid(cells[place], _shown(sample, tile, size), np.empty(0, np.int64))
            for place, tile in enumerate(own)
        ]
        for own, size in zip(tiles.split_with_sizes(counts), sample.sizes, strict=True)
    ]


def _merged_patches(sample: _Sample) -> list[list[Grid]] | None:
    """Layout in which each block of patches becomes one token, with the blocks row by row."""
    grids = sample.inputs["image_grid_thw"]
    merge = int(sample.config.vision_config.spatial_merge_size)
    side = int(sample.config.vision_config.patch_size)
    found = []
    patches = sample.inputs["pixel_values"].split_with_sizes(grids.prod(dim=1).tolist())
    for (time, height, width), own, size in zip(grids.tolist(), patches, sample.sizes, strict=True):
        rows, columns = height // merge, width // merge
        if time != 1:
            return None
        blocks = own.reshape(rows, columns, merge, merge, 3, -1, side, side)[..., 0, :, :]
        picture = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * side, width * side)
        tokens = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
        found.append([Grid(tokens, _shown(sample, picture, size), np.empty(0, np.int64))])
    return found


def _any_resolution(sample: _Sample) -> list[list[Grid]] | None:
    """Layout with the whole image, then all tiles together without padding, and a token after each row.

    The model's own packing gives the order of the tokens: it receives coordinates instead of features.
    """
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    vision = sample.config.vision_config
    side = vision.image_size // vision.patch_size
    pinpoints = sample.config.image_grid_pinpoints
    several = len(sample.sizes) > 1 and "batch_num_images" in sample.inputs
    found = []
    for place, (size, image_size) in enumerate(zip(sample.sizes, sample.inputs["image_sizes"], strict=True)):
        n_tiles = 1 if several else image_size_to_num_patches(image_size, pinpoints, vision.image_size)
        tiles = sample.inputs["pixel_values"][place, :n_tiles]
        base = np.arange(side * side, dtype=np.int64).reshape(side, side)
        whole_image = _shown(sample, tiles[0], size)
        shape = (1, 1)
        if n_tiles > 1:
            shape = get_anyres_image_grid_shape(image_size, pinpoints, vision.image_size)
        packed = _pack(sample, _tile_coordinates(n_tiles, shape, side), image_size)
        ends = np.flatnonzero(np.isnan(packed[:, 0]))
        if n_tiles == 1:
            found.append([Grid(base, whole_image, ends)])
            continue
        mosaic = tiles[1:].reshape(*shape, 3, *tiles.shape[-2:]).permute(2, 0, 3, 1, 4)
        mosaic = mosaic.reshape(3, shape[0] * tiles.shape[-2], shape[1] * tiles.shape[-1])
        tokens = np.setdiff1d(np.arange(base.size, len(packed)), ends).reshape(len(ends), -1)
        box = _part(_shown(sample, mosaic, size), packed[tokens], (shape[0] * side, shape[1] * side))
        found.append([Grid(base, whole_image, np.empty(0, np.int64)), Grid(tokens, box, ends)])
    return found


def _tile_coordinates(n_tiles: int, shape: tuple[int, int], side: int) -> torch.Tensor:
    """The x and y in [0, 1] of patch centres, in the whole image and in the mosaic: (n_tiles, side², 2)."""
    rows, columns = shape
    y, x = torch.meshgrid(
        (torch.arange(rows * side, dtype=torch.float64) + 0.5) / (rows * side),
        (torch.arange(columns * side, dtype=torch.float64) + 0.5) / (columns * side),
        indexing="ij",
    )
    tiles = torch.stack([x, y], dim=-1).reshape(rows, side, columns, side, 2).transpose(1, 2)
    tiles = tiles.reshape(rows * columns, side * side, 2)
    return tiles if n_tiles == 1 else torch.cat([tiles[:1], tiles])


def _pack(sample: _Sample, coordinates: torch.Tensor, image_size: torch.Tensor) -> NDArray[np.float64]:
    """Coordinates as packed by the model, (n_tokens, 2); NaN for tokens that the packing adds."""
    options: dict[str, Any] = {
        "image_sizes": image_size[None],
        "image_newline": torch.full((2,), torch.nan, dtype=torch.float64),
    }
    if sample.config.model_type == "llava_onevision":
        options["vision_aspect_ratio"] = sample.config.vision_aspect_ratio
    else:
        options["vision_feature_select_strategy"] = sample.config.vision_feature_select_strategy
    (packed,), _ = sample.model.pack_image_features([coordinates], **options)
    return np.asarray(packed.numpy())


def _part(whole: Box | None, centres: NDArray[np.float64], cells: tuple[int, int]) -> Box | None:
    """The box of a grid within a larger one.

    Args:
        whole: Box of the larger grid.
        centres: (rows, columns, 2): x and y of each cell's centre in the larger grid, in [0, 1].
        cells: Rows and columns of the larger grid.
    """
    if whole is None:
        return None
    left, top, right, bottom = whole
    x, y = _extent(centres[0, :, 0], cells[1]), _extent(centres[:, 0, 1], cells[0])
    width, height = right - left, bottom - top
    return left + x[0] * width, top + y[0] * height, left + x[1] * width, top + y[1] * height


def _extent(centres: NDArray[np.float64], cells: int) -> tuple[float, float]:
    """The start and the end of a range of evenly spaced cells."""
    first, last = float(centres[0]), float(centres[-1])
    half = (last - first) / (len(centres) - 1) / 2 if len(centres) > 1 else 1 / cells / 2
    return first - half, last + half


_FAMILIES: Final[Mapping[str, Callable[[_Sample], list[list[Grid]] | None]]] = MappingProxyType(
    {
        "llava": _tiles,
        "gemma3": _tiles,
        "internvl": _tiles,
        "idefics3": _tiles,
        "smolvlm": _tiles,
        "llava_next": _any_resolution,
        "llava_onevision": _any_resolution,
        "qwen2_vl": _merged_patches,
        "qwen2_5_vl": _merged_patches,
        "qwen3_vl": _merged_patches,
    }
)


# The part of an image that a tile shows


def _picture_of_coordinates(width: int, height: int) -> Image.Image:
    """A picture in which red grows to the right and green downwards; blue is full, unlike in padding."""
    x = np.rint(255 * (np.arange(width) + 0.5) / width)
    y = np.rint(255 * (np.arange(height) + 0.5) / height)
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = x[None, :], y[:, None]
    return Image.fromarray(pixels)


def _shown(sample: _Sample, tile: torch.Tensor, size: tuple[int, int]) -> Box | None:
    """The part of an image that a processed tile (3, H, W) of its picture of coordinates shows.

    It is None if the tile does not show an upright, evenly scaled part.
    """
    colours = _colours(sample.image_processor, tile)
    seen = _inner(colours[2] > _MARK)
    reach = []
    for axis, (channel, side) in enumerate(zip(colours[:2], size, strict=True)):
        n_cells = colours.shape[2 - axis]
        cell = np.broadcast_to(
            (np.arange(n_cells) + 0.5)[None, :] if axis == 0 else (np.arange(n_cells) + 0.5)[:, None],
            channel.shape,
        )
        # Less than 1.5 pixels from the image's edge, resampling lacks the pixels beyond the edge.
        clear = seen & (np.abs(channel - 0.5) < 0.5 - 1.5 / side)
        if clear.sum() < _FEWEST_PIXELS or np.ptp(cell[clear]) == 0:
            return None
        at, where = cell[clear], channel[clear]
        centred = at - at.mean()
        slope = float(centred @ where / (centred @ centred))
        residual = where - where.mean() - slope * centred
        if slope <= 0 or np.sqrt(np.square(residual).mean()) > _RESIDUAL:
            return None
        start = float(where.mean() - slope * at.mean())
        reach.append((start * side, (start + slope * n_cells) * side))
    (left, right), (top, bottom) = reach
    return left, top, right, bottom


def _inner(seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels that are not mixed with padding by resampling; all pixels if none would remain."""
    height, width = seen.shape
    around = np.pad(seen, _MIXED, constant_values=True)
    inner = np.ones_like(seen)
    for row in range(2 * _MIXED + 1):
        for column in range(2 * _MIXED + 1):
            inner &= around[row : row + height, column : column + width]
    return inner if inner.sum() >= _FEWEST_PIXELS else seen


def _colours(image_processor: Any, tile: torch.Tensor) -> NDArray[np.float64]:
    """The colours of a processed tile in [0, 1], with scaling and normalisation undone."""
    values = np.asarray(tile.double().numpy())
    if getattr(image_processor, "do_normalize", False):
        mean, std = (
            np.broadcast_to(np.asarray(value, dtype=np.float64), 3)[:, None, None]
            for value in (image_processor.image_mean, image_processor.image_std)
        )
        values = values * std + mean
    scale = image_processor.rescale_factor if getattr(image_processor, "do_rescale", False) else 1
    return values / (255 * scale)
