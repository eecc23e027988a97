"""The bounds on image size that a selection may set on the model's own image processor.

Trainers bound the size of images, and the bound changes the pixels that the model sees. Each family's
processor has its own bounds; a bound that the processor does not have is refused.
Importing this module imports no torch.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Bounds on the size that images are scaled to; None keeps the processor's own bound.

    Attributes:
        image_size: Pixels of the longest side (Idefics3, SmolVLM).
        min_pixels: Minimum number of pixels of the image (Qwen-VL and similar models).
        max_pixels: Maximum number of pixels of the image (Qwen-VL and similar models).
        max_tiles: Maximum number of tiles that an image is cut into (InternVL).

    Raises:
        ValueError: A bound is below 1, or the lower one is above the upper one.
    """

    image_size: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.asked().items():
            if value < 1:
                raise ValueError(
                    f"Got {name} {value}; allowed is 1 or more. It is a number of pixels or tiles."
                )
        _require_order(self.min_pixels, self.max_pixels)

    def asked(self) -> dict[str, int]:
        """The bounds that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def ask_for(image_processor: Any, wanted: ImageSize) -> None:
    """Set the bounds of an image processor, in place.

    Args:
        image_processor: A Transformers image processor.
        wanted: The bounds to set.

    Raises:
        UnsupportedModelError: The processor does not have one of the bounds, or the wanted upper bound is
            below its own lower bound, or the wanted lower bound is above its own upper bound.
    """
    from scalselect_assets.method.representation.families import UnsupportedModelError  # imports torch

    known = _known(image_processor)
    if unknown := sorted(set(wanted.asked()) - known):
        raise UnsupportedModelError(
            f"the model's image processor ({type(image_processor).__name__}) does not know "
            f"{', '.join(unknown)}; it knows {', '.join(sorted(known)) or 'no such bound'}. Leave the others "
            "out"
        )
    size = dict(image_processor.size or {})
    if wanted.min_pixels is not None:
        size["shortest_edge"] = wanted.min_pixels  # despite its name, a number of pixels
    if wanted.max_pixels is not None:
        size["longest_edge"] = wanted.max_pixels
    if wanted.image_size is not None:
        size["longest_edge"] = wanted.image_size
    if wanted.min_pixels is not None or wanted.max_pixels is not None:
        try:
            _require_order(size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            raise UnsupportedModelError(f"{error} One of the two is the model's own; set both.") from error
    if size != dict(image_processor.size or {}):
        image_processor.size = type(image_processor.size)(**size)
    if wanted.max_tiles is not None:
        image_processor.max_patches = wanted.max_tiles


def _known(image_processor: Any) -> set[str]:
    """The bounds that an image processor takes."""
    arguments = getattr(type(image_processor).valid_kwargs, "__annotations__", {})
    sides = {name for name, value in dict(image_processor.size or {}).items() if value is not None}
    known = set()
    if "max_pixels" in arguments and sides == {"shortest_edge", "longest_edge"}:
        known |= {"min_pixels", "max_pixels"}
    if sides == {"longest_edge"}:
        known.add("image_size")
    if "max_patches" in arguments:
        known.add("max_tiles")
    return known


def _require_order(least: int | None, most: int | None) -> None:
    if least is not None and most is not None and least > most:
        raise ValueError(
            f"Got min_pixels {least} above max_pixels {most}. Raise max_pixels or lower min_pixels."
        )
