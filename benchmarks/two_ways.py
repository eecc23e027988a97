"""The two ways to represent samples that are compared: the whole model with eager attention, and ours."""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from benchmarks.representation_model import PROMPTS
from benchmarks.representation_pool import ImageFolder
from scalselect_assets.method.representation.conversation import IMAGE, Conversation
from scalselect_assets.method.representation.dtypes import DtypeName
from scalselect_assets.method.representation.encoder import ChatSample, Representation, VlmEncoder
from scalselect_assets.method.representation.loading import (
    DEFAULT_ATTENTION_MASS,
    DeviceName,
    load_encoder,
    resolve_device,
)
from scalselect_assets.method.representation.processors import load_processor
from scalselect_assets.method.representation.quiet import quiet_transformers

Matrix = NDArray[np.float32]
OURS: Final = "ours"
STRAIGHTFORWARD: Final = "whole model, eager"


class Straightforward:
    """The whole model, all attentions and hidden states, one sample at a time."""

    def __init__(self, model: Any, folder: Path) -> None:
        """From a model and the folder of its processor."""
        self._model: Any = model.eval()
        self._processor = load_processor(str(folder), None, model.config)
        self._prompt = PROMPTS[model.config.model_type]

    @classmethod
    def loaded(cls, folder: Path, device: torch.device, dtype: DtypeName) -> "Straightforward":
        """Load every weight."""
        with quiet_transformers():
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, attn_implementation="eager", dtype=getattr(torch, dtype)
            )
        return cls(model.to(device), folder)

    @classmethod
    def made(cls, folder: Path, layers: int, device: torch.device, dtype: DtypeName) -> "Straightforward":
        """Make the model on the device with random weights, which are as fast as any."""
        config = transformers.AutoConfig.from_pretrained(folder)
        config.get_text_config().num_hidden_layers = layers
        if getattr(config.get_text_config(), "layer_types", None):
            config.get_text_config().layer_types = ["full_attention"] * layers
        with quiet_transformers(), device:
            model = transformers.AutoModelForImageTextToText.from_config(
                config, attn_implementation="eager", dtype=getattr(torch, dtype)
            )
        return cls(model, folder)

    def represent(self, samples: Iterable[ChatSample], read_image: ImageFolder) -> Matrix:
        """(n, d)."""
        return np.stack([self._represent(sample, read_image) for sample in samples])

    @torch.inference_mode()
    def _represent(self, sample: ChatSample, read_image: ImageFolder) -> Matrix:
        (reference,) = sample.images
        image = Image.open(io.BytesIO(read_image(reference))).convert("RGB")
        text = self._processor.apply_chat_template(_messages(sample.conversation), tokenize=False)
        inputs = self._processor(
            text=[text],
            images=[[image]],
            return_tensors="pt",
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
        )
        starts, ends = inputs.pop("offset_mapping")[0].unbind(-1)
        vision = inputs["input_ids"][0] == self._model.config.image_token_id
        token = self._prompt.image_mark
        expanded = text.replace(token, token * int(vision.sum()))
        answer = torch.zeros_like(vision)
        for match in re.finditer(self._prompt.answer, expanded, re.DOTALL):
            begin, end = match.span(1)
            answer |= (starts < end) & (ends > begin)
        instruction = ~vision & ~answer

        parameter = next(self._model.parameters())
        output = self._model(
            **{
                name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            },
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
        )
        share = output.attentions[0][0].float().mean(0).cpu()[instruction][:, vision].double().mean(0)
        order = share.argsort(descending=True, stable=True)
        reached = (share[order] / share.sum()).cumsum(0)
        dominant = order[: int((reached <= DEFAULT_ATTENTION_MASS).sum()) + 1]
        states = output.hidden_states[1][0].cpu()[vision].float()
        return np.asarray(states[dominant].mean(0).numpy())


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]


@dataclass(frozen=True, slots=True)
class How:
    """Everything that both ways and all measurements share."""

    folder: Path
    images: ImageFolder
    device: DeviceName
    dtype: DtypeName
    batch_tokens: int
    workers: int
    baseline_samples: int
    repeats: int

    def straightforward(self) -> Straightforward:
        """Loaded."""
        return Straightforward.loaded(self.folder, resolve_device(self.device), self.dtype)

    def encoder(self) -> VlmEncoder:
        """Loaded."""
        return load_encoder(str(self.folder), device=self.device, dtype=self.dtype)

    def encode(self, encoder: VlmEncoder, samples: Sequence[ChatSample]) -> list[Representation]:
        """Ours, all samples.

        Raises:
            RuntimeError: A generated sample was rejected.
        """
        outcomes = encoder.encode(samples, self.images, batch_tokens=self.batch_tokens, workers=self.workers)
        found = [outcome for outcome in outcomes if isinstance(outcome, Representation)]
        if len(found) < len(outcomes):
            rejected = next(outcome for outcome in outcomes if not isinstance(outcome, Representation))
            raise RuntimeError(
                f"{len(outcomes) - len(found)} of {len(outcomes)} samples rejected: {rejected}"
            )
        return found

    def synchronise(self) -> None:
        """Wait for the device."""
        if resolve_device(self.device).type == "cuda":
            torch.cuda.synchronize()
