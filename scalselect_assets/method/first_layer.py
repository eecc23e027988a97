"""What the method runs of a VLM: the vision tower with its projector, and the first decoder layer in part.

The base model's own ``forward`` still does all that differs between families (where image features go, which
positions and masks they get); its only decoder layer is replaced by one that notes what it is given. From
there the real first layer is run on the tokens of all samples end to end, without padding, and no further
than needed: queries, keys and values for every token, then attention, output projection and MLP for the
dominant vision tokens alone, since nothing else enters the representation.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalselect_assets.method.attention import AtAttention, attend, dominant_tokens, instruction_attention
from scalselect_assets.method.families import UnsupportedModelError
from scalselect_assets.method.kernels import without_costs_per_shape


@dataclass(frozen=True, slots=True, eq=False)
class VisionInput:
    """One image, or the images of one sample where their processing cannot be told apart.

    Attributes:
        key: Equal for equal images that are processed equally.
        inputs: What the processor made of it, by the names that the model's ``get_image_features`` takes.
        n_tokens: Vision tokens that it fills.
    """

    key: str
    inputs: dict[str, torch.Tensor]
    n_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """One sample as the model reads it.

    Attributes:
        input_ids: (S,) int64.
        token_inputs: Further inputs with one value per token, each (S,).
        vision: (v,) int64 positions of the vision tokens.
        instruction: (u,) int64 positions of tokens that are neither vision nor content of an answer.
        images: What fills the vision tokens, in order.
    """

    input_ids: torch.Tensor
    token_inputs: dict[str, torch.Tensor]
    vision: torch.Tensor
    instruction: torch.Tensor
    images: tuple[VisionInput, ...]

    def __len__(self) -> int:
        """Tokens."""
        return len(self.input_ids)


@dataclass(frozen=True, slots=True, eq=False)
class FirstLayerState:
    """What the first layer says of one sample.

    Attributes:
        vector: (d,) float32: the mean output over the dominant vision tokens.
        n_dominant_tokens: How many those are.
        vision_attention: Share of the instruction's attention that falls on vision tokens.
        attention: (v,) float32: the part of that share which each vision token receives, in their order.
        dominant: (n_dominant_tokens,) int64: which of the v vision tokens are dominant, ascending.
    """

    vector: NDArray[np.float32]
    n_dominant_tokens: int
    vision_attention: float
    attention: NDArray[np.float32]
    dominant: NDArray[np.int64]


class FeatureCountError(ValueError):
    """The model's vision part and its processor disagree about an image."""


def decoder_of(model: Any) -> Any:
    """The language model of a base model, which has decoder layers.

    Raises:
        UnsupportedModelError: It has none, or not in a list.
    """
    decoder = model.get_decoder()
    if not len(getattr(decoder, "layers", ())):
        raise UnsupportedModelError(f"{type(decoder).__name__} has no list of decoder layers")
    return decoder


class FirstLayer:
    """The parts of a base model that the representation needs. Takes the model over: it is changed.

    Attributes:
        model: The base model without its decoder layers: its configuration and its vision part.
        device: Where it is.
        dtype: Of its weights and activations.
    """

    def __init__(self, model: Any, pad_token_id: int) -> None:
        """Take the first decoder layer out of ``model``.

        Args:
            model: A Transformers base model (without a head) with at least one decoder layer, whose text
                model uses the attention of ``register_rows_attention``.
            pad_token_id: Any valid token; what it stands for is never used.

        Raises:
            UnsupportedModelError: Its decoder or its first layer is not built in the usual way.
        """
        decoder = decoder_of(model)
        layer = decoder.layers[0]
        self.model, self._layer, self._pad = model, layer, pad_token_id
        self._tail = _AfterAttention(layer)
        self._recorder = _Recorder(layer)
        decoder.layers = torch.nn.ModuleList([self._recorder])
        if isinstance(getattr(decoder, "norm", None), torch.nn.Module):
            decoder.norm = torch.nn.Identity()  # whose result nobody reads
        embedding = model.get_input_embeddings().weight
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        self._features_are_tensor = False

    @torch.inference_mode()
    @without_costs_per_shape()
    def image_features(self, images: Sequence[VisionInput]) -> list[torch.Tensor]:
        """What the vision tower and the projector make of images, in one pass.

        Returns:
            Per image (n_tokens, d) on the model's device.

        Raises:
            FeatureCountError: The model makes another number of features of an image than the processor has
                put tokens into the prompt for.
        """
        output = self.model.get_image_features(
            **{
                name: self._to_device(value) for name, value in self._joined(images, images[0].inputs).items()
            },
            return_dict=True,
        )
        pooled = output.pooler_output
        self._features_are_tensor = isinstance(pooled, torch.Tensor)
        parts = [pooled] if self._features_are_tensor else list(pooled)
        flat = [part.reshape(-1, part.shape[-1]) for part in parts]
        counts = [image.n_tokens for image in images]
        if sum(map(len, flat)) != sum(counts) or (
            len(flat) == len(counts) and not self._features_are_tensor and list(map(len, flat)) != counts
        ):
            raise FeatureCountError(
                f"the model makes {sum(map(len, flat)):,} features where its processor has put "
                f"{sum(counts):,} image tokens"
            )
        return list(torch.cat(flat).split_with_sizes(counts))

    @torch.inference_mode()
    @without_costs_per_shape()
    def represent(
        self, samples: Sequence[ModelInput], features: Sequence[Sequence[torch.Tensor]], attention_mass: float
    ) -> list[FirstLayerState]:
        """Equations 1 to 3 of the paper for some samples at once.

        Args:
            samples: What to represent.
            features: Per sample what ``image_features`` returned for its images.
            attention_mass: τ.

        Returns:
            One state per sample; one that is not finite has NaN in its vector.
        """
        hidden, layer_inputs = self._layer_inputs(samples, features)
        lengths = [len(sample) for sample in samples]
        packed = {name: _packed(value, lengths) for name, value in layer_inputs.items()}
        tokens = _packed(hidden, lengths)
        at, mask = self._run_to_attention(tokens, packed), layer_inputs["attention_mask"]
        heads = list(
            zip(*(x[0].split_with_sizes(lengths, dim=1) for x in (at.query, at.key, at.value)), strict=True)
        )
        on_vision = [
            instruction_attention(query, key, mask, place, self._rows(sample.instruction), at.scaling)[
                self._rows(sample.vision)
            ]
            for place, (sample, (query, key, _)) in enumerate(zip(samples, heads, strict=True))
        ]
        # One wait for the device, not one per sample.
        shares = torch.cat(on_vision).cpu().split_with_sizes([len(sample.vision) for sample in samples])
        places = [dominant_tokens(share, attention_mass).sort().values for share in shares]
        dominant = [sample.vision[kept] for sample, kept in zip(samples, places, strict=True)]
        attended = [
            attend(query, key, value, mask, place, self._rows(kept), at.scaling)
            for place, ((query, key, value), kept) in enumerate(zip(heads, dominant, strict=True))
        ]
        starts = accumulate(lengths[:-1], initial=0)
        kept_tokens = tokens[
            :, self._rows(torch.cat([start + kept for start, kept in zip(starts, dominant, strict=True)]))
        ]
        counts = [len(kept) for kept in dominant]
        output = self._tail(kept_tokens, torch.cat(attended)[None], counts, packed)
        return [
            FirstLayerState(vector, len(kept), float(share.sum()), share.numpy(), kept.numpy())
            for vector, share, kept in zip(
                _means(output[0], counts).cpu().numpy(), shares, places, strict=True
            )
        ]

    def _layer_inputs(
        self, samples: Sequence[ModelInput], features: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the model gives its first layer: (B, S, d) states, padded on the right, and the rest."""
        length = max(len(sample) for sample in samples)
        ids = torch.full((len(samples), length), self._pad)
        real = torch.zeros(len(samples), length, dtype=torch.int64)
        token_inputs = {
            name: torch.zeros(len(samples), length, dtype=value.dtype)
            for name, value in samples[0].token_inputs.items()
        }
        for row, sample in enumerate(samples):
            ids[row, : len(sample)] = sample.input_ids
            real[row, : len(sample)] = 1
            for name, value in sample.token_inputs.items():
                token_inputs[name][row, : len(sample)] = value
        flat = torch.cat([part for parts in features for part in parts])
        images = [image for sample in samples for image in sample.images]
        # Sizes and grids decide the positions of image tokens; the pixels have been used.
        names = [name for name in images[0].inputs if not name.startswith("pixel_")]
        about_images = self._joined(images, names)
        self.model(
            **{
                name: self._to_device(value)
                for name, value in {
                    "input_ids": ids,
                    "attention_mask": real,
                    **token_inputs,
                    **about_images,
                }.items()
            },
            mm_encoder_outputs={"image": self._as_output(flat)},
            use_cache=False,
        )
        return self._recorder.take()

    def _as_output(self, features: torch.Tensor) -> Any:
        """Flat image features in the form in which the model's own vision tower returns them."""
        return SimpleNamespace(
            pooler_output=features[None] if self._features_are_tensor else [features],
            deepstack_features=[],  # added after the first layer, whose output is wanted before that
        )

    def _run_to_attention(self, tokens: torch.Tensor, layer_inputs: dict[str, Any]) -> AtAttention:
        try:
            self._layer(tokens, **layer_inputs)
        except AtAttention as at:
            # The traceback would keep alive what the layer has computed on the way.
            return at.with_traceback(None)
        raise UnsupportedModelError(
            f"{type(self._layer).__name__} does not use Transformers' attention interface"
        )

    def _rows(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.to(self.device, non_blocking=True)

    def _to_device(self, value: torch.Tensor) -> torch.Tensor:
        there = value.to(self.device, non_blocking=True)
        return there.to(self.dtype) if value.is_floating_point() else there

    def _joined(self, images: Sequence[VisionInput], names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Inputs of several images one after the other, filled up with zeros where they differ in shape."""
        joined = {}
        for name in names:
            values = [image.inputs[name] for image in images]
            shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            # Page-locked where it goes to a GPU, so that the copy does not wait.
            buffer = torch.empty(
                sum(map(len, values)),
                *shape,
                dtype=values[0].dtype,
                pin_memory=self.device.type == "cuda",
            )
            if any(list(value.shape[1:]) != shape for value in values):
                buffer.zero_()
            for target, value in zip(
                buffer.split_with_sizes([len(value) for value in values]), values, strict=True
            ):
                target[(slice(None), *(slice(size) for size in value.shape[1:]))] = value
            joined[name] = buffer
        return joined


class _Recorder(torch.nn.Module):
    """Stands where the first decoder layer stood, notes what it is given and passes its input on."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self._stands_for = (layer,)  # in a tuple, so that it is no submodule
        self._seen: tuple[torch.Tensor, dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)

    def forward(self, hidden_states: torch.Tensor, **layer_inputs: Any) -> torch.Tensor:
        """Note the call."""
        self._seen = (hidden_states, layer_inputs)
        return hidden_states

    def take(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """The call noted last, once."""
        if self._seen is None:
            raise UnsupportedModelError("the model did not call its first decoder layer")
        seen, self._seen = self._seen, None
        return seen


class _AfterAttention:
    """A decoder layer from its attention's output on, with the layer's own modules and ``forward``."""

    def __init__(self, layer: torch.nn.Module) -> None:
        names = [name for name, child in layer.named_children() if hasattr(child, "o_proj")]
        if len(names) != 1:
            raise UnsupportedModelError(
                f"{type(layer).__name__} has {len(names)} attention modules with an output projection named "
                "o_proj; exactly one is expected"
            )
        (attention,) = names
        self._attended = _Attended(layer.get_submodule(f"{attention}.o_proj"))
        self._layer = copy.copy(layer)
        self._layer._modules = {**layer._modules, attention: self._attended}
        self._mean_first: _MeanFirst | None = None
        usual = {attention, "mlp", "input_layernorm", "post_attention_layernorm"}
        mlp = layer._modules.get("mlp")
        projection = getattr(mlp, "down_proj", None)
        if set(layer._modules) == usual and mlp is not None and isinstance(projection, torch.nn.Linear):
            # After it comes only the residual connection, so that all is linear from there on.
            self._mean_first = _MeanFirst(projection)
            pooled = copy.copy(mlp)
            pooled._modules = {**mlp._modules, "down_proj": self._mean_first}
            self._layer._modules["mlp"] = pooled

    def __call__(
        self, tokens: torch.Tensor, attended: torch.Tensor, counts: list[int], layer_inputs: dict[str, Any]
    ) -> torch.Tensor:
        """The layer's output, up to what does not change its mean over each sample's tokens.

        Args:
            tokens: (1, m, d) inputs of the layer.
            attended: (1, m, heads · head_dim) outputs of its attention before the projection.
            counts: Tokens by sample, summing to m.
            layer_inputs: What else the layer is called with.

        Returns:
            (1, m, d).
        """
        self._attended.attended = attended
        if self._mean_first is not None:
            self._mean_first.counts = counts
        try:
            output = self._layer(tokens, **layer_inputs)
        finally:
            del self._attended.attended
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states


class _Attended(torch.nn.Module):
    """Stands where a layer attends and returns the projection of what has been attended to elsewhere."""

    attended: torch.Tensor

    def __init__(self, projection: torch.nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, *_args: Any, **_kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.projection(self.attended), None


class _MeanFirst(torch.nn.Module):
    """Stands where an MLP projects back: projects each sample's mean in the place of each of its tokens."""

    counts: list[int]

    def __init__(self, projection: torch.nn.Linear) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        means: torch.Tensor = self.projection(_means(states[0], self.counts).to(states.dtype))
        return means.repeat_interleave(torch.tensor(self.counts, device=means.device), 0)[None]


def _means(states: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(m, d) → (len(counts), d) float32, the mean of each run of rows."""
    return torch.stack([part.float().mean(0) for part in states.split_with_sizes(counts)])


def _packed(value: Any, lengths: Sequence[int]) -> Any:
    """Tensors of (..., B or 1, S, ·) without their padding, as (..., 1, T, ·); anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_packed(item, lengths) for item in value)
    if (
        not isinstance(value, torch.Tensor)
        or value.ndim < 3
        or value.shape[-2] != max(lengths)
        or value.shape[-3] not in (1, len(lengths))
    ):
        return value
    batch = value.expand(*value.shape[:-3], len(lengths), -1, -1)
    rows = [batch[..., place, :length, :] for place, length in enumerate(lengths)]
    return torch.cat(rows, dim=-2).unsqueeze(-3)
