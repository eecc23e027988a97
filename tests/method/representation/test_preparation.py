"""Which token plays which role, and which image fills which, as far as the model's own processor tells."""

import errno
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from scalselect_assets.method.representation import images, preparation
from scalselect_assets.method.representation.conversation import IMAGE, Conversation
from scalselect_assets.method.representation.encoder import ChatSample
from scalselect_assets.method.representation.preparation import Prepared, Preparer, for_transport
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from tests.method import zoo
from tests.method.samples import (
    SAMPLES,
    Counting,
    chat,
    conversation,
    question,
    read_image,
    read_image_or_fail,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FAMILIES = [family for family in zoo.FAMILIES if family != "paligemma"]
THREE_IMAGES = SAMPLES["three images of different shapes in one turn"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def preparer(family: str, tiny_preparer: Callable[..., Preparer]) -> Preparer:
    return tiny_preparer(family)


@pytest.fixture
def tokenizer(family: str, tiny_vlm: Callable[[str], Any]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_vlm(family))


def prepare(preparer: Preparer, sample: ChatSample) -> Prepared:
    (prepared,) = preparer.prepare(sample.images, [sample.conversation], read_image)
    assert isinstance(prepared, Prepared), prepared
    return prepared


def refuse(preparer: Preparer, sample: ChatSample, read: Callable[[str], bytes] = read_image) -> Rejection:
    (rejection,) = preparer.prepare(sample.images, [sample.conversation], read)
    assert isinstance(rejection, Rejection), rejection
    return rejection


def roles(prepared: Prepared) -> list[str]:
    """The role of each token."""
    names = ["answer"] * len(prepared.model_input)
    for role, positions in (
        ("vision", prepared.model_input.vision),
        ("instruction", prepared.model_input.instruction),
    ):
        for position in positions.tolist():
            assert names[position] == "answer", "a token has two roles"
            names[position] = role
    return names


def text_of(role: str, prepared: Prepared, tokenizer: Any) -> str:
    """All tokens of a role, as text."""
    ids = [
        token
        for token, own in zip(prepared.model_input.input_ids.tolist(), roles(prepared), strict=True)
        if own == role
    ]
    return str(tokenizer.decode(ids))


# Roles


def test_an_answer_is_found_where_it_stands_and_not_in_the_question(
    preparer: Preparer, tokenizer: Any
) -> None:
    prepared = prepare(preparer, question("Is it red? Answer Yes or No.", "1", "Yes"))
    assert text_of("answer", prepared, tokenizer).strip() == "Yes"
    assert "Is it red? Answer Yes or No." in text_of("instruction", prepared, tokenizer)


def test_of_several_turns_every_answer_and_no_question_is_content_of_answers(
    preparer: Preparer, tokenizer: Any
) -> None:
    prepared = prepare(preparer, SAMPLES["several turns and a system text"])
    answers = text_of("answer", prepared, tokenizer)
    assert answers.replace(" ", "") == "둘Two squares, both of them small and blue.".replace(" ", "")
    instruction = text_of("instruction", prepared, tokenizer)
    for text in ("Answer briefly.", "빨간 원은 몇 개입니까?", "And how many squares are on the left"):
        assert text in instruction


def test_an_image_after_an_answer_does_not_move_what_stands_before_or_behind(
    preparer: Preparer, tokenizer: Any
) -> None:
    prepared = prepare(preparer, SAMPLES["a second image in a later turn, after its text"])
    assert text_of("answer", prepared, tokenizer).replace(" ", "") == "AA"


def test_every_token_has_one_role(preparer: Preparer) -> None:
    for sample in SAMPLES.values():
        prepared = prepare(preparer, sample)
        names = roles(prepared)
        assert {"vision", "instruction", "answer"} == set(names)
        assert names.count("vision") == sum(image.n_tokens for image in prepared.model_input.images)
        ids = prepared.model_input.input_ids[prepared.model_input.vision]
        assert len(set(ids.tolist())) == 1
        for positions in (prepared.model_input.vision, prepared.model_input.instruction):
            assert positions.dtype == torch.int64
            assert positions.tolist() == sorted(positions.tolist())


def test_the_answers_own_words_are_not_instruction(preparer: Preparer, tokenizer: Any) -> None:
    short = prepare(preparer, question("Count.", "4", "One"))
    long = prepare(preparer, question("Count.", "4", "One, and then " * 9 + "none"))
    assert len(short.model_input) < len(long.model_input)
    assert text_of("instruction", short, tokenizer) == text_of("instruction", long, tokenizer)


def test_whitespace_at_the_end_of_an_answer_is_the_answers(preparer: Preparer, tokenizer: Any) -> None:
    """Tokenizers that trim offsets give such a token no width, at the very border."""
    plain = text_of("instruction", prepare(preparer, question("Why?", "1", "Yes")), tokenizer)
    for answer in ("Yes ", "Yes   ", "Yes \n"):
        padded = text_of("instruction", prepare(preparer, question("Why?", "1", answer)), tokenizer)
        assert padded == plain


@pytest.mark.parametrize("answer", ["", "  Yes", " \n "], ids=repr)
def test_whitespace_in_front_of_an_answer_or_alone_adds_no_instruction(
    answer: str, preparer: Preparer, tokenizer: Any
) -> None:
    plain = text_of("instruction", prepare(preparer, question("Why?", "1", "No")), tokenizer)
    padded = text_of("instruction", prepare(preparer, question("Why?", "1", answer)), tokenizer)
    assert padded.replace(" ", "") == plain.replace(" ", "")
    # A word takes the template's own space in front of it into its first token, whitespace may not.
    assert len(padded) - len(plain) <= 1


def test_an_empty_answer_leaves_nothing_but_instruction_and_vision(preparer: Preparer) -> None:
    names = roles(prepare(preparer, question("Why?", "1", "")))
    assert set(names) == {"vision", "instruction"}


# Images


@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"]
)
def test_images_are_taken_apart(family: str, tiny_preparer: Callable[..., Preparer]) -> None:
    preparer = tiny_preparer(family)
    together = prepare(preparer, THREE_IMAGES)
    assert [image.key for image in together.model_input.images] == list(together.image_sha256)
    for image, reference in zip(together.model_input.images, THREE_IMAGES.images, strict=True):
        (alone,) = prepare(preparer, question("Why?", reference)).model_input.images
        assert (image.key, image.n_tokens, image.inputs.keys()) == (
            alone.key,
            alone.n_tokens,
            alone.inputs.keys(),
        )
        for name, value in alone.inputs.items():
            # LLaVA-NeXT fills up the crops of a sample's images to the same number.
            held = torch.zeros_like(image.inputs[name])
            held[tuple(slice(size) for size in value.shape)] = value
            assert torch.equal(image.inputs[name], held), name


@pytest.mark.parametrize("family", ["llava_onevision", "idefics3", "smolvlm"])
def test_images_whose_processing_depends_on_each_other_stay_together(
    family: str, tiny_preparer: Callable[..., Preparer]
) -> None:
    preparer = tiny_preparer(family)
    prepared = prepare(preparer, THREE_IMAGES)
    (images,) = prepared.model_input.images
    assert images.key == "|".join(prepared.image_sha256)
    assert images.n_tokens == len(prepared.model_input.vision)
    (alone,) = prepare(preparer, question("Why?", "1")).model_input.images
    assert alone.key == prepared.image_sha256[0]


def test_the_same_images_in_another_order_are_other_images(preparer: Preparer) -> None:
    def keys(*references: str) -> list[str]:
        turns = (("user", (IMAGE, IMAGE, "Why?")), ("assistant", ("A",)))
        return [image.key for image in prepare(preparer, chat(*turns, images=references)).model_input.images]

    assert keys("1", "2") != keys("2", "1")
    assert keys("1", "2") == keys("1", "2:48x40")


def test_what_conversations_share_is_read_and_processed_once(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_processed = []
    # Of the class: Python looks a call up there.
    kind = type(preparer._image_processor)
    process = kind.preprocess
    monkeypatch.setattr(
        kind,
        "preprocess",
        lambda self, images, *args, **more: (
            n_processed.append(len(images)),
            process(self, images, *args, **more),
        )[1],
    )
    reader = Counting()
    conversations = [
        conversation(("user", (IMAGE, f"Is it {number}?")), ("assistant", ("No",))) for number in range(4)
    ]
    first = preparer.prepare(["1"], conversations, reader)
    assert len(n_processed) == 1
    assert reader.reads == {"1": 1}
    again = preparer.prepare(["2"], conversations, reader)
    assert len(n_processed) == 2
    for prepared, other, text in zip(first, again, conversations, strict=True):
        assert isinstance(prepared, Prepared)
        assert isinstance(other, Prepared)
        assert prepared.image_sha256 != other.image_sha256
        alone = prepare(preparer, ChatSample(text, ("1",)))
        for image, expected in zip(prepared.model_input.images, alone.model_input.images, strict=True):
            for name, value in expected.inputs.items():
                assert torch.equal(image.inputs[name], value)


# Rejections


def test_a_row_that_is_too_long_is_rejected_with_its_tokens(
    family: str, tiny_preparer: Callable[..., Preparer]
) -> None:
    sample = question("word " * 40, "1")
    n_tokens = len(prepare(tiny_preparer(family), sample).model_input)
    assert len(prepare(tiny_preparer(family, max_tokens=n_tokens), sample).model_input) == n_tokens
    rejection = refuse(tiny_preparer(family, max_tokens=n_tokens - 1), sample)
    assert rejection.reason is RejectionReason.TOO_LONG
    assert rejection.detail.startswith(f"{n_tokens:,} tokens; the model takes {n_tokens - 1:,}")
    assert "shorten or split the conversation" in rejection.detail


@pytest.mark.parametrize(
    ("family", "turns", "message"),
    [
        (
            "gemma3",
            (("user", (IMAGE, "a")), ("user", ("b",)), ("assistant", ("c",))),
            "roles must alternate user/assistant",
        ),
        (
            "llava_next",
            (("tool", ("a",)), ("user", (IMAGE, "b")), ("assistant", ("c",))),
            "Only user and assistant roles are supported",
        ),
    ],
)
def test_a_conversation_that_the_template_refuses_is_rejected_in_its_words(
    family: str, turns: Any, message: str, tiny_preparer: Callable[..., Preparer]
) -> None:
    rejection = refuse(tiny_preparer(family), chat(*turns))
    assert rejection.reason is RejectionReason.TEMPLATE_REFUSED
    assert message in rejection.detail


def test_a_conversation_with_another_number_of_images_than_marks_is_rejected(preparer: Preparer) -> None:
    text = THREE_IMAGES.conversation
    for references in (("1", "2"), ("1", "2", "3", "4")):
        rejection = refuse(preparer, ChatSample(text, references))
        assert rejection.reason is RejectionReason.PROCESSOR_REFUSED
        assert "the model's processor refuses it" in rejection.detail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.png"),
            RejectionReason.MISSING_IMAGE,
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x.png"), RejectionReason.MISSING_IMAGE),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x.png"), RejectionReason.MISSING_IMAGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_image_that_a_row_cannot_have_is_its_own_fault(
    error: OSError, reason: RejectionReason, tiny_preparer: Callable[..., Preparer]
) -> None:
    def read(reference: str) -> bytes:
        if reference == "2":
            raise error
        return read_image(reference)

    preparer = tiny_preparer("llava")
    sample = chat(("user", (IMAGE, IMAGE, "a")), ("assistant", ("b",)), images=("1", "2"))
    rejection = refuse(preparer, sample, read)
    assert (rejection.reason, rejection.detail) == (reason, f"image 2: {error}")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), TimeoutError("timed out"), ConnectionError("reset")]
)
def test_an_image_that_cannot_be_read_now_is_nobodys_fault(
    error: OSError, tiny_preparer: Callable[..., Preparer]
) -> None:
    def read(_reference: str) -> bytes:
        raise error

    with pytest.raises(type(error)) as raised:
        tiny_preparer("llava").prepare(["1"], [question("a").conversation], read)
    assert raised.value is error


def test_images_that_cannot_be_decoded_are_rejected_for_every_conversation(
    tiny_preparer: Callable[..., Preparer],
) -> None:
    preparer = tiny_preparer("llava")
    rejections = preparer.prepare(["broken"], [question("a").conversation] * 3, read_image_or_fail)
    assert [type(item) for item in rejections] == [Rejection] * 3
    assert {item.reason for item in rejections} == {RejectionReason.UNDECODABLE_IMAGE}  # type: ignore[union-attr]


def test_images_that_have_too_many_pixels_together_are_rejected_and_the_rest_is_not_read(
    tiny_preparer: Callable[..., Preparer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_ROW_PIXELS", 4 * 48 * 40)
    preparer, read = tiny_preparer("llava", max_pixels=48 * 40), Counting()
    for names in (("1", "2", "3", "4", "5", "6"), ("1",) * 6):
        sample = chat(("user", (*[IMAGE] * 6, "a")), ("assistant", ("b",)), images=names)
        rejection = refuse(preparer, sample, read)
        assert rejection.reason is RejectionReason.IMAGE_TOO_LARGE
        assert rejection.detail.startswith("image 5: with it, the images of the row have more than 7,680")
    assert read.reads == {"1": 2, "2": 1, "3": 1, "4": 1, "5": 1}
    four = chat(("user", (*[IMAGE] * 4, "a")), ("assistant", ("b",)), images=("1",) * 4)
    assert len(prepare(preparer, four).image_sha256) == 4


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([("user", (*[IMAGE] * 65, "a")), ("assistant", ("b",))], "65 images"),
        ([("user", (IMAGE, "a")), *[("assistant", ("",))] * 65], "66 turns"),
        ([("user", (IMAGE, "a" * 4096)), ("assistant", ("b",))], "4,097 characters of text"),
    ],
)
def test_a_row_that_its_size_shows_to_be_too_long_is_refused_before_an_image_is_read(
    turns: list[tuple[str, tuple[Any, ...]]], found: str, tiny_preparer: Callable[..., Preparer]
) -> None:
    preparer, read = tiny_preparer("llava", max_tokens=64), Counting()
    sample = chat(*turns, images=("1",) * conversation(*turns).n_images)
    rejection = refuse(preparer, sample, read)
    assert rejection.reason is RejectionReason.TOO_LONG
    assert rejection.detail.startswith(f"{found}; the model takes 64 tokens")
    assert not read.reads


def test_a_row_that_is_too_long_does_not_refuse_those_about_the_same_image(
    tiny_preparer: Callable[..., Preparer],
) -> None:
    preparer = tiny_preparer("llava", max_tokens=200)
    long, short = question("a" * 20_000, "1"), question("a", "1")
    too_long, prepared = preparer.prepare(["1"], [long.conversation, short.conversation], read_image)
    assert isinstance(too_long, Rejection)
    assert isinstance(prepared, Prepared)


def test_an_image_beyond_the_pixel_limit_is_rejected(tiny_preparer: Callable[..., Preparer]) -> None:
    preparer = tiny_preparer("llava", max_pixels=48 * 40)
    prepare(preparer, question("a", "1:48x40"))
    rejection = refuse(preparer, question("a", "1:48x41"))
    assert rejection.reason is RejectionReason.IMAGE_TOO_LARGE
    assert rejection.detail.startswith("image 1: 48 × 41 pixels; at most 1,920 are decoded")


# Between processes


def test_a_preparer_and_what_it_prepares_pass_between_processes_unchanged(preparer: Preparer) -> None:
    copied = pickle.loads(pickle.dumps(preparer))
    assert copied.pad_token_id == preparer.pad_token_id
    for sample in SAMPLES.values():
        here = prepare(preparer, sample)
        (sent,) = for_transport([prepare(copied, sample)])
        there = pickle.loads(pickle.dumps(sent)).as_tensors()
        assert there.image_sha256 == here.image_sha256
        assert roles(there) == roles(here)
        assert torch.equal(there.model_input.input_ids, here.model_input.input_ids)
        assert there.model_input.token_inputs.keys() == here.model_input.token_inputs.keys()
        for image, expected in zip(there.model_input.images, here.model_input.images, strict=True):
            assert (image.key, image.n_tokens) == (expected.key, expected.n_tokens)
            assert image.inputs.keys() == expected.inputs.keys()
            for name, value in expected.inputs.items():
                assert image.inputs[name].dtype == value.dtype
                assert torch.equal(image.inputs[name], value)


def test_samples_about_the_same_images_take_them_along_once(tiny_preparer: Callable[..., Preparer]) -> None:
    texts = [question(f"What is shown here, in {number} words?").conversation for number in range(8)]
    prepared = tiny_preparer("llava").prepare(["1"], texts, read_image)
    alone, together = (len(pickle.dumps(for_transport(prepared[:count]))) for count in (1, 5))
    pixels = prepared[0].model_input.images[0].inputs["pixel_values"].nbytes  # type: ignore[union-attr]
    assert pixels < alone < together < alone + pixels


def test_images_of_a_preparer_stay_here(tiny_preparer: Callable[..., Preparer]) -> None:
    """A process gets the processor, not what it processed last."""
    preparer = tiny_preparer("llava")
    before = len(pickle.dumps(preparer))
    prepare(preparer, question("a", "1:500x500"))
    assert len(pickle.dumps(preparer)) == before


# Spans, by hand


def test_answers_move_by_what_the_images_before_them_gained() -> None:
    replacements = [
        {"span": (2, 5), "new_span": (2, 12)},  # 3 characters become 10
        {"span": (20, 23), "new_span": (27, 30)},  # 3 stay 3
        {"span": (40, 43), "new_span": (47, 48)},  # 3 become 1
    ]
    spans = [(0, 2), (5, 8), (15, 20), (23, 30), (43, 43), (50, 60)]
    moved = list(preparation._expanded_spans(spans, replacements))
    assert moved == [(0, 2), (12, 15), (22, 27), (30, 37), (48, 48), (55, 65)]


def test_inputs_that_neither_count_images_nor_go_with_their_tokens_stay_together() -> None:
    values = {"pixel_values": torch.zeros(6, 3), "grid": torch.zeros(2, 2)}
    apart = preparation._by_image(values, ("a", "b"), [2, 4], None)
    assert [(image.key, len(image.inputs["pixel_values"])) for image in apart] == [("a", 2), ("b", 4)]
    (together,) = preparation._by_image({**values, "sizes": torch.zeros(1)}, ("a", "b"), [2, 4], None)
    assert (together.key, together.n_tokens, len(together.inputs["sizes"])) == ("a|b", 6, 1)
    np.testing.assert_array_equal(together.inputs["pixel_values"], values["pixel_values"])


def test_a_conversation_is_prepared_as_it_is_written() -> None:
    """Guards the helper of these tests: marks and texts keep their places."""
    assert THREE_IMAGES.conversation == Conversation.from_json(THREE_IMAGES.conversation.to_json())
