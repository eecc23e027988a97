"""Pixels as bytes until they are where the model is: a quarter of what passes between processes and to a GPU.

An image processor ends with scaling bytes to [0, 1] and normalising each channel. Where that is all that it
does to the bytes, it is asked to leave it out, and the model's device does the same in float32. Whether it is
all is not looked up by family: the processor's own result for some pictures decides.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

LEFT_OUT: Final = {"do_rescale": False, "do_normalize": False}
"""Options of an image processor that gives bytes."""

_SIZES: Final = ((56, 56), (90, 30), (30, 100), (420, 300))  # of pictures that are cropped, padded or tiled
_TOLERANCE: Final = 1e-5  # of a normalised value


@dataclass(frozen=True, slots=True)
class PixelScale:
    """What an image processor does to bytes at its end.

    Attributes:
        factor: What they are multiplied by.
        mean: Of each channel, what is subtracted then.
        deviation: Of each channel, what is divided by last.
    """

    factor: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def applied(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 values of bytes as (..., 3, H, W), or as (patches, 3 · values)."""
        mean, deviation = _channels(self, pixels.device)
        by_channel = pixels.view(len(pixels), len(self.mean), -1, 1) if pixels.ndim == 2 else pixels
        values = by_channel.float().mul_(self.factor).sub_(mean).div_(deviation)
        return values.view(pixels.shape)


@lru_cache(maxsize=8)
def _channels(scale: PixelScale, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation on the device, where they stay: copying them would wait for it."""
    mean, deviation = (
        torch.tensor(values, device=device)[:, None, None] for values in (scale.mean, scale.deviation)
    )
    return mean, deviation


def pixel_scale(image_processor: Any) -> PixelScale | None:
    """The scale of a processor, if bytes and this scale give what the processor gives; else None."""
    if not all(getattr(image_processor, step, False) for step in LEFT_OUT):
        return None
    mean, deviation = (
        np.ravel(values).tolist() for values in (image_processor.image_mean, image_processor.image_std)
    )
    if not len(mean) == len(deviation) == 3:
        return None
    scale = PixelScale(float(image_processor.rescale_factor), tuple(mean), tuple(deviation))
    pictures = [_picture(*size) for size in _SIZES]
    groups = [*([picture] for picture in pictures), pictures]
    return scale if all(_agrees(image_processor, scale, group) for group in groups) else None


def as_bytes(pixels: Any) -> Any:
    """Bytes that a processor gives as other numbers, as bytes; anything else as it is."""
    if not isinstance(pixels, torch.Tensor) or pixels.dtype == torch.uint8:
        return pixels
    whole = pixels.to(torch.uint8)
    return whole if torch.equal(whole.to(pixels.dtype), pixels) else pixels


def _agrees(image_processor: Any, scale: PixelScale, pictures: list[Image.Image]) -> bool:
    """Whether the processor gives the same with its last steps left out and done here."""
    try:
        expected = dict(image_processor(pictures, return_tensors="pt"))
        found = dict(image_processor(pictures, return_tensors="pt", **LEFT_OUT))
    except (ValueError, TypeError, KeyError):
        return False  # it does not take the options, or not these pictures
    pixels, values = as_bytes(found.get("pixel_values")), expected.get("pixel_values")
    return (
        isinstance(pixels, torch.Tensor)
        and isinstance(values, torch.Tensor)
        and pixels.dtype == torch.uint8
        and pixels.shape == values.shape
        and (pixels.ndim == 2 or pixels.shape[-3] == len(scale.mean))
        and found.keys() == expected.keys()
        and torch.allclose(scale.applied(pixels), values.float(), atol=_TOLERANCE, rtol=_TOLERANCE)
    )


def _picture(width: int, height: int) -> Image.Image:
    """Noise: no two pixels of it are the same."""
    pixels = np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
