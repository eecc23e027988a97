"""The identity of a representation space: a hash of the model and of all settings that affect a vector."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from scalselect_assets.method import REPRESENTATION_VERSION
from scalselect_assets.method.representation.image_place import EffectivePlace
from scalselect_assets.method.representation.image_size import ImageSize


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The identity of the representation space. It is stored beside the embeddings for lineage.

    ``fingerprint`` covers everything that determines a representation and nothing else: the same weights
    under another path are the same model, and the device is not part of it.
    """

    fingerprint: str
    model: str
    revision: str | None
    commit: str | None
    model_type: str
    dtype: str
    attention_mass: float
    max_tokens: int
    dimension: int
    n_parameters: int
    config_sha256: str
    weights_sha256: str
    processor_sha256: str
    image_place: EffectivePlace = "first"
    image_size: dict[str, int] = field(default_factory=dict)
    representation_version: str = REPRESENTATION_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def model_card(
    model: str,
    revision: str | None,
    commit: str | None,
    config: Any,
    base_model: Any,
    processor: Any,
    dtype: str,
    attention_mass: float,
    image_place: EffectivePlace,
    image_size: ImageSize,
) -> ModelCard:
    """Hash everything that determines a representation.

    Args:
        model: The model folder or hub id that the user gave.
        revision: The revision that the user gave.
        commit: The commit at which a hub id was read; None for a local folder.
        config: The Transformers configuration that the base model was built with.
        base_model: The loaded parts of the model.
        processor: The model's processor; the size bounds are already set on its image processor.
        dtype: Dtype of weights and activations.
        attention_mass: τ.
        image_place: The place of images in the model's prompts.
        image_size: The bounds that were set. The processor's settings already include their effect.
    """
    text_config = config.get_text_config()
    max_tokens = min(processor.tokenizer.model_max_length, text_config.max_position_embeddings)
    hashes: dict[str, Any] = {
        "config_sha256": _sha256_json(_stable_config(config.to_dict())),
        "weights_sha256": weights_sha256(base_model),
        "processor_sha256": _sha256_json(
            [
                processor.to_json_string(),
                # With the same settings, Pillow and torchvision give different pixels.
                type(processor.image_processor).__name__,
                processor.tokenizer.special_tokens_map,
                processor.tokenizer.backend_tokenizer.to_str(),
                processor.chat_template or processor.tokenizer.chat_template,
            ]
        ),
    }
    settings: dict[str, Any] = {
        "model_type": config.model_type,
        "dtype": dtype,
        "attention_mass": attention_mass,
        "max_tokens": max_tokens,
    }
    # Older fingerprints have no image place: images always stayed where they were written.
    place = {"image_place": image_place} if image_place == "first" else {}
    return ModelCard(
        fingerprint=_sha256_json({**hashes, **settings, **place, "version": REPRESENTATION_VERSION})[:16],
        model=model,
        revision=revision,
        commit=commit,
        image_place=image_place,
        image_size=image_size.asked(),
        dimension=text_config.hidden_size,
        n_parameters=sum(parameter.numel() for parameter in base_model.parameters()),
        **settings,
        **hashes,
    )


def _stable_config(values: Any) -> Any:
    """A configuration without the entries that record only how and by whom it was saved."""
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
    if isinstance(values, dict):
        return {key: _stable_config(value) for key, value in values.items() if key not in volatile}
    return values


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of the model, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _sha256_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
