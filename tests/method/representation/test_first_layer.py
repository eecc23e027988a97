"""The first layer is computed for several samples as for one, and no further than the method reads it."""

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scalselect_assets.method.representation import attention
from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.method.representation.families import UnsupportedModelError
from scalselect_assets.method.representation.first_layer import (
    FirstLayer,
    FirstLayerState,
    ModelInput,
    VisionInput,
)
from scalselect_assets.method.representation.preparation import Prepared, Preparer
from tests.method.memory import LargestTensor
from tests.method.operators import count_operators
from tests.method.samples import SAMPLES, ChatSample, question, read_image

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MASS = 0.9
FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3"]


@pytest.fixture
def first_layer(tiny_encoder: Callable[[str], VlmEncoder]) -> Callable[[str], FirstLayer]:
    return lambda family: tiny_encoder(family)._first_layer


def model_inputs(preparer: Preparer, samples: Sequence[ChatSample]) -> list[ModelInput]:
    """What a model reads of samples."""
    inputs = []
    for sample in samples:
        (prepared,) = preparer.prepare(sample.images, [sample.conversation], read_image)
        assert isinstance(prepared, Prepared)
        inputs.append(prepared.model_input)
    return inputs


def features_of(layer: FirstLayer, samples: Sequence[ModelInput]) -> list[list[torch.Tensor]]:
    """The features of each sample's images, in passes of their own."""
    return [[layer.image_features([image])[0] for image in sample.images] for sample in samples]


def assert_states_equal(left: Sequence[FirstLayerState], right: Sequence[FirstLayerState]) -> None:
    for first, second in zip(left, right, strict=True):
        assert first.n_dominant_tokens == second.n_dominant_tokens
        np.testing.assert_allclose(first.vector, second.vector, atol=1e-5, rtol=0)
        np.testing.assert_allclose(first.vision_attention, second.vision_attention, atol=1e-6, rtol=0)


@pytest.fixture
def used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold what some others left, as they do on a machine that has run for a while."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(1))


# The vision tower


@pytest.mark.usefixtures("used_memory")
@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_different_shapes_pass_the_tower_together_as_alone(
    family: str, first_layer: Callable[[str], FirstLayer], tiny_preparer: Callable[..., Preparer]
) -> None:
    layer = first_layer(family)
    samples = model_inputs(tiny_preparer(family), list(SAMPLES.values()))
    images = [image for sample in samples for image in sample.images]
    together = layer.image_features(images)
    assert [len(features) for features in together] == [image.n_tokens for image in images]
    for features, image in zip(together, images, strict=True):
        torch.testing.assert_close(features, layer.image_features([image])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrong", [-1, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_and_a_processor_that_disagree_about_an_image_are_not_believed(
    wrong: int, family: str, first_layer: Callable[[str], FirstLayer], tiny_preparer: Callable[..., Preparer]
) -> None:
    from scalselect_assets.method.representation.first_layer import FeatureCountError

    (sample,) = model_inputs(tiny_preparer(family), [question("Why?", "1")])
    (image,) = sample.images
    with pytest.raises(
        FeatureCountError, match=f"makes {image.n_tokens} features .* {image.n_tokens + wrong}"
    ):
        first_layer(family).image_features([dataclasses.replace(image, n_tokens=image.n_tokens + wrong)])


# The representation


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_represented_together_as_alone(
    family: str, first_layer: Callable[[str], FirstLayer], tiny_preparer: Callable[..., Preparer]
) -> None:
    layer = first_layer(family)
    samples = model_inputs(tiny_preparer(family), list(SAMPLES.values()))
    features = features_of(layer, samples)
    together = layer.represent(samples, features, MASS)
    alone = [layer.represent([sample], [own], MASS)[0] for sample, own in zip(samples, features, strict=True)]
    assert_states_equal(together, alone)
    assert len({state.n_dominant_tokens for state in together}) > 1
    for state in together:
        assert (state.vector.dtype, state.vector.shape) == (np.float32, (64,))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_that_is_not_finite_does_not_touch_its_neighbours(
    family: str, first_layer: Callable[[str], FirstLayer], tiny_preparer: Callable[..., Preparer]
) -> None:
    layer = first_layer(family)
    samples = model_inputs(tiny_preparer(family), list(SAMPLES.values())[:3])
    features = features_of(layer, samples)
    expected = layer.represent(samples, features, MASS)
    features[1] = [torch.full_like(feature, torch.nan) for feature in features[1]]
    first, bad, last = layer.represent(samples, features, MASS)
    assert np.isnan(bad.vector).any()
    assert_states_equal([first, last], [expected[0], expected[2]])


def test_without_any_instruction_all_vision_tokens_count_the_same(
    first_layer: Callable[[str], FirstLayer], tiny_preparer: Callable[..., Preparer]
) -> None:
    layer = first_layer("llava")
    samples = model_inputs(tiny_preparer("llava"), [question("Why?", "1"), question("Why?", "2")])
    samples[0] = dataclasses.replace(samples[0], instruction=torch.tensor([], dtype=torch.int64))
    features = features_of(layer, samples)
    without, other = layer.represent(samples, features, 0.5)
    assert (without.n_dominant_tokens, without.vision_attention) == (33, 0.0)
    assert_states_equal([other], layer.represent(samples[1:], features[1:], 0.5))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_only_the_dominant_tokens_pass_the_mlp(
    family: str, first_layer: Callable[[str], FirstLayer], tiny_preparer: Callable[..., Preparer]
) -> None:
    layer = first_layer(family)
    samples = model_inputs(tiny_preparer(family), list(SAMPLES.values()))
    features = features_of(layer, samples)
    n_tokens: list[int] = []
    hook = layer._layer.mlp.up_proj.register_forward_hook(
        lambda _module, inputs, _output: n_tokens.append(inputs[0].shape[:-1].numel())
    )
    try:
        states = layer.represent(samples, features, MASS)
    finally:
        hook.remove()
    assert n_tokens == [sum(state.n_dominant_tokens for state in states)]
    assert n_tokens[0] < sum(len(sample.vision) for sample in samples)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_more_in_a_batch_hardly_costs_a_kernel_more(
    family: str,
    first_layer: Callable[[str], FirstLayer],
    tiny_preparer: Callable[..., Preparer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = first_layer(family)
    samples = model_inputs(tiny_preparer(family), list(SAMPLES.values()))
    features = features_of(layer, samples)
    positions = layer._positions

    def operators(times: int) -> int:
        seen: list[Any] = []

        def run() -> None:
            layer.represent(samples * times, features * times, MASS)

        monkeypatch.setattr(layer, "_positions", lambda *given: seen.append(positions(*given)) or seen[-1])
        run()
        # They are of the host, where the model's own code works sample by sample.
        monkeypatch.setattr(layer, "_positions", lambda *_: seen[-1])
        return count_operators(run)

    few, many = operators(2), operators(10)
    assert (many - few) / (8 * len(samples)) < 6


# Memory


def lengthened(sample: ModelInput, length: int) -> ModelInput:
    """The sample with its last token repeated, all of which are of the instruction."""
    more = length - len(sample)
    return dataclasses.replace(
        sample,
        input_ids=torch.cat([sample.input_ids, sample.input_ids[-1:].expand(more)]),
        token_inputs={
            name: torch.cat([value, value[-1:].expand(more)]) for name, value in sample.token_inputs.items()
        },
        instruction=torch.cat([sample.instruction, torch.arange(len(sample), length)]),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_grows_with_the_length_and_not_with_its_square(
    family: str,
    first_layer: Callable[[str], FirstLayer],
    tiny_preparer: Callable[..., Preparer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_BLOCK_BYTES", {"cpu": 2**19})
    monkeypatch.setattr(attention, "_MASK_BYTES", 2**17)
    layer = first_layer(family)
    (sample,) = model_inputs(tiny_preparer(family), [question("Why?", "1")])
    features = features_of(layer, [sample])

    def largest(length: int) -> int:
        with LargestTensor() as seen:
            layer.represent([lengthened(sample, length)], features, MASS)
        return seen.bytes

    weights = max(parameter.untyped_storage().nbytes() for parameter in layer._layer.parameters())
    short, long = largest(2048), largest(4096)
    assert weights < short < 2048 * 2048  # one byte for every pair of tokens, in one head
    assert long <= 2 * short


# What is refused


def test_a_model_whose_decoder_has_no_layers_is_refused() -> None:
    model: Any = SimpleNamespace(get_decoder=lambda: torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedModelError, match="Linear has no list of decoder layers"):
        FirstLayer(model, 0)


class Decoder(torch.nn.Module):
    """As much of a decoder as the first layer is taken from."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([layer])
        self.embed_tokens = torch.nn.Embedding(3, 4)

    def get_decoder(self) -> torch.nn.Module:
        return self

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed_tokens


class Layer(torch.nn.Module):
    """A layer with some modules that look like attention, none of which is called."""

    def __init__(self, n_attentions: int) -> None:
        super().__init__()
        for number in range(n_attentions):
            part = torch.nn.Module()
            part.o_proj = torch.nn.Linear(4, 4)
            self.add_module(f"attention_{number}", part)

    def forward(self, hidden: torch.Tensor, **_inputs: Any) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("n_attentions", [0, 2])
def test_a_layer_without_exactly_one_attention_is_refused(n_attentions: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"Layer has {n_attentions} attention modules"):
        FirstLayer(Decoder(Layer(n_attentions)), 0)


class Caller(Decoder):
    """Calls its layer with what the layer's input is, or does not call it."""

    calls = True

    def forward(self, input_ids: torch.Tensor, **_inputs: Any) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        return self.layers[0](hidden, attention_mask=None) if self.calls else hidden


@pytest.mark.parametrize(
    ("calls", "message"),
    [(True, "Layer does not use Transformers' attention"), (False, "did not call its first decoder layer")],
)
def test_a_model_that_computes_attention_in_its_own_way_is_refused(calls: bool, message: str) -> None:
    model = Caller(Layer(1))
    model.calls = calls
    layer = FirstLayer(model, 0)
    sample = ModelInput(
        input_ids=torch.tensor([0, 1, 2]),
        token_inputs={},
        vision=torch.tensor([1]),
        instruction=torch.tensor([0, 2]),
        images=(VisionInput("image", {"pixel_values": torch.zeros(1, 3, 2, 2)}, 1),),
    )
    with pytest.raises(UnsupportedModelError, match=message):
        layer.represent([sample], [[torch.zeros(1, 4)]], MASS)
