"""The representation of a sample: what the target VLM's first layer makes of the image tokens that matter.

Paper (arXiv 2602.11636), section 3, for vision tokens V and instruction tokens U of one sample:

1. p_j = attention of the first language-model layer, averaged over heads and over u in U, for j in V,
   normalised to sum to one;
2. V' = the fewest tokens of V whose share of p exceeds τ (the token that crosses is kept);
3. x = mean over V' of the first layer's output: ``hidden_states[1]`` of the full model, before any norm.

Only the vision tower, the projector, the token embeddings and the first decoder layer are read from the
checkpoint and run. Rows that cannot be represented come back as typed rejections, in place.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from scalselect_assets.method import REPRESENTATION_VERSION
from scalselect_assets.method.attention import (
    AttentionProbe,
    dominant_tokens,
    probing,
    register_probed_attention,
)
from scalselect_assets.method.chat import ChatTemplateError, RenderedChat, render_chat
from scalselect_assets.method.conversation import Conversation
from scalselect_assets.method.families import Family, UnsupportedModelError, family_of
from scalselect_assets.method.images import (
    DEFAULT_MAX_PIXELS,
    ImageTooLargeError,
    UndecodableImageError,
    decode_image,
)
from scalselect_assets.method.quiet import quiet_transformers
from scalselect_assets.method.rejection import Rejection, RejectionReason

DEFAULT_ATTENTION_MASS = 0.9
"""τ of the paper: the share of the instruction's attention that the kept vision tokens must exceed."""

DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
DeviceName: TypeAlias = Literal["auto", "cpu", "cuda"]


class ModelLoadError(RuntimeError):
    """The target model cannot be loaded as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class ChatSample:
    """One row to represent: its conversation and, per image mark, a function that reads the image's bytes."""

    conversation: Conversation
    images: tuple[Callable[[], bytes], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Representation:
    """The representation of one sample and what it was made from.

    Attributes:
        vector: (d,) float32.
        n_tokens: Length of the model's input.
        n_vision_tokens: Image tokens in it.
        n_dominant_tokens: Vision tokens kept, whose mean the vector is.
        n_instruction_tokens: Tokens that are neither vision nor content of an answer.
        vision_attention: Share of the instruction's attention that falls on vision tokens, in [0, 1].
        image_sha256: SHA-256 of each image's bytes, in order.
    """

    vector: NDArray[np.float32]
    n_tokens: int
    n_vision_tokens: int
    n_dominant_tokens: int
    n_instruction_tokens: int
    vision_attention: float
    image_sha256: tuple[str, ...]


Outcome: TypeAlias = Representation | Rejection


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What identifies the representation space; kept beside the embeddings for lineage.

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
    representation_version: str = REPRESENTATION_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(slots=True)
class _Prepared:
    """One sample ready for the model: unpadded tokens with their roles, and the vision tower's inputs."""

    input_ids: torch.Tensor
    vision: torch.Tensor
    instruction: torch.Tensor
    vision_inputs: dict[str, torch.Tensor]
    image_sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class VlmEncoder:
    """A target model cut down to its first language-model layer. Build it with ``load_encoder``."""

    card: ModelCard
    device: torch.device
    _model: torch.nn.Module = field(repr=False)
    _processor: Any = field(repr=False)
    _family: Family = field(repr=False)
    _image_token_id: int = field(repr=False)
    max_pixels: int = DEFAULT_MAX_PIXELS

    def encode(self, samples: Iterable[ChatSample], *, batch_size: int = 8) -> Iterator[Outcome]:
        """Represent samples, one outcome per sample, in input order.

        The result does not depend on ``batch_size``, the order or the padding beyond float rounding. Memory
        is that of one batch.
        """
        remaining = iter(samples)
        while batch := tuple(islice(remaining, batch_size)):
            prepared = [self._prepare(sample) for sample in batch]
            ready = [item for item in prepared if isinstance(item, _Prepared)]
            represented = iter(self._forward(ready) if ready else ())
            for item in prepared:
                yield item if isinstance(item, Rejection) else next(represented)

    def _prepare(self, sample: ChatSample) -> _Prepared | Rejection:
        """Tokens, token roles and pixels of one sample, or why it has none."""
        images, digests = [], []
        for position, read in enumerate(sample.images, start=1):
            try:
                data = read()
                images.append(decode_image(data, self.max_pixels))
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                return Rejection(RejectionReason.MISSING_IMAGE, f"image {position}: {error}")
            except ImageTooLargeError as error:
                return Rejection(RejectionReason.IMAGE_TOO_LARGE, f"image {position}: {error}")
            except UndecodableImageError as error:
                return Rejection(RejectionReason.UNDECODABLE_IMAGE, f"image {position}: {error}")
            digests.append(hashlib.sha256(data).hexdigest())
        try:
            chat = render_chat(self._processor, sample.conversation)
        except ChatTemplateError as error:
            return Rejection(RejectionReason.TEMPLATE_REFUSED, str(error))
        try:
            inputs = self._tokenize(chat, images)
        except ValueError as error:
            return Rejection(RejectionReason.PROCESSOR_REFUSED, f"the model's processor refuses it: {error}")
        return self._with_roles(chat, inputs, tuple(digests))

    def _tokenize(self, chat: RenderedChat, images: list[Any]) -> dict[str, Any]:
        """The processor's outputs for one sample, with the character offsets of every token."""
        bos = self._processor.tokenizer.bos_token
        return dict(
            self._processor(
                text=[chat.text],
                images=[images],
                return_tensors="pt",
                # A template that writes the BOS token itself must not get a second one.
                add_special_tokens=not (bos and chat.text.startswith(bos)),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                # Rows beyond the model's length are rejected with their counts, so no warning is due.
                verbose=False,
            )
        )

    def _with_roles(
        self, chat: RenderedChat, inputs: dict[str, Any], image_sha256: tuple[str, ...]
    ) -> _Prepared | Rejection:
        """Tell vision, instruction and answer tokens apart."""
        input_ids = inputs["input_ids"][0]
        if len(input_ids) > self.card.max_tokens:
            return Rejection(
                RejectionReason.TOO_LONG,
                f"{len(input_ids):,} tokens; the model takes {self.card.max_tokens:,}, and cutting would "
                "lose image tokens: shorten or split the conversation",
            )
        starts, ends = inputs["offset_mapping"][0].unbind(-1)
        (replacements,) = inputs["text_replacement_offsets"]
        answer = torch.zeros_like(input_ids, dtype=torch.bool)
        for begin, end in _expanded_spans(chat.answer_spans, replacements):
            if begin == end:
                continue  # an empty answer has no content that a token around it could carry
            # A token that spans the border belongs to the answer: it carries part of its content.
            answer |= (starts < end) & (ends > begin)
        vision = input_ids == self._image_token_id
        names = self._processor.image_processor.model_input_names
        vision_inputs = {name: inputs[name] for name in names if name in inputs}
        return _Prepared(input_ids, vision, ~vision & ~answer, vision_inputs, image_sha256)

    @torch.inference_mode()
    def _forward(self, batch: Sequence[_Prepared]) -> list[Outcome]:
        """One pass over the vision tower, the projector and the first decoder layer."""
        pad_id = self._processor.tokenizer.pad_token_id or 0
        length = max(len(item.input_ids) for item in batch)
        input_ids = torch.full((len(batch), length), pad_id)
        real, instruction = (torch.zeros(len(batch), length, dtype=torch.bool) for _ in range(2))
        for row, item in enumerate(batch):
            input_ids[row, : len(item.input_ids)] = item.input_ids
            instruction[row, : len(item.input_ids)] = item.instruction
            real[row, : len(item.input_ids)] = True
        vision_inputs = {
            name: torch.cat([item.vision_inputs[name] for item in batch]) for name in batch[0].vision_inputs
        }
        with (
            probing(AttentionProbe(instruction.to(self.device))) as probe,
            _outputs_of(self._family.first_layer(self._model)) as hidden,
        ):
            self._model(
                input_ids=input_ids.to(self.device),
                attention_mask=real.long().to(self.device),
                use_cache=False,
                **{name: self._to_device(value) for name, value in vision_inputs.items()},
            )
        if probe.attention is None:
            raise UnsupportedModelError(
                f"the first layer of {self.card.model} does not use Transformers' attention interface"
            )
        return [self._represent(item, probe.attention[row], hidden[0][row]) for row, item in enumerate(batch)]

    def _represent(self, item: _Prepared, attention: torch.Tensor, hidden: torch.Tensor) -> Outcome:
        """Equations 1 to 3 for one sample; ``attention`` (S,) and ``hidden`` (S, d) may be padded."""
        vision = item.vision.nonzero().squeeze(1).to(self.device)
        on_vision = attention[vision]
        if not torch.isfinite(on_vision).all():
            return Rejection(RejectionReason.NON_FINITE, "the first layer's attention is not finite")
        dominant = dominant_tokens(on_vision, self.card.attention_mass)
        vector = hidden[vision[dominant]].float().mean(0).cpu().numpy()
        if not np.isfinite(vector).all():
            return Rejection(RejectionReason.NON_FINITE, "the first layer's output is not finite")
        return Representation(
            vector=vector,
            n_tokens=len(item.input_ids),
            n_vision_tokens=len(vision),
            n_dominant_tokens=len(dominant),
            n_instruction_tokens=int(item.instruction.sum()),
            vision_attention=float(on_vision.sum()),
            image_sha256=item.image_sha256,
        )

    def _to_device(self, value: torch.Tensor) -> torch.Tensor:
        dtype = next(self._model.parameters()).dtype
        return value.to(self.device, dtype if value.is_floating_point() else None)


@contextmanager
def _outputs_of(layer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The outputs of ``layer`` during the block, one tensor per call."""
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(
        lambda _module, _args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield outputs
    finally:
        handle.remove()


def _expanded_spans(
    spans: Iterable[tuple[int, int]], replacements: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, int]]:
    """Move character spans past the image tokens that the processor multiplied before them."""
    for begin, end in spans:
        gained = 0
        for replacement in replacements:
            if replacement["span"][1] <= begin:
                gained = replacement["new_span"][1] - replacement["span"][1]
        yield begin + gained, end + gained


def resolve_device(device: DeviceName) -> torch.device:
    """The torch device asked for; ``auto`` is CUDA where there is one.

    Raises:
        ModelLoadError: CUDA was asked for and is not available.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device 'cuda' was asked for but torch sees no CUDA device; use 'cpu' or 'auto'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_encoder(
    model: str,
    *,
    revision: str | None = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    attention_mass: float = DEFAULT_ATTENTION_MASS,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> VlmEncoder:
    """Load the parts of a VLM that the representation needs.

    The language model is cut to one layer *before* the weights are read, and the base model without its
    language-modelling head is built, so that the tensors of other layers and of the head are never read.

    Args:
        model: Local folder or Hugging Face hub id of an image-text-to-text model.
        revision: Branch, tag or commit of a hub id.
        device: Where to run.
        dtype: Of weights and activations. It is part of the fingerprint, so it never depends on the machine.
        attention_mass: τ in (0, 1].
        max_pixels: Images with more pixels are rejected.

    Raises:
        ModelLoadError: Not found, not readable, incomplete weights, or the device is missing.
        UnsupportedModelError: Readable, but not a model that this package can represent samples with.
    """
    from transformers import AutoModel, AutoProcessor

    if not 0 < attention_mass <= 1:
        raise ValueError(f"attention mass {attention_mass} is not in (0, 1]; the paper uses 0.9")
    torch_device = resolve_device(device)
    config, family = _supported_config(model, revision)
    config.get_text_config().num_hidden_layers = 1
    # Transformers reports the weights that stay unread; leaving them out is the point.
    with quiet_transformers(keep_bars=not Path(model).is_dir()), _as_model_load_error(model):
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
        base_model, report = AutoModel.from_pretrained(
            model,
            config=config,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation={"text_config": register_probed_attention()},
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(
            f"{model!r} lacks {len(missing)} weights that are needed, among them {missing[0]}; "
            "is the checkpoint complete?"
        )
    _check_processor(model, processor)
    base_model = base_model.eval().requires_grad_(False)
    card = _model_card(model, revision, config, base_model, processor, dtype, attention_mass)
    return VlmEncoder(
        card=card,
        device=torch_device,
        _model=base_model.to(torch_device),
        _processor=processor,
        _family=family,
        _image_token_id=family.image_token_id(config),
        max_pixels=max_pixels,
    )


@contextmanager
def _as_model_load_error(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ImportError) as error:
        raise ModelLoadError(f"cannot load {model!r}: {error}") from error


def _supported_config(model: str, revision: str | None) -> tuple[Any, Family]:
    """The configuration of ``model`` and the facts about its family."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ModelLoadError(f"no folder {model!r}; name a local model folder or a hub id such as 'org/name'")
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise ModelLoadError(f"cannot read the configuration of {model!r}: {error}") from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"{model!r} is not a model that Transformers itself knows: {error}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UnsupportedModelError(
            f"{model!r} is of type {config.model_type!r}, which is not an image-text-to-text model"
        )
    return config, family_of(config)


def _check_processor(model: str, processor: Any) -> None:
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not tokenizer.is_fast:
        raise UnsupportedModelError(f"{model!r} has no fast tokenizer, whose offsets are needed")
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise UnsupportedModelError(f"{model!r} has no chat template; add chat_template.jinja to its files")


def _model_card(
    model: str,
    revision: str | None,
    config: Any,
    base_model: Any,
    processor: Any,
    dtype: DtypeName,
    attention_mass: float,
) -> ModelCard:
    """Hash everything that determines a representation."""
    text_config = config.get_text_config()
    max_tokens = min(processor.tokenizer.model_max_length, text_config.max_position_embeddings)
    hashes: dict[str, Any] = {
        "config_sha256": _sha256_json(_stable_config(config.to_dict())),
        "weights_sha256": weights_sha256(base_model),
        "processor_sha256": _sha256_json(
            [
                processor.to_json_string(),
                # The same settings give other pixels on another backend (Pillow or torchvision).
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
    return ModelCard(
        fingerprint=_sha256_json({**hashes, **settings, "version": REPRESENTATION_VERSION})[:16],
        model=model,
        revision=revision,
        commit=getattr(config, "_commit_hash", None),
        dimension=text_config.hidden_size,
        n_parameters=sum(parameter.numel() for parameter in base_model.parameters()),
        **settings,
        **hashes,
    )


def _stable_config(values: Any) -> Any:
    """A configuration without what says how and by whom it was saved rather than what the model is."""
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
