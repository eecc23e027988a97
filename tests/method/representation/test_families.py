"""One mechanism for every family: each against its whole model, and models that it does not fit refused."""

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from scalselect_assets.method.representation.conversation import IMAGE
from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.method.representation.families import (
    TESTED_FAMILIES,
    UnsupportedModelError,
    image_token_id,
    keep_what_the_first_layer_reads,
)
from scalselect_assets.method.representation.loading import load_encoder
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from tests.method import zoo
from tests.method.samples import SAMPLES, assert_equal, chat, counts, pixels, question, read_image, represent
from tests.method.zoo import PALIGEMMA_TEMPLATE, Reference, write_tiny_vlm

pytestmark = pytest.mark.usefixtures("one_torch_thread", "tiny_vlm")

FAMILIES = [family for family in zoo.FAMILIES if family != "paligemma"]
WriteRecipe = Callable[..., Path]


def max_error(encoder: VlmEncoder, reference: Reference, *, batch_tokens: int = 4096) -> float:
    """The largest error of any component over all samples; the sizes of all token sets have to be equal."""
    errors = []
    for got, sample in zip(
        represent(encoder, list(SAMPLES.values()), batch_tokens=batch_tokens), SAMPLES.values(), strict=True
    ):
        expected = reference.represent(sample.conversation, [pixels(image) for image in sample.images])
        assert counts(got) == counts(expected)
        # That the two agree says little where all tokens are kept.
        assert got.n_dominant_tokens < got.n_vision_tokens or got.n_vision_tokens < 10
        errors.append(float(np.abs(got.vector - expected.vector).max()))
    return max(errors)


@pytest.fixture(scope="module")
def reference(tiny_vlm: Callable[[str], Path]) -> Callable[[str], Reference]:
    """A family's whole model."""
    return lambda family: Reference(tiny_vlm(family))


@pytest.fixture
def write_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteRecipe:
    """Write a model of a type that is like a family of the zoo but for some values."""

    def write(family: str, like: str, **changes: Mapping[str, Any]) -> Path:
        recipe = zoo._RECIPES[like]
        merged = {name: {**getattr(recipe, name), **values} for name, values in changes.items()}
        monkeypatch.setattr(zoo, "_RECIPES", {**zoo._RECIPES, family: replace(recipe, **merged)})
        return write_tiny_vlm(family, tmp_path / family)

    return write


# The ten families


def test_the_families_that_are_tested_here_are_those_that_are_named() -> None:
    assert set(FAMILIES) == set(TESTED_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_representation_equals_the_one_of_the_whole_model(
    family: str,
    tiny_encoder: Callable[[str], VlmEncoder],
    reference: Callable[[str], Reference],
    record_property: Callable[[str, object], None],
) -> None:
    """``--junitxml`` lists the errors by family."""
    whole = reference(family)
    together = max_error(tiny_encoder(family), whole, batch_tokens=10_000)
    alone = max_error(tiny_encoder(family), whole, batch_tokens=1)
    record_property("max_abs_error_together", together)
    record_property("max_abs_error_alone", alone)
    assert max(together, alone) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_samples_does_not_matter(family: str, tiny_encoder: Callable[[str], VlmEncoder]) -> None:
    """Whatever the neighbours add of padding: tokens, image patches and crops."""
    samples, encoder = list(SAMPLES.values()), tiny_encoder(family)
    alone = [represent(encoder, [sample])[0] for sample in samples]
    assert_equal(represent(encoder, samples[::-1], batch_tokens=500)[::-1], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_writes_the_models_own_image_token_harms_no_other_row(
    family: str, tiny_encoder: Callable[[str], VlmEncoder], reference: Callable[[str], Reference]
) -> None:
    whole = reference(family)
    token = whole.processor.tokenizer.convert_ids_to_tokens(whole.model.config.image_token_id)
    encoder = tiny_encoder(family)
    good = question("What is this?", "2")
    for text, answer in ((f"What does {token} mean?", "A token."), ("What is <it>?", f"{token}, I think")):
        first, bad, last = encoder.encode([good, question(text, answer=answer), good], read_image)
        assert isinstance(bad, Rejection)
        assert bad.reason is RejectionReason.PROCESSOR_REFUSED
        assert_equal([first, last], represent(encoder, [good]) * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_no_instruction_and_everything_else_is(
    family: str, tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    def asked(text: str, answer: str) -> Any:
        return represent(tiny_encoder(family), [question(text, "1", answer)])[0]

    plain = asked("Is it red?", "Yes")
    long_answer, long_question = (
        asked("Is it red?", "Yes, it is. " * 8 + "Really."),
        asked("Is it red? " * 9, "Yes"),
    )
    assert long_answer.n_tokens > plain.n_tokens
    assert long_answer.n_instruction_tokens == plain.n_instruction_tokens
    assert long_question.n_instruction_tokens - plain.n_instruction_tokens == (
        long_question.n_tokens - plain.n_tokens
    )


# Types that have no name here


def test_a_type_without_a_name_here_is_accepted_where_the_mechanism_holds(
    write_variant: WriteRecipe, subtests_of_types: dict[str, dict[str, Any]]
) -> None:
    for family, changes in subtests_of_types.items():
        assert family not in TESTED_FAMILIES
        path = write_variant(family, **changes)
        assert max_error(load_encoder(str(path), device="cpu"), Reference(path)) <= 1e-5


@pytest.fixture
def subtests_of_types() -> dict[str, dict[str, Any]]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {
        "vipllava": {"like": "llava", "top": {"vision_feature_layers": [-2, 1, 2]}},
        "qwen3_vl_moe": {"like": "qwen3_vl", "text": experts},
    }


DECODERS: dict[str, dict[str, Any]] = {
    "a sliding window": {"model_type": "mistral", "sliding_window": 7},
    "norms of queries and keys": {"model_type": "qwen3", "head_dim": 16},
    "queries, keys and values in one projection": {"model_type": "phi3"},
    "attention and MLP side by side": {"model_type": "cohere"},
    "scaled residuals": {"model_type": "granite", "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "norms after attention and MLP": {"model_type": "olmo2"},
    "a mixture of experts": {"model_type": "mixtral", "num_local_experts": 4},
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_may_be_of_another_kind(decoder: str, write_variant: WriteRecipe) -> None:
    path = write_variant("llava", "llava", text=DECODERS[decoder])
    assert max_error(load_encoder(str(path), device="cpu"), Reference(path)) <= 1e-5


@pytest.mark.parametrize("layer", [-3, -2, -1, 1, 2, [-2, -1], [1, -2]])
def test_whichever_layers_of_the_vision_tower_are_projected(
    layer: int | list[int], write_variant: WriteRecipe
) -> None:
    path = write_variant("llava", "llava", top={"vision_feature_layer": layer})
    assert max_error(load_encoder(str(path), device="cpu"), Reference(path)) <= 1e-5


# Models that do not fit


def test_paligemma_is_refused_with_the_reason(tiny_vlm: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no chat template; add chat_template\.jinja"):
        load_encoder(str(tiny_vlm("paligemma")), device="cpu")
    templated = shutil.copytree(tiny_vlm("paligemma"), tmp_path / "templated")
    (templated / "chat_template.jinja").write_text(PALIGEMMA_TEMPLATE)
    with pytest.raises(UnsupportedModelError, match="rewrites the prompt after its chat template"):
        load_encoder(str(templated), device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "gpt_neox"}, "0 attention modules with an output projection named o_proj"),
        ({"model_type": "gemma2", "head_dim": 16}, "'softcap', which is not supported"),
        (
            {"model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 16},
            "'s_aux', which is not supported",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_decoder_that_is_built_otherwise_is_refused(
    text: dict[str, Any], message: str, write_variant: WriteRecipe
) -> None:
    path = write_variant("llava", "llava", text=text)
    with pytest.raises(UnsupportedModelError, match=message):
        load_encoder(str(path), device="cpu")


def test_a_decoder_whose_first_layer_has_no_attention_is_refused(write_variant: WriteRecipe) -> None:
    """Qwen3.5 begins with linear attention, and every other layer attends."""
    path = write_variant(
        "qwen3_5",
        "qwen3_vl",
        text={
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    )
    with pytest.raises(UnsupportedModelError, match="first"):
        load_encoder(str(path), device="cpu")


@pytest.fixture
def layer_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.Tensor], torch.Tensor]], None]:
    """Do something else to the output of LLaMA's layer, in the whole model as in the encoder."""
    forward = LlamaDecoderLayer.forward

    def change(after: Callable[[torch.Tensor], torch.Tensor]) -> None:
        monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **more: after(forward(*args, **more)))

    return change


def test_a_layer_whose_tokens_meet_outside_its_attention_is_refused(
    layer_that: Callable[..., None], tiny_vlm: Callable[[str], Path]
) -> None:
    layer_that(lambda hidden: hidden + hidden.mean(1, keepdim=True))
    with pytest.raises(UnsupportedModelError) as refusal:
        load_encoder(str(tiny_vlm("llava")), device="cpu")
    message = str(refusal.value)
    assert (percentage := re.search(r"off by (\d+\.\d)% \(rounding is at most 0\.1%\)", message))
    assert float(percentage[1]) > 1
    assert all(name in message for name in TESTED_FAMILIES.values())


def test_a_layer_that_knows_how_many_tokens_it_is_given_is_refused(
    layer_that: Callable[..., None], tiny_vlm: Callable[[str], Path]
) -> None:
    layer_that(lambda hidden: hidden * hidden.shape[1])
    with pytest.raises(UnsupportedModelError, match=r"off by \d+\.\d%"):
        load_encoder(str(tiny_vlm("llava")), device="cpu")


def test_a_layer_whose_output_is_not_finite_is_refused(
    layer_that: Callable[..., None], tiny_vlm: Callable[[str], Path]
) -> None:
    layer_that(lambda hidden: hidden * math.nan)
    with pytest.raises(UnsupportedModelError, match=r"off by nan%"):
        load_encoder(str(tiny_vlm("llava")), device="cpu")


@pytest.mark.parametrize(
    "after", [lambda hidden: 3 * hidden, lambda hidden: hidden + 1], ids=["scaled", "shifted"]
)
def test_a_layer_that_scales_or_shifts_its_output_is_represented_with_that(
    after: Callable[[torch.Tensor], torch.Tensor],
    layer_that: Callable[..., None],
    tiny_vlm: Callable[[str], Path],
) -> None:
    layer_that(after)
    path = tiny_vlm("llava")
    assert max_error(load_encoder(str(path), device="cpu"), Reference(path)) <= 2e-5


def test_a_layer_that_bends_its_output_is_refused(
    layer_that: Callable[..., None], tiny_vlm: Callable[[str], Path]
) -> None:
    """The MLP projects the mean over tokens, which is right where all is linear from there on."""
    layer_that(lambda hidden: 3 * hidden.tanh())
    with pytest.raises(UnsupportedModelError, match=r"off by \d+\.\d%"):
        load_encoder(str(tiny_vlm("llava")), device="cpu")


# Configurations


def test_the_image_token_is_read_from_either_spelling() -> None:
    assert image_token_id(AutoConfig.for_model("llava", image_token_index=7)) == 7
    assert image_token_id(AutoConfig.for_model("qwen2_vl", image_token_id=8)) == 8


def test_a_configuration_without_an_image_token_is_refused_with_the_tested_families() -> None:
    with pytest.raises(UnsupportedModelError, match="'nonesuch' name no image token") as refusal:
        image_token_id(SimpleNamespace(model_type="nonesuch"))
    assert all(name in str(refusal.value) for name in TESTED_FAMILIES.values())


@pytest.mark.parametrize(
    ("layer", "kept", "then"),
    [(-2, 23, -1), (-1, 24, -1), (-4, 21, -1), (3, 24, 3), ([-2, -1], 24, [-2, -1])],
)
def test_of_the_vision_tower_the_layers_up_to_the_projected_one_are_kept(
    layer: int | list[int], kept: int, then: int | list[int]
) -> None:
    config = AutoConfig.for_model("llava", vision_feature_layer=layer)
    keep_what_the_first_layer_reads(config)
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer) == (kept, then)
    assert config.get_text_config().num_hidden_layers == 1


def test_deepstack_features_are_not_made() -> None:
    config = AutoConfig.for_model("qwen3_vl")
    assert config.vision_config.deepstack_visual_indexes
    keep_what_the_first_layer_reads(config)
    assert config.vision_config.deepstack_visual_indexes == []


def test_a_second_image_of_another_shape_does_not_change_the_first(
    tiny_encoder: Callable[[str], VlmEncoder],
) -> None:
    """Idefics3 pads the images of a sample to each other, and processes them as one."""
    encoder = tiny_encoder("idefics3")
    both = chat(
        ("user", (IMAGE, "A.")),
        ("assistant", ("B",)),
        ("user", (IMAGE, "C.")),
        ("assistant", ("D",)),
        images=("1", "5:40x110"),
    )
    first = question("A.", "1", "B")
    together = represent(encoder, [both, first])
    assert_equal(together, [represent(encoder, [sample])[0] for sample in (both, first)])
