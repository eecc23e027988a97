"""Whatever a row names its images by, they are found; what is ambiguous is refused for its own reason."""

import json

import pytest

from scalselect_assets.method.representation.conversation import IMAGE
from scalselect_assets.method.representation.rejection import RejectionReason as Reason
from scalselect_assets.resources.samples import parse_row, with_image_paths, written_turns

ANSWER = {"role": "assistant", "content": "A dog."}


def asked(content: object = "What is it?", **turn: object) -> dict:
    return {"messages": [{"role": "user", "content": content, **turn}, ANSWER]}


def parts(*content: object) -> dict:
    return asked(list(content))


def text(said: str = "What is it?") -> dict:
    return {"type": "text", "text": said}


READ = {
    "image": {**asked(), "image": "a.png"},
    "path object": {**asked(), "images": [{"path": "a.png", "bytes": None}]},
    "image_path": {**asked(), "image_path": "a.png"},
    "image_paths": {**asked(), "image_paths": ["a.png"]},
    "img": {**asked(), "img": "a.png"},
    "image_url": {**asked(), "image_url": {"url": "a.png"}},
    "png": {**asked(), "png": "a.png", "images": None},
    "in the turn": asked(images=["a.png"]),
    "in the turn, marked": asked("<image>What is it?", image="a.png"),
    "in the text": asked("<img>a.png</img>\nWhat is it?"),
    "openai": parts({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, text()),
    "openai responses": parts(
        {"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What is it?"}
    ),
    "trl": {**parts({"type": "image", "text": None}, text()), "images": ["a.png"]},
    "axolotl": parts({"type": "image", "path": "a.png"}, text()),
    "chat template": parts({"type": "image", "image": "a.png"}, "What is it?"),
    "qwen": parts({"image": "a.png"}, {"text": "What is it?"}),
    "hf url": parts({"type": "image", "url": "a.png"}, text()),
    "marks in text parts": {**parts(text("<image>\nWhat is it?")), "images": ["a.png"]},
    "named twice": {**parts({"type": "image", "path": "a.png"}, text()), "images": ["a.png"]},
    "minicpm": {**asked("(<image>./</image>)\nWhat is it?"), "image": "a.png"},
}


@pytest.mark.parametrize("name", READ)
def test_an_image_is_found_under_every_common_name(name: str) -> None:
    sample = parse_row(json.dumps(READ[name])).sample

    assert sample is not None
    assert sample.images == ("a.png",)
    assert sample.conversation.turns[0].parts == (IMAGE, "What is it?")


@pytest.mark.parametrize("name", READ)
def test_an_image_is_renamed_wherever_it_is_named(name: str) -> None:
    row = {**READ[name], "n": 1.50, "keep": "a.png?"}

    renamed = with_image_paths(json.dumps(row), ["b/한.png"])

    sample = parse_row(renamed).sample
    assert sample is not None
    assert sample.images == ("b/한.png",)
    assert json.loads(renamed)["keep"] == "a.png?"
    assert written_turns(renamed) == written_turns(json.dumps(row))


def test_images_of_several_places_come_in_the_order_of_their_marks() -> None:
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, text("and"), {"type": "image", "path": "b.png"}]},
            ANSWER,
            {"role": "user", "content": "Picture 3: <img>c.png</img> <image>?"},
            ANSWER,
        ],
        "images": ["a.png", "d.png"],
    }
    sample = parse_row(json.dumps(row)).sample

    assert sample is not None
    assert sample.images == ("a.png", "b.png", "c.png", "d.png")
    again = parse_row(with_image_paths(json.dumps(row), ["1", "2", "longer/3.png", "4"])).sample
    assert again is not None
    assert again.images == ("1", "2", "longer/3.png", "4")
    assert again.conversation == sample.conversation


@pytest.mark.parametrize("mark", [
    "<|image|>", "<image_1>", "<image1>", "<image-1>", "<IMAGE>", "<Image>", "<|image_1|>", "<|image_pad|>",
    "<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>", "<ImageHere>", "[IMG]", "<img_1>",
    "<image_0>", "<image_placeholder>",
])  # fmt: skip
def test_another_models_mark_is_translated_where_it_is_plain_and_refused_elsewhere(mark: str) -> None:
    sample = parse_row(json.dumps({**asked(f"{mark}What is it?"), "image": "a.png"})).sample
    assert sample is not None
    assert sample.conversation.turns[0].parts == (IMAGE, "What is it?")

    for row in (
        asked(f"{mark}What is it?"),
        {**asked(f"{mark}{mark}What is it?"), "image": "a.png"},
        {**asked(f"<image>{mark}What is it?"), "image": "a.png"},
        {**asked(f"{mark}What is it?"), "images": ["a.png", "b.png"]},
    ):
        rejection = parse_row(json.dumps(row)).rejection
        assert rejection is not None
        assert rejection.reason is Reason.FOREIGN_IMAGE_MARK
        assert mark[:8] in rejection.detail


def test_numbered_marks_are_translated_in_order_only() -> None:
    images = {"images": ["a.png", "b.png"]}
    in_order = parse_row(json.dumps({**asked("<image_1> or <image_2>?"), **images})).sample
    swapped = parse_row(json.dumps({**asked("<image_2> or <image_1>?"), **images})).rejection

    assert in_order is not None
    assert in_order.conversation.turns[0].parts == (IMAGE, "or", IMAGE, "?")
    assert swapped is not None
    assert swapped.reason is Reason.FOREIGN_IMAGE_MARK


@pytest.mark.parametrize(
    "row",
    [
        {**asked("<video>\nWhat?"), "video": "a.mp4"},
        {**asked("What?"), "videos": ["a.mp4"]},
        {**asked("<image>\n<video>Same?"), "images": ["a.png"], "videos": ["a.mp4"]},
        {**asked("<audio>What?"), "audios": ["a.wav"]},
        asked("<video>What?"),
        asked("<|audio|>What?"),
        asked(audio="a.wav"),
        parts({"type": "video", "video": "a.mp4"}, text()),
        parts({"type": "input_audio", "input_audio": {"data": "x"}}, text()),
        parts({"type": "video_url", "video_url": {"url": "a.mp4"}}, text()),
        {**asked(), "clip": "deep/a.MP4"},
        {**asked(), "video_path": "a"},
    ],
)
def test_a_row_with_other_media_is_never_text_only(row: dict) -> None:
    rejection = parse_row(json.dumps(row), keep_text_only=True).rejection

    assert rejection is not None
    assert rejection.reason is Reason.OTHER_MEDIA


def test_other_media_that_are_not_there_are_no_media() -> None:
    row = {**asked(), "images": ["a.png"], "videos": [], "audio": None, "audios": "", "source_clip": "a.mp4"}

    assert parse_row(json.dumps(row)).sample is not None


@pytest.mark.parametrize(
    "row",
    [
        {**asked(), "picture": "deep/a.PNG"},
        {**asked(), "file_name": "a.jpg"},
        {**asked(), "screenshots": ["a.webp"]},
        {**asked(), "photo": {"path": "a.jpeg"}},
        asked(attachment="a.png"),
        asked("![a dog](images/a.png) What is it?"),
        asked('<img src="a.png"> What is it?'),
    ],
)
def test_an_image_that_is_not_read_is_never_text_only(row: dict) -> None:
    rejection = parse_row(json.dumps(row), keep_text_only=True).rejection

    assert rejection is not None
    assert rejection.reason is Reason.UNREAD_IMAGE


@pytest.mark.parametrize(
    "row",
    [
        {**asked("Name a colour."), "image": ""},
        {**asked("Describe this image."), "has_image": False, "image_id": "0123"},
        {**asked("What does example.png mean?"), "source": "wiki", "url": "https://x.org/page"},
        asked([text("What?")]),
    ],
)
def test_a_row_of_text_is_text_only(row: dict) -> None:
    rejection = parse_row(json.dumps(row)).rejection

    assert rejection is not None
    assert rejection.reason is Reason.TEXT_ONLY
    assert parse_row(json.dumps(row), keep_text_only=True).sample is not None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**asked(), "img": "a.png", "image_path": "b.png"}, Reason.UNREAD_IMAGE),
        ({**asked(images=["a.png"]), "images": ["b.png"]}, Reason.MALFORMED_ROW),
        (asked("<image><image>?", images=["a.png"]), Reason.IMAGE_COUNT_MISMATCH),
        ({**parts({"type": "image"}, text("<image>?")), "images": ["a.png"]}, Reason.IMAGE_COUNT_MISMATCH),
        (parts({"type": "image"}, text()), Reason.IMAGE_COUNT_MISMATCH),
        (parts({"type": "image", "path": ["a.png", "b.png"]}, text()), Reason.MALFORMED_ROW),
    ],
)
def test_images_that_cannot_be_told_apart_are_refused(row: dict, reason: Reason) -> None:
    rejection = parse_row(json.dumps(row)).rejection

    assert rejection is not None
    assert rejection.reason is reason


@pytest.mark.parametrize("role", ["model", "bot", "GPT", "assistant"])
def test_an_answer_has_many_names(role: str) -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": role, "content": "x"}],
        "image": "a",
    }

    sample = parse_row(json.dumps(row)).sample

    assert sample is not None
    assert sample.conversation.turns[1].role == "assistant"
