"""The facts that differ between model families; everything else in the package is the same for all.

There is one mechanism for every image-text-to-text model of Transformers (``method.first_layer``). The
families that are tested against their whole model are named here. Any other family is tried in the same way,
and is refused if the self-check at load finds that the mechanism does not hold for it.
"""

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

TESTED_FAMILIES: Final = MappingProxyType(
    {
        "llava": "LLaVA-1.5",
        "llava_next": "LLaVA-NeXT",
        "llava_onevision": "LLaVA-OneVision",
        "qwen2_vl": "Qwen2-VL",
        "qwen2_5_vl": "Qwen2.5-VL",
        "qwen3_vl": "Qwen3-VL",
        "internvl": "InternVL",
        "idefics3": "Idefics3",
        "smolvlm": "SmolVLM",
        "gemma3": "Gemma 3",
    }
)
"""The common name of each family, by the ``model_type`` of its Transformers configuration."""


_TOWERS_IN_A_ROW: Final = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})
"""Families whose vision tower takes all images' patches as one sequence and reads, in each layer, where each
image ends."""


class UnsupportedModelError(ValueError):
    """The model cannot be the target model here; the message says why and what to do."""


def image_token_id(config: Any) -> int:
    """The input id whose tokens carry image features.

    Raises:
        UnsupportedModelError: The configuration names no such id.
    """
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} name no image token in their configuration, so that their "
            f"vision tokens cannot be distinguished; tested families: {', '.join(TESTED_FAMILIES.values())}"
        )
    return int(token)


def keep_what_the_first_layer_reads(config: Any) -> None:
    """Cut a configuration, in place, to the parts that affect the first decoder layer's output.

    The weights of the parts that are cut away are never read. Besides the other decoder layers, these are:

    * in LLaVA and similar models, the vision tower's layers after the one whose output is projected
      (``vision_feature_layer``, usually the last but one);
    * in Qwen3-VL, the DeepStack features: they are added *after* the first layers, while ``hidden_states[1]``
      is the first layer's own output, before that addition.
    """
    config.get_text_config().num_hidden_layers = 1
    tower = config.vision_config
    chosen = getattr(config, "vision_feature_layer", None)
    if isinstance(chosen, int) and chosen < -1:
        tower.num_hidden_layers += chosen + 1
        config.vision_feature_layer = -1
    if getattr(tower, "deepstack_visual_indexes", None):
        tower.deepstack_visual_indexes = []


def known_on_the_host(config: Any, inputs: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Inputs of the vision tower that the model would otherwise read back from a GPU, waiting in each layer.

    Args:
        config: Configuration of the model.
        inputs: The processor's outputs for the images, on the host.

    Returns:
        Further inputs of ``get_image_features``, which stay on the host.
    """
    if config.model_type not in _TOWERS_IN_A_ROW:
        return {}
    import torch  # the rest of this module is imported on machines without torch

    grids = inputs["image_grid_thw"]
    n_patches = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
    return {"image_cu_seqlens": torch.nn.functional.pad(n_patches.cumsum(0, dtype=torch.int32), (1, 0))}
