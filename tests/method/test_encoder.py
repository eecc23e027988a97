"""The representation against the whole model with eager attention, on a real architecture and processor."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

from scalselect_assets.method.chat import render_chat
from scalselect_assets.method.conversation import IMAGE, Conversation, Turn
from scalselect_assets.method.encoder import (
    ChatSample,
    ModelLoadError,
    Representation,
    VlmEncoder,
    load_encoder,
)
from scalselect_assets.method.families import UnsupportedModelError
from scalselect_assets.method.rejection import Rejection, RejectionReason
from tests.conftest import png_bytes

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def encoder(demo_vlm: Path) -> VlmEncoder:
    return load_encoder(str(demo_vlm), device="cpu")


@pytest.fixture(scope="module")
def full_model(demo_vlm: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(demo_vlm, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def processor(demo_vlm: Path) -> Any:
    return AutoProcessor.from_pretrained(demo_vlm)


def sample(*turns: tuple[str, tuple[Any, ...]], seed: int = 0) -> ChatSample:
    conversation = Conversation(tuple(Turn(role, parts) for role, parts in turns))  # type: ignore[arg-type]
    images = [png_bytes(seed + index) for index in range(conversation.n_images)]
    return ChatSample(conversation, tuple((lambda data=data: data) for data in images))


SAMPLES = {
    "one-word answer that the question contains": sample(
        ("user", (IMAGE, "Is it red? Answer Yes or No.")), ("assistant", ("Yes",)), seed=1
    ),
    "several turns and a system text": sample(
        ("system", ("Answer briefly.",)),
        ("user", (IMAGE, "빨간 원은 몇 개입니까?")),
        ("assistant", ("둘",)),
        ("user", ("And how many squares are on the left of the largest circle?",)),
        ("assistant", ("Two squares, both of them small and blue.",)),
        seed=2,
    ),
    "two images, the second in a later turn, after its text": sample(
        ("user", (IMAGE, "他们是谁？")),
        ("assistant", ("A",)),
        ("user", ("What is A?", IMAGE)),
        ("assistant", ("A",)),
        seed=3,
    ),
}


def reference(
    model: LlavaForConditionalGeneration, processor: Any, item: ChatSample, attention_mass: float = 0.9
) -> tuple[np.ndarray, int]:
    """The representation by the definition, from the whole model's hidden states and attentions."""
    chat = render_chat(processor, item.conversation)
    images = [Image.open(io.BytesIO(read())).convert("RGB") for read in item.images]
    inputs = processor(text=[chat.text], images=[images], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    tokens = inputs["input_ids"][0]
    vision = tokens == model.config.image_token_id
    instruction = ~vision & ~answer_tokens(processor, tokens)
    shares = output.attentions[0][0].mean(0)[instruction][:, vision].mean(0)
    shares = shares / shares.sum()
    order = shares.argsort(descending=True, stable=True)
    kept = order[: int((shares[order].cumsum(0) <= attention_mass).sum()) + 1]
    return output.hidden_states[1][0][vision][kept].mean(0).numpy(), len(kept)


def answer_tokens(processor: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens between ``ASSISTANT:`` and the end-of-sequence token, as the demo template writes answers."""
    pieces = processor.tokenizer.convert_ids_to_tokens(tokens.tolist())
    answer, inside = [], False
    for index, piece in enumerate(pieces):
        if piece == processor.tokenizer.eos_token:
            inside = False
        answer.append(inside)
        if piece == ":" and "ASSISTANT" in "".join(pieces[max(0, index - 9) : index]).rsplit("USER", 1)[-1]:
            inside = True
    return torch.tensor(answer)


def represent(encoder: VlmEncoder, items: list[ChatSample], batch_size: int = 8) -> list[Representation]:
    outcomes = list(encoder.encode(items, batch_size=batch_size))
    assert all(isinstance(outcome, Representation) for outcome in outcomes), outcomes
    return outcomes  # type: ignore[return-value]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_representation_equals_the_one_of_the_whole_model(
    name: str, encoder: VlmEncoder, full_model: LlavaForConditionalGeneration, processor: Any
) -> None:
    (got,) = represent(encoder, [SAMPLES[name]])
    expected, n_kept = reference(full_model, processor, SAMPLES[name])
    assert got.n_dominant_tokens == n_kept
    np.testing.assert_allclose(got.vector, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch_size_and_order_do_not_matter(encoder: VlmEncoder, batch_size: int) -> None:
    items = list(SAMPLES.values())
    alone = represent(encoder, items, batch_size=1)
    together = represent(encoder, items[::-1], batch_size=batch_size)[::-1]
    for first, second in zip(alone, together, strict=True):
        assert first.n_dominant_tokens == second.n_dominant_tokens
        np.testing.assert_allclose(first.vector, second.vector, atol=1e-5, rtol=0)


def test_the_tokenizers_padding_side_does_not_matter(
    demo_vlm: Path, tmp_path: Path, encoder: VlmEncoder
) -> None:
    other = shutil.copytree(demo_vlm, tmp_path / "left")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    items = list(SAMPLES.values())
    for right, left in zip(
        represent(encoder, items), represent(load_encoder(str(other), device="cpu"), items), strict=True
    ):
        np.testing.assert_allclose(right.vector, left.vector, atol=1e-5, rtol=0)


def test_the_answers_own_words_are_not_instruction(encoder: VlmEncoder) -> None:
    short = sample(("user", (IMAGE, "Count.")), ("assistant", ("One",)), seed=4)
    long = sample(("user", (IMAGE, "Count.")), ("assistant", ("One, and then " * 9,)), seed=4)
    a, b = represent(encoder, [short, long])
    assert a.n_tokens < b.n_tokens
    assert a.n_instruction_tokens == b.n_instruction_tokens


def test_vision_instruction_and_answer_tokens_add_up(encoder: VlmEncoder, processor: Any) -> None:
    item = SAMPLES["one-word answer that the question contains"]
    (got,) = represent(encoder, [item])
    answer = processor.tokenizer("ASSISTANT: Yes", add_special_tokens=False)["input_ids"]
    prefix = processor.tokenizer("ASSISTANT:", add_special_tokens=False)["input_ids"]
    assert got.n_vision_tokens == 64
    assert 1 <= got.n_tokens - got.n_vision_tokens - got.n_instruction_tokens <= len(answer) - len(prefix)


def test_a_bad_row_does_not_touch_its_neighbours(encoder: VlmEncoder) -> None:
    good = list(SAMPLES.values())
    missing = ChatSample(good[0].conversation, (lambda: Path("/no/such/image.png").read_bytes(),))
    broken = ChatSample(good[0].conversation, (lambda: b"not an image",))
    too_long = sample(("user", (IMAGE, "word " * 3000)), ("assistant", ("a",)))
    outcomes = list(encoder.encode([broken, good[0], missing, too_long, good[1]], batch_size=5))
    reasons = [item.reason if isinstance(item, Rejection) else None for item in outcomes]
    assert reasons == [
        RejectionReason.UNDECODABLE_IMAGE,
        None,
        RejectionReason.MISSING_IMAGE,
        RejectionReason.TOO_LONG,
        None,
    ]
    (alone,) = represent(encoder, [good[0]])
    np.testing.assert_allclose(outcomes[1].vector, alone.vector, atol=1e-5, rtol=0)  # type: ignore[union-attr]


def test_a_conversation_that_the_template_refuses_is_rejected(encoder: VlmEncoder) -> None:
    odd = SAMPLES["one-word answer that the question contains"]
    turns = (Turn("tool", ("result",)), *odd.conversation.turns)  # type: ignore[arg-type]
    (outcome,) = encoder.encode([ChatSample(Conversation(turns), odd.images)])
    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.TEMPLATE_REFUSED


def test_an_image_beyond_the_pixel_limit_is_rejected(demo_vlm: Path) -> None:
    small = load_encoder(str(demo_vlm), device="cpu", max_pixels=100)
    (outcome,) = small.encode([SAMPLES["one-word answer that the question contains"]])
    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.IMAGE_TOO_LARGE


def test_representations_that_are_not_finite_are_rejected(demo_vlm: Path) -> None:
    encoder = load_encoder(str(demo_vlm), device="cpu")
    encoder._model.get_decoder().layers[0].mlp.down_proj.weight.fill_(torch.inf)
    (outcome,) = encoder.encode([SAMPLES["one-word answer that the question contains"]])
    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.NON_FINITE


def test_only_the_first_layer_and_no_head_is_loaded(
    encoder: VlmEncoder, full_model: LlavaForConditionalGeneration
) -> None:
    names = {name for name, _ in encoder._model.named_parameters()}
    assert not any("lm_head" in name or ".layers.1." in name for name in names if "language_model" in name)
    layers = full_model.model.language_model.layers
    unused = sum(p.numel() for layer in layers[1:] for p in layer.parameters())
    unused += full_model.lm_head.weight.numel()
    total = sum(p.numel() for p in full_model.parameters())
    assert encoder.card.n_parameters == total - unused


def test_a_higher_attention_mass_keeps_more_tokens(demo_vlm: Path, encoder: VlmEncoder) -> None:
    wide = load_encoder(str(demo_vlm), device="cpu", attention_mass=0.99)
    item = SAMPLES["one-word answer that the question contains"]
    assert represent(wide, [item])[0].n_dominant_tokens > represent(encoder, [item])[0].n_dominant_tokens


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(
    demo_vlm: Path, tmp_path: Path, encoder: VlmEncoder
) -> None:
    copy = shutil.copytree(demo_vlm, tmp_path / "elsewhere")
    assert load_encoder(str(copy), device="cpu").card.fingerprint == encoder.card.fingerprint


@pytest.mark.parametrize("change", ["attention_mass", "dtype", "weights", "image size", "chat template"])
def test_whatever_changes_representations_changes_the_fingerprint(
    change: str, demo_vlm: Path, tmp_path: Path, encoder: VlmEncoder
) -> None:
    folder = shutil.copytree(demo_vlm, tmp_path / "changed")
    options: dict[str, Any] = {}
    if change == "attention_mass":
        options["attention_mass"] = 0.8
    elif change == "dtype":
        options["dtype"] = "bfloat16"
    elif change == "weights":
        data = bytearray((folder / "model.safetensors").read_bytes())
        # The last tensor by name is the vision tower's or the projector's: one that is used.
        data[-2] ^= 0x01
        (folder / "model.safetensors").write_bytes(bytes(data))
    elif change == "image size":
        config = json.loads((folder / "processor_config.json").read_text())
        config["image_processor"]["rescale_factor"] = 0.004
        (folder / "processor_config.json").write_text(json.dumps(config))
    else:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
    assert load_encoder(str(folder), device="cpu", **options).card.fingerprint != encoder.card.fingerprint


def test_a_missing_folder_and_a_missing_device_are_said_plainly(demo_vlm: Path) -> None:
    with pytest.raises(ModelLoadError, match="no folder"):
        load_encoder("./no/such/model")
    if not torch.cuda.is_available():
        with pytest.raises(ModelLoadError, match="no CUDA device"):
            load_encoder(str(demo_vlm), device="cuda")


def test_a_checkpoint_that_lacks_needed_weights_is_refused(demo_vlm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(demo_vlm, tmp_path / "torn")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.0.self_attn.q_proj" in name and "language" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lacks 1 weights"):
        load_encoder(str(folder), device="cpu")


def test_a_model_that_reads_no_images_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="not an image-text-to-text model"):
        load_encoder(str(tmp_path), device="cpu")


def test_a_family_without_declared_facts_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen2_vl").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"not supported yet; supported: LLaVA-1\.5"):
        load_encoder(str(tmp_path), device="cpu")


def test_a_llava_with_another_kind_of_vision_tower_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llava", vision_config={"model_type": "pixtral"})
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="vision tower of type 'pixtral'"):
        load_encoder(str(tmp_path), device="cpu")


def test_a_threshold_outside_its_range_is_refused(demo_vlm: Path) -> None:
    with pytest.raises(ValueError, match=r"not in \(0, 1\]"):
        load_encoder(str(demo_vlm), attention_mass=0)
