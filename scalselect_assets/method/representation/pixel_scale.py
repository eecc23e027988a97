"""Pixels stay bytes up to the model's device, which quarters the data between processes and to a GPU.

The last steps of an image processor scale bytes to [0, 1] and normalise each channel. If it does nothing else
to the bytes, these steps are switched off and the model's device does them in float32. A test decides this,
not a list of families: the processor's own result for some pictures has to agree.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

LEFT_OUT: Final = {"do_rescale": False, "do_normalize": False}
"""Options that make an image processor return bytes."""

_SIZES: Final = ((56, 56), (90, 30), (30, 100), (420, 300))  # of test pictures: cropped, padded or tiled
_TOLERANCE: Final = 1e-5  # largest difference in a normalised value


@dataclass(frozen=True, slots=True)
class PixelScale:
    """The last steps of an image processor: value = (byte · factor - mean) / deviation.

    Attributes:
        factor: Factor on every byte.
        mean: Mean of each channel, subtracted after the multiplication.
        deviation: Deviation of each channel, the divisor of the last step.
    """

    factor: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def applied(self, pixels: torch.Tensor) -> torch.Tensor:
        """The float32 values of bytes of shape (..., 3, H, W) or (patches, 3 · values)."""
        mean, deviation = _channels(self, pixels.device)
        by_channel = pixels.view(len(pixels), len(self.mean), -1, 1) if pixels.ndim == 2 else pixels
        values = by_channel.float().mul_(self.factor).sub_(mean).div_(deviation)
        return values.view(pixels.shape)


@lru_cache(maxsize=8)
def _channels(scale: PixelScale, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation on the device. They are cached there, since each copy would wait for the device."""
    mean, deviation = (
        torch.tensor(values, device=device)[:, None, None] for values in (scale.mean, scale.deviation)
    )
    return mean, deviation


def pixel_scale(image_processor: Any) -> PixelScale | None:
    """The scale of a processor, or None if bytes and this scale do not give the processor's own values."""
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
    """Pixels as bytes, if the processor returned byte values in another dtype; anything else unchanged."""
    if not isinstance(pixels, torch.Tensor) or pixels.dtype == torch.uint8:
        return pixels
    whole = pixels.to(torch.uint8)
    return whole if torch.equal(whole.to(pixels.dtype), pixels) else pixels


def _agrees(image_processor: Any, scale: PixelScale, pictures: list[Image.Image]) -> bool:
    """Whether doing the processor's last steps here gives the same values as the processor does."""
    try:
        expected = dict(image_processor(pictures, return_tensors="pt"))
        found = dict(image_processor(pictures, return_tensors="pt", **LEFT_OUT))
    except (ValueError, TypeError, KeyError):
        return False  # the processor refuses the options or these pictures
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
    """A picture of noise: no two of its pixels are the same."""
    pixels = np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
