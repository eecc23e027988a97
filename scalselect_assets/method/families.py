"""The facts that differ between model families; everything else in the package is the same for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class UnsupportedModelError(ValueError):
    """The model cannot be the target model here; the message says why and which ones can."""


@dataclass(frozen=True, slots=True)
class Family:
    """What has to be known about one family of Transformers models.

    Attributes:
        name: What people call it.
        image_token_id: Of a model's configuration: the input id whose tokens carry image features.
        first_layer: Of a loaded base model: the first decoder layer of its language model.
    """

    name: str
    image_token_id: Callable[[Any], int]
    first_layer: Callable[[Any], Any]


FAMILIES = {
    "llava": Family(
        name="LLaVA-1.5",
        image_token_id=lambda config: config.image_token_id,
        first_layer=lambda model: model.get_decoder().layers[0],
    ),
}
"""By ``model_type`` of the Transformers configuration."""


def family_of(model_type: str) -> Family:
    """The declared facts for ``model_type``.

    Raises:
        UnsupportedModelError: Nothing is declared for it.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(f"{family.name} ({key})" for key, family in sorted(FAMILIES.items()))
        raise UnsupportedModelError(
            f"models of type {model_type!r} are not supported yet; supported: {known}"
        ) from None
