"""Loading of an encoder from a model folder or hub id, with a self-check that the loaded parts suffice.

The configuration is cut to the parts that affect the first decoder layer *before* the weights are read,
and the base model without its language-modelling head is built, so that no other tensor is ever read. Then
one synthetic sample is represented twice: by the encoder, and by the definition in a plain forward pass with
eager attention. The model is refused if the two results differ.
"""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scalselect_assets.method.representation.attention import register_rows_attention
from scalselect_assets.method.representation.chat import ChatTemplateError, render_chat
from scalselect_assets.method.representation.checkpoint_files import (
    check_config,
    check_folder,
    check_parts,
    unknown_type,
)
from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from scalselect_assets.method.representation.dominance import dominant_tokens
from scalselect_assets.method.representation.dtypes import (
    SELF_CHECK_TOLERANCE,
    DtypeChoice,
    DtypeName,
    automatic_dtype,
    slow_here,
)
from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.method.representation.families import (
    TESTED_FAMILIES,
    UnsupportedModelError,
    image_token_id,
    keep_what_the_first_layer_reads,
)
from scalselect_assets.method.representation.first_layer import FirstLayer, decoder_of
from scalselect_assets.method.representation.image_place import (
    DEFAULT_IMAGE_PLACE,
    ImagePlace,
    effective_place,
)
from scalselect_assets.method.representation.image_size import ImageSize, ask_for
from scalselect_assets.method.representation.images import DEFAULT_MAX_PIXELS
from scalselect_assets.method.representation.model_card import ModelCard, model_card
from scalselect_assets.method.representation.model_files import (
    refuse_files_that_lead_elsewhere,
    refuse_unbounded_template,
)
from scalselect_assets.method.representation.preparation import Prepared, Preparer
from scalselect_assets.method.representation.processors import load_processor
from scalselect_assets.method.representation.quiet import quiet_transformers
from scalselect_assets.method.representation.versions import outdated_library

DEFAULT_ATTENTION_MASS = 0.9
"""τ of the paper: the share of the instruction's attention that the kept vision tokens must exceed."""

DeviceName: TypeAlias = Literal["auto", "cpu", "cuda"]

_LOG = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")

_OWN_SIZE = ImageSize()


class ModelLoadError(RuntimeError):
    """The target model cannot be loaded with these settings; the message says what to change."""


def load_encoder(
    model: str,
    *,
    revision: str | None = None,
    device: DeviceName = "auto",
    dtype: DtypeChoice = "auto",
    attention_mass: float = DEFAULT_ATTENTION_MASS,
    image_place: ImagePlace = DEFAULT_IMAGE_PLACE,
    image_size: ImageSize = _OWN_SIZE,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> VlmEncoder:
    """Load the parts of a VLM that the representation needs.

    Args:
        model: Local folder or Hugging Face hub id of an image-text-to-text model.
        revision: Branch, tag or commit of a hub id; it is resolved once, and all files are of that commit.
        device: The device to run on.
        dtype: Dtype of weights and activations; ``auto`` is bfloat16 for a checkpoint in half precision and
            float32 for others. The dtype is part of the fingerprint, so it never depends on the machine.
        attention_mass: τ in (0, 1].
        image_place: The place of a row's images in the prompt.
        image_size: Bounds on the size that the model's processor scales images to.
        max_pixels: Largest number of pixels of an image; larger images are rejected.

    Raises:
        ModelLoadError: The model is not found, not readable or incomplete, or the device is missing.
        UnsupportedModelError: The model is readable, but this package cannot represent samples with it.
    """
    torch_device = resolve_device(device)
    parts = _load_parts(model, revision, dtype, attention_mass, image_place, image_size)
    if known_slow := slow_here(parts.dtype, torch_device):
        _LOG.warning("%s: %s", model, known_slow)
    preparer = Preparer(
        parts.processor,
        image_token_id=parts.image_token_id,
        max_tokens=parts.card.max_tokens,
        max_pixels=DEFAULT_MAX_PIXELS,
        image_place=parts.card.image_place,
    )
    with quiet_transformers(), _cannot_represent(model):
        base_model = parts.base_model.to(torch_device)
        check = _SelfCheck(parts.processor, preparer, attention_mass)
        expected = check.expected(base_model)
        first_layer = FirstLayer(base_model, preparer.pad_token_id)
        check.compare(expected, first_layer, SELF_CHECK_TOLERANCE[parts.dtype])
    preparer.max_pixels = max_pixels
    return VlmEncoder(parts.card, first_layer, preparer)


def load_card(
    model: str,
    *,
    revision: str | None = None,
    dtype: DtypeChoice = "auto",
    attention_mass: float = DEFAULT_ATTENTION_MASS,
    image_place: ImagePlace = DEFAULT_IMAGE_PLACE,
    image_size: ImageSize = _OWN_SIZE,
) -> ModelCard:
    """The card of a model, equal to the one from `load_encoder`, but without the self-check.

    The arguments are those of `load_encoder`.

    Raises:
        ModelLoadError: The model is not found, not readable or incomplete.
        UnsupportedModelError: The model is readable, but this package cannot represent samples with it.
    """
    return _load_parts(model, revision, dtype, attention_mass, image_place, image_size).card


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """The parts of a model that are read, on the CPU."""

    card: ModelCard
    dtype: DtypeName
    processor: Any
    base_model: Any
    image_token_id: int


def _load_parts(
    model: str,
    revision: str | None,
    dtype: DtypeChoice,
    attention_mass: float,
    image_place: ImagePlace,
    image_size: ImageSize,
) -> _Parts:
    """Read a model; all files of a hub id are of one commit."""
    if not 0 < attention_mass <= 1:
        raise ValueError(f"attention mass {attention_mass} is not in (0, 1]; the paper uses 0.9")
    if outdated := outdated_library():
        raise ModelLoadError(f"cannot load {model!r}: {outdated}")
    folder = Path(model).expanduser()
    source = str(folder) if folder.is_dir() else model
    with _cannot_load(model):
        commit = resolve_commit(source, revision)
    check_folder(source)
    config = _supported_config(source, commit)
    check_config(model, config)
    token_id = image_token_id(config)
    # Transformers warns about the weights that stay unread, which is intended here.
    with quiet_transformers(keep_bars=not folder.is_dir()), _cannot_load(model):
        processor = load_processor(source, commit, config)
        refuse_unbounded_template(model, processor)
        ask_for(processor.image_processor, image_size)
        known_dtype = _own_dtype(source, commit, config) if dtype == "auto" else dtype
        base_model = _load_base_model(source, commit, config, getattr(torch, known_dtype))
        check_parts(model, config, processor, base_model)
        card = model_card(
            model,
            revision,
            commit,
            config,
            base_model,
            processor,
            known_dtype,
            attention_mass,
            effective_place(processor, image_place),
            image_size,
        )
    return _Parts(card, known_dtype, processor, base_model, token_id)


def resolve_device(device: DeviceName) -> torch.device:
    """The requested torch device; ``auto`` is CUDA if a CUDA device is available.

    Raises:
        ModelLoadError: CUDA was requested and is not available.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device 'cuda' was asked for but torch sees no CUDA device; use 'cpu' or 'auto'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def resolve_commit(model: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub id stands for now; None for a local folder.

    Without a connection, or with ``HF_HUB_OFFLINE=1``, it is the commit that the local cache has for the
    revision.

    Args:
        model: Local folder or hub id.
        revision: Branch, tag or commit; None is the default branch.

    Raises:
        ModelLoadError: ``model`` is neither a local folder nor a hub id, or no commit can be found for it.
    """
    if Path(model).is_dir():
        return None
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelLoadError(f"no folder {model!r}; name a local model folder or a hub id such as 'org/name'")
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

    asked = repr(model) if revision is None else f"{model!r} at revision {revision!r}"
    try:
        commit = resolve_revision(model, revision=revision).resolved
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError) as error:
        raise ModelLoadError(
            f"cannot load {asked}: its commit is not known ({error}), and without one the files may be of "
            "several versions. Connect to the hub, name a local folder, or give as revision a commit that is "
            "in the local cache"
        ) from error
    if not _COMMIT.fullmatch(commit):
        raise ModelLoadError(
            f"cannot load {asked}: the local cache names {commit!r} as its commit, which is none. Remove "
            "that cache, or give a commit as revision"
        )
    return commit


@contextmanager
def _cannot_load(model: str) -> Iterator[None]:
    try:
        yield
    except (ModelLoadError, UnsupportedModelError, MemoryError, torch.OutOfMemoryError):
        raise
    # On a damaged folder Transformers, safetensors and tokenizers raise errors of many types.
    except Exception as error:
        raise ModelLoadError(f"cannot load {model!r}: {type(error).__name__}: {error}") from error


@contextmanager
def _cannot_represent(model: str) -> Iterator[None]:
    """Name the model in the errors of its self-check."""
    tested = f"tested families: {', '.join(TESTED_FAMILIES.values())}"
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{model!r} cannot be the target model: {error}; {tested}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # The code of any model in Transformers runs here, on parts that it may not expect.
    except Exception as error:
        raise UnsupportedModelError(
            f"{model!r} cannot be the target model: on a test sample, {type(error).__name__}: {error}; "
            f"{tested}"
        ) from error


def _supported_config(model: str, commit: str | None) -> Any:
    """The configuration of ``model``, if that kind of model can be a target model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        refuse_files_that_lead_elsewhere(model, commit)
        config = AutoConfig.from_pretrained(model, revision=commit, trust_remote_code=False)
    except OSError as error:
        raise ModelLoadError(f"cannot read the configuration of {model!r}: {error}") from error
    except ValueError as error:
        raise unknown_type(model, error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UnsupportedModelError(
            f"{model!r} is of type {config.model_type!r}, which is not an image-text-to-text model"
        )
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"{model!r} is of type {config.model_type!r}, which has no vision tower of its own; tested "
            f"families: {', '.join(TESTED_FAMILIES.values())}"
        )
    return config


def _own_dtype(model: str, commit: str | None, config: Any) -> DtypeName:
    """The dtype to compute in, derived from the checkpoint's own dtype."""
    named = config.dtype or config.get_text_config().dtype
    if named is None:  # the configuration does not name the dtype
        named = _load_base_model(model, commit, config, "auto").get_input_embeddings().weight.dtype
    return automatic_dtype(named)


def _load_base_model(
    model: str, commit: str | None, config: Any, dtype: torch.dtype | Literal["auto"]
) -> Any:
    """The weights that the first layer's output depends on, on the CPU."""
    from transformers import AutoModel

    keep_what_the_first_layer_reads(config)
    base_model, report = AutoModel.from_pretrained(
        model,
        config=config,
        revision=commit,
        dtype=dtype,
        attn_implementation={"text_config": register_rows_attention()},
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(
            f"{model!r} lacks {len(missing)} weights that are needed, among them {missing[0]}; "
            "is the checkpoint complete?"
        )
    return base_model.eval().requires_grad_(False)


class _SelfCheck:
    """A check on one synthetic sample, represented by the definition and by the encoder's parts."""

    def __init__(self, processor: Any, preparer: Preparer, attention_mass: float) -> None:
        """Prepare the sample.

        Raises:
            UnsupportedModelError: The model's own processor or template cannot take a plain sample, or its
                output does not show which tokens belong to the answer.
        """
        self._attention_mass = attention_mass
        question, answer = "What is in the image?", "A pattern."
        conversation = Conversation((Turn("user", (IMAGE, question)), Turn("assistant", (answer,))))
        try:
            chat = render_chat(processor, conversation)
        except ChatTemplateError as error:
            raise UnsupportedModelError(
                f"its chat template refuses one image and one question ({error})"
            ) from error
        picture = _pattern()
        _, texts, *_ = processor.prepare_inputs_layout(text=[chat.text], images=[[picture]])
        if texts != [chat.text]:
            raise UnsupportedModelError(
                "its processor rewrites the prompt after its chat template, so that the answers cannot be "
                "distinguished from the instruction"
            )
        (prepared,) = preparer.prepare(["pattern"], [conversation], lambda _: _png(picture))
        if not isinstance(prepared, Prepared):
            raise UnsupportedModelError(f"it cannot take a plain sample ({prepared.detail})")
        self._sample = prepared.model_input
        other = torch.ones_like(self._sample.input_ids, dtype=torch.bool)
        other[self._sample.vision] = other[self._sample.instruction] = False
        found = processor.tokenizer.decode(self._sample.input_ids[other])
        if found.strip() != answer:
            raise UnsupportedModelError(f"of the answer {answer!r}, {found!r} is found in its prompt")
        self._inputs = {
            name: value
            for name, value in preparer.model_inputs(chat, [picture]).items()
            if isinstance(value, torch.Tensor) and name not in ("offset_mapping", "labels")
        }

    @torch.inference_mode()
    def expected(self, model: Any) -> NDArray[np.float32]:
        """The representation by its definition, in a plain forward pass over two layers with eager attention.

        The first layer stands in for the second, whose weights are not loaded and do not matter.
        """
        decoder = decoder_of(model)
        layers, implementation = decoder.layers, decoder.config._attn_implementation
        parameter = next(model.parameters())
        try:
            decoder.layers = torch.nn.ModuleList([layers[0], layers[0]])
            decoder.config.num_hidden_layers = 2
            decoder.config._attn_implementation = "eager"
            output = model(
                **{
                    name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
                    for name, value in self._inputs.items()
                },
                use_cache=False,
                output_hidden_states=True,
                output_attentions=True,
            )
        finally:
            decoder.layers = layers
            decoder.config.num_hidden_layers = 1
            decoder.config._attn_implementation = implementation
        attention = output.attentions[0][0].float().mean(0)[self._sample.instruction][:, self._sample.vision]
        dominant = dominant_tokens(attention.mean(0), self._attention_mass)
        states = output.hidden_states[1][0][self._sample.vision].float()
        return np.asarray(states[dominant].mean(0).cpu().numpy())

    def compare(self, expected: NDArray[np.float32], first_layer: FirstLayer, tolerance: float) -> None:
        """Compare the result of the encoder's parts with the definition's.

        Raises:
            UnsupportedModelError: The results differ by more than ``tolerance`` of the largest component.
        """
        features = first_layer.image_features(self._sample.images)
        (state,) = first_layer.represent([self._sample], [features], self._attention_mass)
        error = float(np.abs(state.vector - expected).max() / np.abs(expected).max())
        if not error <= tolerance:
            raise UnsupportedModelError(
                "it cannot be represented from its first layer alone in the way that holds for other models: "
                f"on a test sample the result is off by {error:.1%} (rounding is at most {tolerance:.1%})"
            )


def _pattern() -> Image.Image:
    """A test picture: no two parts of it are the same."""
    ramp = np.arange(56, dtype=np.float64) / 56
    waves = [np.sin(7 * (phase + 1) * np.outer(ramp, 1 + ramp) + phase) for phase in range(3)]
    return Image.fromarray((127.5 * (1 + np.stack(waves, axis=-1))).astype(np.uint8))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
