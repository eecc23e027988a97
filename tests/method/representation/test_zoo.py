"""The tiny models are what they claim to be, and the reference representation rests on the right tokens."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from tests.method.zoo import FAMILIES, PALIGEMMA_TEMPLATE, Reference, write_tiny_vlm

pytestmark = pytest.mark.usefixtures("one_torch_thread")

WIDE, TALL, NARROW = (90, 60), (60, 100), (40, 60)

ONE_WORD = Conversation(
    (Turn("user", (IMAGE, "Is it red? Answer Yes or No.")), Turn("assistant", ("Yes",))),
)
SEVERAL_TURNS = Conversation(
    (
        Turn("system", ("Answer briefly.",)),
        Turn("user", (IMAGE, "빨간 원은 몇 개입니까?")),
        Turn("assistant", ("둘",)),
        Turn("user", ("And how many squares are on the left of the largest circle?",)),
        Turn("assistant", ("Two squares, 两个, both of them small.",)),
    )
)
SECOND_IMAGE_LATER = Conversation(
    (
        Turn("user", (IMAGE, "他们是谁？")),
        Turn("assistant", ("A",)),
        Turn("user", ("What is A?", IMAGE)),
        Turn("assistant", ("A",)),
    )
)
CASES = {
    "one-word answer that the question contains": (ONE_WORD, (WIDE,)),
    "several turns and a system text": (SEVERAL_TURNS, (TALL,)),
    "two images, the second in a later turn": (SECOND_IMAGE_LATER, (WIDE, NARROW)),
}

# Image tokens of the three cases, from each family's geometry.
N_VISION_TOKENS = {
    "llava": (64, 64, 128),  # 8 x 8 patches
    # 4 x 4 patches of the whole image, then the unpadded rows of the crops with a newline token each.
    "llava_next": (16 + 6 * (8 + 1), 16 + 8 * (4 + 1), 16 + 6 * (8 + 1) + 16 + 8 * (6 + 1)),
    # The same, scaled down to the area of four crops; images that share a row get one crop and one newline.
    "llava_onevision": (16 + 6 * (9 + 1), 16 + 9 * (6 + 1), 2 * (16 + 1)),
    "qwen2_vl": (4 * 6, 7 * 4, 4 * 6 + 4 * 3),  # merged patches of 14 pixels
    "qwen2_5_vl": (4 * 6, 7 * 4, 4 * 6 + 4 * 3),
    "qwen3_vl": (4 * 6, 6 * 4, 4 * 6 + 4 * 2),  # merged patches of 16 pixels
    "internvl": (7 * 9, 7 * 9, 14 * 9),  # six crops and the whole image, 3 x 3 tokens each
    "idefics3": (13 * 4, 13 * 4, 26 * 4),  # 3 x 4 crops and the whole image
    "smolvlm": (7 * 4, 7 * 4, 14 * 4),  # 2 x 3 crops and the whole image
    "gemma3": (16, 16, 32),
    "paligemma": (36, 36, 72),  # 6 x 6 patches
}


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Seeded noise blocks."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def pictures(sizes: tuple[tuple[int, int], ...]) -> list[Image.Image]:
    return [picture(seed, size) for seed, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def folders(tiny_vlm: Callable[[str], Path]) -> dict[str, Path]:
    """One checkpoint per family, as written."""
    return {family: tiny_vlm(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """One reference per family; PaliGemma gets a template first."""
    templated = tmp_path_factory.mktemp("templated") / "paligemma"
    shutil.copytree(folders["paligemma"], templated)
    (templated / "chat_template.jinja").write_text(PALIGEMMA_TEMPLATE)
    return {family: Reference(folder) for family, folder in {**folders, "paligemma": templated}.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reference(family: str, references: dict[str, Reference]) -> Reference:
    return references[family]


def run(
    reference: Reference, conversation: Conversation, sizes: tuple[tuple[int, int], ...]
) -> tuple[Any, Any]:
    """The whole model's inputs and outputs for one sample."""
    inputs = reference.inputs(conversation, pictures(sizes))
    del inputs["offset_mapping"]
    with torch.inference_mode():
        return inputs, reference.model(**inputs, output_hidden_states=True, output_attentions=True)


# -------------------------------------------------------------------------------------- representation


@pytest.mark.parametrize("case", range(3), ids=list(CASES))
def test_the_image_tokens_are_those_of_the_familys_geometry(
    family: str, case: int, reference: Reference
) -> None:
    conversation, sizes = list(CASES.values())[case]
    got = reference.represent(conversation, pictures(sizes))
    assert got.n_vision_tokens == N_VISION_TOKENS[family][case]
    token = reference.processor.tokenizer.convert_ids_to_tokens(reference.model.config.image_token_id)
    assert reference.processor.expanded.count(token) == got.n_vision_tokens


@pytest.mark.parametrize("case", CASES)
def test_representations_are_finite_and_their_counts_add_up(case: str, reference: Reference) -> None:
    conversation, sizes = CASES[case]
    got = reference.represent(conversation, pictures(sizes))
    n_answers = got.n_tokens - got.n_vision_tokens - got.n_instruction_tokens
    answers = list(conversation.texts("assistant"))
    assert len(answers) <= n_answers <= sum(len(answer.encode()) for answer in answers)
    assert got.vector.dtype == np.float32
    assert got.vector.shape == (64,)
    assert np.isfinite(got.vector).all()
    assert 0.1 < got.vector.std() < 10


def test_the_attention_is_far_from_uniform(reference: Reference) -> None:
    got = reference.represent(ONE_WORD, pictures((WIDE,)))
    assert got.n_dominant_tokens <= 0.85 * got.n_vision_tokens


def test_a_higher_attention_mass_keeps_more_tokens_up_to_all(reference: Reference) -> None:
    kept = [
        reference.represent(ONE_WORD, pictures((WIDE,)), mass).n_dominant_tokens for mass in (0.5, 0.9, 1.0)
    ]
    assert kept == sorted(kept)
    assert kept[0] < kept[2]


def test_an_answers_own_words_are_not_instruction(reference: Reference) -> None:
    question = Turn("user", (IMAGE, "Count."))
    short, long = (
        reference.represent(Conversation((question, Turn("assistant", (answer,)))), pictures((WIDE,)))
        for answer in ("One", "One, and then one, 그리고 하나 더")
    )
    assert short.n_tokens < long.n_tokens
    assert short.n_instruction_tokens == long.n_instruction_tokens


def test_a_word_in_the_question_stays_instruction_where_the_answer_is_the_same_word(
    reference: Reference,
) -> None:
    question = Turn("user", (IMAGE, "Yes or No?"))
    same, other = (
        reference.represent(Conversation((question, Turn("assistant", (answer,)))), pictures((WIDE,)))
        for answer in ("Yes", "No")
    )
    assert same.n_instruction_tokens == other.n_instruction_tokens


# ------------------------------------------------------------------------------- what the model's outputs are


def test_the_second_hidden_state_is_the_first_layers_own_output(reference: Reference) -> None:
    outputs: list[torch.Tensor] = []
    handle = (
        reference.model.get_decoder()
        .layers[0]
        .register_forward_hook(
            lambda _module, _args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    try:
        _, output = run(reference, ONE_WORD, (WIDE,))
    finally:
        handle.remove()
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(output.hidden_states[1], outputs[0], rtol=0, atol=0)
    normed = reference.model.get_decoder().norm(outputs[0])
    assert not torch.allclose(normed, outputs[0], atol=0.1)


def test_the_second_hidden_state_of_qwen3_vl_is_before_the_deepstack_features(
    references: dict[str, Reference],
) -> None:
    reference = references["qwen3_vl"]
    received: list[torch.Tensor] = []
    handle = (
        reference.model.get_decoder()
        .layers[1]
        .register_forward_pre_hook(lambda _module, args: received.append(args[0]))
    )
    try:
        inputs, output = run(reference, SECOND_IMAGE_LATER, (WIDE, NARROW))
    finally:
        handle.remove()
    features = reference.model.get_image_features(
        inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
    ).deepstack_features
    assert len(features) == 2
    vision = inputs["input_ids"][0] == reference.model.config.image_token_id
    before, after = output.hidden_states[1][0], received[0][0]
    torch.testing.assert_close(after[~vision], before[~vision], rtol=0, atol=0)
    torch.testing.assert_close(after[vision], before[vision] + torch.cat(features[0]))
    assert (after[vision] - before[vision]).abs().mean() > 0.1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
def test_the_other_families_hand_the_second_hidden_state_on_as_it_is(
    family: str, references: dict[str, Reference]
) -> None:
    reference = references[family]
    received: list[torch.Tensor] = []
    handle = (
        reference.model.get_decoder()
        .layers[1]
        .register_forward_pre_hook(lambda _module, args: received.append(args[0]))
    )
    try:
        _, output = run(reference, ONE_WORD, (WIDE,))
    finally:
        handle.remove()
    torch.testing.assert_close(output.hidden_states[1], received[0], rtol=0, atol=0)


def test_attention_rows_sum_to_one_and_only_gemmas_look_ahead(family: str, reference: Reference) -> None:
    inputs, output = run(reference, ONE_WORD, (WIDE,))
    attention = output.attentions[0][0]
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))
    ahead = attention.mean(0).triu(1) > 0
    vision = inputs["input_ids"][0] == reference.model.config.image_token_id
    within_image = vision[:, None] & vision
    assert ahead[within_image].any() == (family in {"gemma3", "paligemma"})
    assert ahead[~within_image].any() == (family == "paligemma")


def test_gemma3s_first_layer_sees_no_further_than_its_window(references: dict[str, Reference]) -> None:
    reference = references["gemma3"]
    inputs, output = run(reference, SEVERAL_TURNS, (TALL,))
    window = reference.model.config.text_config.sliding_window
    length = inputs["input_ids"].shape[1]
    assert length > 2 * window
    distance = torch.arange(length)[:, None] - torch.arange(length)
    attention = output.attentions[0][0].mean(0)
    assert (attention[distance >= window] == 0).all()
    assert (output.attentions[1][0].mean(0)[distance >= window] > 0).all()


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_crops_are_told_apart_by_tokens_that_are_not_vision(
    family: str, references: dict[str, Reference]
) -> None:
    reference = references[family]
    tokenizer = reference.processor.tokenizer
    inputs, _ = run(reference, ONE_WORD, (WIDE,))
    pieces = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    n_rows, n_columns = (3, 4) if family == "idefics3" else (2, 3)
    for row in range(n_rows):
        for column in range(n_columns):
            assert pieces.count(f"<row_{row + 1}_col_{column + 1}>") == 1
    assert pieces.count("<global-img>") == 1
    assert pieces.count("<fake_token_around_image>") == n_rows * n_columns + 2


def test_two_images_in_one_onevision_row_get_no_crops(references: dict[str, Reference]) -> None:
    one, _ = run(references["llava_onevision"], ONE_WORD, (WIDE,))
    two, _ = run(references["llava_onevision"], SECOND_IMAGE_LATER, (WIDE, NARROW))
    assert one["pixel_values"].shape[:2] == (1, 7)
    assert two["pixel_values"].shape[:2] == (2, 1)
    assert two["batch_num_images"].tolist() == [2]


def test_a_prompt_has_one_bos_token_where_the_family_has_one(family: str, reference: Reference) -> None:
    bos = reference.processor.tokenizer.bos_token_id
    inputs, _ = run(reference, ONE_WORD, (WIDE,))
    tokens = inputs["input_ids"][0]
    if family.startswith("qwen") or family in {"internvl", "llava_onevision"}:
        assert bos is None
    else:
        assert (tokens == bos).sum() == 1
        # PaliGemma's stands behind its image tokens.
        assert tokens[36 if family == "paligemma" else 0] == bos


def test_qwens_older_templates_put_in_a_system_text(references: dict[str, Reference]) -> None:
    with_default = {
        family
        for family, reference in references.items()
        if reference.inputs(ONE_WORD, pictures((WIDE,)))
        and "You are a helpful assistant." in reference.processor.expanded
    }
    assert with_default == {"qwen2_vl", "qwen2_5_vl"}


def test_gemma3_refuses_roles_that_do_not_alternate(references: dict[str, Reference]) -> None:
    twice = Conversation((*ONE_WORD.turns[:1], *ONE_WORD.turns))
    with pytest.raises(Exception, match="must alternate"):
        references["gemma3"].represent(twice, pictures((WIDE, WIDE)))


# ------------------------------------------------------------------------------------------- checkpoints


def test_every_tensor_of_a_checkpoint_is_used_and_none_is_missing(
    family: str, folders: dict[str, Path]
) -> None:
    _, report = AutoModelForImageTextToText.from_pretrained(folders[family], output_loading_info=True)
    assert not any(report.values())


def test_image_processor_and_tokenizer_load_without_torchvision(
    family: str, folders: dict[str, Path]
) -> None:
    assert type(AutoImageProcessor.from_pretrained(folders[family])).__name__.endswith("Pil")
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    for text in ("plain text", "빨간 원은 몇 개입니까?", "他们是谁？", "🦆 naïve\n\n  two  spaces", "\t\x7f"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_files_are_those_of_the_hub(family: str, folders: dict[str, Path]) -> None:
    names = {file.name for file in folders[family].iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    if family == "qwen2_5_vl":
        expected |= {"preprocessor_config.json", "chat_template.json"}
    elif family == "paligemma":
        expected |= {"processor_config.json"}
    else:
        expected |= {"processor_config.json", "chat_template.jinja"}
    assert names == expected


def test_the_seed_decides_the_weights_and_nothing_else(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    again = write_tiny_vlm(family, tmp_path / "again")
    other = write_tiny_vlm(family, tmp_path / "other", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    digests = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
        for folder in (folders[family], again, other)
    ]
    assert digests[0] == digests[1]
    assert {name for name in digests[0] if digests[0][name] != digests[2][name]} == {"model.safetensors"}


def test_images_beyond_qwens_limit_are_scaled_down(references: dict[str, Reference]) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        got = references[family].represent(ONE_WORD, [picture(0, (400, 300))])
        assert 24 < got.n_vision_tokens <= 36


def test_a_checkpoint_of_one_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        write_tiny_vlm("llava", tmp_path, layers=1)


def test_a_paligemma_without_a_template_has_no_reference(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Reference(folders["paligemma"])
