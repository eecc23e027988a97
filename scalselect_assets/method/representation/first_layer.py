"""The parts of a VLM that the method runs: the vision tower with its projector, and the first decoder layer.

The base model's own ``forward`` still does everything that differs between families: the places of image
features, their positions and their masks. Its only decoder layer is replaced by a recorder of that layer's
inputs. The real first layer then runs on the tokens of all samples end to end, without padding, and only as
far as needed: queries, keys and values for every token, then attention, output projection and MLP for the
dominant vision tokens alone, since nothing else enters the representation.

A GPU works while the host continues, so a batch is represented in steps. Each step starts work on the device
and returns at once; the host waits only for the work of an earlier step (``FirstLayer.steps``).
"""

import inspect
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalselect_assets.method.representation.attention import (
    AtAttention,
    Heads,
    Kept,
    RowMask,
    Rows,
    attend,
    instruction_attention,
)
from scalselect_assets.method.representation.dominance import dominant
from scalselect_assets.method.representation.families import (
    UnsupportedModelError,
    known_on_the_host,
)
from scalselect_assets.method.representation.kernels import without_costs_per_shape
from scalselect_assets.method.representation.layer_tail import AfterAttention
from scalselect_assets.method.representation.packing import Packing, rectangle
from scalselect_assets.method.representation.pixel_scale import PixelScale
from scalselect_assets.method.transfers import Transfers


@dataclass(frozen=True, slots=True, eq=False)
class VisionInput:
    """One image, or all images of one sample if they cannot be processed separately.

    Attributes:
        key: Key of the image; equal images that are processed in the same way have the same key.
        inputs: The processor's outputs for it, by the argument names of the model's ``get_image_features``.
        n_tokens: Number of vision tokens that the image fills.
        scale: The scale that turns its pixels into the model's values, if the pixels are bytes.
    """

    key: str
    inputs: dict[str, torch.Tensor]
    n_tokens: int
    scale: PixelScale | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """The model's input for one sample.

    Attributes:
        input_ids: (S,) int64.
        token_inputs: Further inputs with one value per token, each (S,).
        vision: (v,) int64 positions of the vision tokens.
        instruction: (u,) int64 positions of tokens that are neither vision nor content of an answer.
        images: The images that fill the vision tokens, in order.
    """

    input_ids: torch.Tensor
    token_inputs: dict[str, torch.Tensor]
    vision: torch.Tensor
    instruction: torch.Tensor
    images: tuple[VisionInput, ...]

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.input_ids)


@dataclass(frozen=True, slots=True, eq=False)
class FirstLayerState:
    """The results of the first layer for one sample.

    Attributes:
        vector: (d,) float32: the mean output over the dominant vision tokens.
        n_dominant_tokens: Number of dominant vision tokens.
        vision_attention: Share of the instruction's attention that falls on vision tokens.
        attention: (v,) float32: each vision token's part of that share, in token order.
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
    """The language model inside a base model: the part with the decoder layers.

    Raises:
        UnsupportedModelError: The model has no decoder layers, or they are not in a list.
    """
    decoder = model.get_decoder()
    if not len(getattr(decoder, "layers", ())):
        raise UnsupportedModelError(f"{type(decoder).__name__} has no list of decoder layers")
    return decoder


class FirstLayer:
    """The parts of a base model that the representation needs. The given model is changed.

    Attributes:
        model: The base model without its decoder layers: its configuration and its vision part.
        device: The device that the model is on.
        dtype: Dtype of the model's weights and activations.
    """

    def __init__(self, model: Any, pad_token_id: int) -> None:
        """Take the first decoder layer out of ``model``.

        Args:
            model: A Transformers base model (without a head) with at least one decoder layer, whose text
                model uses the attention of ``register_rows_attention``.
            pad_token_id: Any valid token; its meaning is never used.

        Raises:
            UnsupportedModelError: The model's decoder or first layer is not built in the usual way.
        """
        decoder = decoder_of(model)
        layer = decoder.layers[0]
        self.model, self._layer, self._pad = model, layer, pad_token_id
        self._tail = AfterAttention(layer)
        self._recorder = _Recorder(layer)
        decoder.layers = torch.nn.ModuleList([self._recorder])
        if isinstance(getattr(decoder, "norm", None), torch.nn.Module):
            decoder.norm = torch.nn.Identity()  # nothing reads the norm's result
        embedding = model.get_input_embeddings().weight
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        self._transfers = Transfers(self.device)
        if self.device.type == "cuda":
            # Transformers' checks of a model's input wait for the device. They compare the processor's tokens
            # with the tower's features, and the host has done that already.
            os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
        self._features_are_tensor = False

    @torch.inference_mode()
    @without_costs_per_shape()
    def image_features(self, images: Sequence[VisionInput]) -> list[torch.Tensor]:
        """The features of images from the vision tower and the projector, in one pass.

        Returns:
            For each image its features, (n_tokens, d), on the model's device.

        Raises:
            FeatureCountError: The model makes a different number of features for an image than the number of
                tokens that the processor has put into the prompt.
        """
        joined = self._joined(images, images[0].inputs)
        output = self.model.get_image_features(
            **{name: self._to_device(value, images[0].scale) for name, value in joined.items()},
            **known_on_the_host(self.model.config, joined),
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

    def represent(
        self, samples: Sequence[ModelInput], features: Sequence[Sequence[torch.Tensor]], attention_mass: float
    ) -> list[FirstLayerState]:
        """Take all steps at once; see ``steps``."""
        steps = self.steps(samples, features, attention_mass)
        while True:
            try:
                next(steps)
            except StopIteration as finished:
                states: list[FirstLayerState] = finished.value
                return states

    def steps(
        self, samples: Sequence[ModelInput], features: Sequence[Sequence[torch.Tensor]], attention_mass: float
    ) -> Generator[None, None, list[FirstLayerState]]:
        """Equations 1 to 3 of the paper for several samples at once, in steps that allow other work between.

        The first step starts the computation of the vision tokens' attention. The second step waits for the
        number of kept tokens and starts the computation of the vectors. The third step waits for the vectors.

        Args:
            samples: The samples to represent.
            features: For each sample, the result of ``image_features`` for its images.
            attention_mass: τ.

        Returns:
            One state per sample. The vector contains NaN if the state is not finite.
        """
        begun = self._begin(samples, features, attention_mass)
        del features
        yield
        found = self._finish(begun)
        del begun  # its queries, keys and values take most of the memory
        yield
        vectors, shares, places, counts = (value.numpy() for value in found())
        return [
            FirstLayerState(
                vectors[row],
                int(n),
                float(shares[row, : len(sample.vision)].sum(dtype=np.float32)),
                shares[row, : len(sample.vision)].copy(),
                np.sort(places[row, :n]),
            )
            for row, (sample, n) in enumerate(zip(samples, counts, strict=True))
        ]

    @torch.inference_mode()
    @without_costs_per_shape()
    def _begin(
        self, samples: Sequence[ModelInput], features: Sequence[Sequence[torch.Tensor]], attention_mass: float
    ) -> "_Begun":
        """Compute everything up to the attention on the vision tokens."""
        hidden, layer_inputs = self._layer_inputs(samples, features)
        mask: RowMask = layer_inputs["attention_mask"]
        lengths = [len(sample) for sample in samples]
        packing = Packing(lengths, self._transfers)
        layer_inputs = {name: packing.packed(value) for name, value in layer_inputs.items()}
        tokens = packing.packed(hidden)
        heads = Heads.of(self._run_to_attention(tokens, layer_inputs), lengths, self._transfers)
        vision = Rows.of([sample.vision for sample in samples], self._transfers)
        instruction = Rows.of([sample.instruction for sample in samples], self._transfers)
        shares = instruction_attention(heads, mask, instruction, vision)
        kept = dominant(shares, vision.n, attention_mass)
        return _Begun(
            tokens[0],
            layer_inputs,
            heads,
            mask,
            vision,
            [int(sample.vision.numpy().max()) + 1 for sample in samples],
            shares,
            kept.places,
            kept.n,
            self._transfers.to_host([kept.n]),
        )

    @torch.inference_mode()
    @without_costs_per_shape()
    def _finish(self, begun: "_Begun") -> Callable[[], list[torch.Tensor]]:
        """Compute the rest. The returned function waits for vectors, shares, places and counts."""
        (counts,) = begun.counts()
        numbers = torch.arange(begun.places.shape[1], device=self.device)
        # The kept tokens come first, in token order; the others come last.
        ascending = (
            torch.where(numbers < begun.n_kept[:, None], begun.places, len(numbers)).sort(dim=1).values
        )
        positions = begun.vision.positions.gather(1, ascending.clamp(max=len(numbers) - 1))
        kept = Kept.of(Rows(positions, begun.n_kept, tuple(counts.tolist())))
        attended = attend(begun.heads, begun.mask, kept, begun.furthest)
        tokens = begun.tokens[begun.heads.starts[kept.samples] + kept.positions]
        vectors = self._tail(tokens, attended, kept, begun.layer_inputs)
        return self._transfers.to_host([vectors, begun.shares, begun.places, begun.n_kept])

    def _layer_inputs(
        self, samples: Sequence[ModelInput], features: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The inputs of the model's first layer: (B, S, d) states, padded on the right, and the rest."""
        ids = rectangle([sample.input_ids.numpy() for sample in samples], self._pad)
        real = rectangle([np.ones(len(sample), dtype=np.int64) for sample in samples])
        about_tokens = {
            name: rectangle([sample.token_inputs[name].numpy() for sample in samples])
            for name in samples[0].token_inputs
        }
        images = [image for sample in samples for image in sample.images]
        # Sizes and grids decide the positions of image tokens; the pixels are no longer needed.
        names = [name for name in images[0].inputs if not name.startswith("pixel_")]
        inputs: dict[str, torch.Tensor | None] = {
            "attention_mask": real,
            **about_tokens,
            **self._joined(images, names),
        }
        inputs |= self._positions(ids, inputs)
        flat = torch.cat([part for parts in features for part in parts])
        self.model(
            input_ids=self._to_device(ids),
            **{name: self._to_device(value) for name, value in inputs.items() if value is not None},
            mm_encoder_outputs={"image": self._as_output(flat)},
            use_cache=False,
        )
        return self._recorder.take()

    def _positions(
        self, ids: torch.Tensor, inputs: dict[str, torch.Tensor | None]
    ) -> dict[str, torch.Tensor | None]:
        """Positions that depend on the images' shapes, by the model's own code, if it has such positions.

        They are computed on the host: on a GPU that code would wait for the device several times per sample.
        """
        compute = getattr(self.model, "compute_3d_position_ids", None)
        if compute is None:
            return {}
        parameters = inspect.signature(compute).parameters
        given = {"inputs_embeds": None, "video_grid_thw": None, "past_key_values": None, **inputs}
        required = {name for name, one in parameters.items() if one.default is inspect.Parameter.empty}
        if not (inputs.keys() <= parameters.keys() and required <= given.keys() | {"input_ids"}):
            return {}  # the model's code needs inputs that are not known here
        known = {name: value for name, value in given.items() if name in parameters}
        return {"position_ids": compute(input_ids=ids, **known)}

    def _as_output(self, features: torch.Tensor) -> Any:
        """The flat image features, in the form that the model's own vision tower returns."""
        return SimpleNamespace(
            pooler_output=features[None] if self._features_are_tensor else [features],
            deepstack_features=[],  # added after the first layer's output, which is taken before that
        )

    def _run_to_attention(self, tokens: torch.Tensor, layer_inputs: dict[str, Any]) -> AtAttention:
        try:
            self._layer(tokens, **layer_inputs)
        except AtAttention as at:
            # The traceback would keep the layer's intermediate tensors alive.
            return at.with_traceback(None)
        raise UnsupportedModelError(
            f"{type(self._layer).__name__} does not use Transformers' attention interface"
        )

    def _to_device(self, value: torch.Tensor, scale: PixelScale | None = None) -> torch.Tensor:
        there = self._transfers.to_device(value)
        if scale is not None and there.dtype == torch.uint8:
            there = scale.applied(there)
        return there.to(self.dtype) if there.is_floating_point() else there

    def _joined(self, images: Sequence[VisionInput], names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The inputs of several images, concatenated; images of different shapes are padded with zeros."""
        joined = {}
        for name in names:
            values = [image.inputs[name] for image in images]
            shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            if any(list(value.shape[1:]) != shape for value in values):
                # The padding is zero in the model's values, not in the bytes.
                values = [
                    image.scale.applied(value) if image.scale and value.dtype == torch.uint8 else value
                    for image, value in zip(images, values, strict=True)
                ]
            buffer = self._transfers.empty(sum(map(len, values)), *shape, dtype=values[0].dtype)
            if all(list(value.shape[1:]) == shape for value in values):
                torch.cat(values, out=buffer)
            else:
                buffer.zero_()
                parts = buffer.split_with_sizes([len(value) for value in values])
                for target, value in zip(parts, values, strict=True):
                    target[(slice(None), *(slice(size) for size in value.shape[1:]))] = value
            joined[name] = buffer
        return joined


class _Recorder(torch.nn.Module):
    """Replaces the first decoder layer: records the layer's inputs and returns the states unchanged."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self._stands_for = (layer,)  # in a tuple, so that the layer is no submodule
        self._seen: tuple[torch.Tensor, dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)

    def forward(self, hidden_states: torch.Tensor, **layer_inputs: Any) -> torch.Tensor:
        """Record the call."""
        self._seen = (hidden_states, layer_inputs)
        return hidden_states

    def take(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the last recorded call and forget it."""
        if self._seen is None:
            raise UnsupportedModelError("the model did not call its first decoder layer")
        seen, self._seen = self._seen, None
        return seen


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A batch for which the attention's computation has been started.

    Attributes:
        tokens: (T, d) inputs of the layer, the samples end to end.
        layer_inputs: The other arguments of the layer's call.
        heads: Queries, keys and values of all tokens.
        mask: The mask that says which keys each row may attend to.
        vision: The vision tokens.
        furthest: For each sample, the number of tokens from its beginning that includes all vision tokens.
        shares: (B, V) float32: the attention that each vision token receives.
        places: (B, V) int64: vision tokens in order of attention, the kept tokens first.
        n_kept: (B,) int64: number of kept tokens.
        counts: Function that waits for ``n_kept`` and returns it on the host.
    """

    tokens: torch.Tensor
    layer_inputs: dict[str, Any]
    heads: Heads
    mask: RowMask
    vision: Rows
    furthest: list[int]
    shares: torch.Tensor
    places: torch.Tensor
    n_kept: torch.Tensor
    counts: Callable[[], list[torch.Tensor]]
