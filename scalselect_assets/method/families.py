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
        vision_towers: ``model_type`` of the vision towers that it is known to work with.
    """

    name: str
    image_token_id: Callable[[Any], int]
    first_layer: Callable[[Any], Any]
    vision_towers: frozenset[str]


FAMILIES = {
    "llava": Family(
        name="LLaVA-1.5",
        image_token_id=lambda config: config.image_token_id,
        first_layer=lambda model: model.get_decoder().layers[0],
        # Pixtral is a LLaVA by name, with images of varying size and tokens between their rows.
        vision_towers=frozenset({"clip_vision_model", "siglip_vision_model"}),
    ),
}
"""By ``model_type`` of the Transformers configuration."""


def family_of(config: Any) -> Family:
    """The declared facts for the model of a Transformers configuration.

    Raises:
        UnsupportedModelError: Nothing is declared for its type, or not for its vision tower.
    """
    known = ", ".join(f"{family.name} ({key})" for key, family in sorted(FAMILIES.items()))
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} are not supported yet; supported: {known}"
        )
    if (tower := config.vision_config.model_type) not in family.vision_towers:
        raise UnsupportedModelError(
            f"{family.name} models with a vision tower of type {tower!r} are not supported yet; supported "
            f"towers: {', '.join(sorted(family.vision_towers))}"
        )
    return family
