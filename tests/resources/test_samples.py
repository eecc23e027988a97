"""One row's text is one sample or one rejection, whatever the text is."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from scalselect_assets.method.representation.rejection import RejectionReason as Reason
from scalselect_assets.resources import written_json
from scalselect_assets.resources.samples import (
    content_key,
    conversation_of,
    occurrence_key,
    parse_row,
    text_key,
    with_image_paths,
    written_turns,
)

ASK = {"role": "user", "content": "<image>\nWhat is it?"}
ANSWER = {"role": "assistant", "content": "A dog."}
ROW = {"messages": [ASK, ANSWER], "images": ["a.png"]}


def parse(**fields):
    return parse_row(json.dumps({**ROW, **fields}))


def sample_of(**fields):
    parsed = parse(**fields)
    assert parsed.rejection is None
    return parsed.sample


def turns(*contents: str):
    """User and assistant turns in alternation."""
    return [
        {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)
    ]


def rejected(text: str) -> tuple[Reason, str]:
    parsed = parse_row(text)
    assert parsed.sample is None
    return parsed.rejection.reason, parsed.rejection.detail


def test_sharegpt_llava_and_llama_factory_rows_say_the_same():
    llava = {
        "id": "x",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A dog."},
        ],
    }
    mixed = {"images": ["a.png"], "conversations": ROW["messages"], "messages": None}
    llama_factory = {"images": ["a.png"], "conversations": llava["conversations"], "system": "", "tools": ""}
    samples = [parse_row(json.dumps(row), 5).sample for row in (ROW, llava, mixed, llama_factory)]

    assert [sample.row_format for sample in samples] == ["sharegpt", "llava", "llava", "llava"]
    assert {sample.row for sample in samples} == {5}
    assert {sample.images for sample in samples} == {("a.png",)}
    assert {sample.conversation for sample in samples} == {
        Conversation((Turn("user", (IMAGE, "What is it?")), Turn("assistant", ("A dog.",))))
    }


def test_roles_are_read_in_any_case_and_under_either_name():
    contents = [" User ", "GPT", "HUMAN", "Assistant"]
    row_turns = [
        {"from": role, "value": "<image>" if not place else "x"} for place, role in enumerate(contents)
    ]

    conversation = sample_of(messages=row_turns).conversation

    assert [turn.role for turn in conversation.turns] == ["user", "assistant", "user", "assistant"]


def test_a_field_that_a_table_fills_with_null_is_absent():
    row = [{"role": None, "from": "human", "content": None, "value": "<image> a"}, ANSWER]

    assert sample_of(messages=row, conversations=None, image=None, system=None).conversation.n_images == 1


def test_the_rows_system_text_leads_unless_a_system_turn_does():
    def roles_and_texts(**fields):
        return [(turn.role, turn.parts) for turn in sample_of(**fields).conversation.turns][:1]

    own = [{"role": "system", "content": "turn"}, ASK, ANSWER]
    assert roles_and_texts(system="Be brief. ") == [("system", ("Be brief. ",))]
    assert roles_and_texts(system="Be brief.", messages=own) == [("system", ("turn",))]
    assert roles_and_texts(system="  ") == roles_and_texts() == [("user", (IMAGE, "What is it?"))]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("<image>\nWhat?", (IMAGE, "What?")),
        ("What is this <image> ?\n", ("What is this", IMAGE, "?")),
        ("a<image><image> \n", ("a", IMAGE, IMAGE)),
        ("<image> first <image> second", (IMAGE, "first", IMAGE, "second")),
    ],
)
def test_text_is_split_at_its_marks_and_each_mark_keeps_its_place(content, parts):
    images = ["a.png"] * content.count("<image>")

    sample = sample_of(messages=turns(content, "x", " and\n"), images=images)

    assert sample.conversation.turns[0].parts == parts
    assert sample.conversation.turns[2].parts == (" and\n",)


def test_marks_in_later_turns_stay_there():
    sample = sample_of(messages=turns("Hello", "Hi", "Who?<image>", "Me."), images=["a.png"])

    assert [turn.parts for turn in sample.conversation.turns] == [
        ("Hello",),
        ("Hi",),
        ("Who?", IMAGE),
        ("Me.",),
    ]


def test_images_without_any_mark_stand_before_the_first_user_text():
    unmarked = [{"role": "system", "content": "s"}, *turns("What?", "x", "Why?", "y")]

    sample = sample_of(messages=unmarked, images=["a.png", "b.png"])

    assert [turn.parts for turn in sample.conversation.turns][:3] == [("s",), (IMAGE, IMAGE, "What?"), ("x",)]
    blank_first = sample_of(messages=turns(" ", "x", "Why?", "y")).conversation
    assert [turn.parts for turn in blank_first.turns] == [(" ",), ("x",), (IMAGE, "Why?"), ("y",)]


def test_images_are_a_path_or_a_list_of_paths_verbatim():
    two = turns("<image><image>What?", "x")
    for fields in (
        {"images": ["a b.png", "한/b.png"]},
        {"image": ["a b.png", "한/b.png"], "images": []},
        {"image": ["a b.png", "한/b.png"], "images": ["a b.png", "한/b.png"]},
    ):
        assert sample_of(messages=two, **fields).images == ("a b.png", "한/b.png")
    assert sample_of(images="a.png", image="").images == ("a.png",)


@pytest.mark.parametrize(
    ("written", "source_id"),
    [
        ("7", "7"),
        ('"7"', "7"),
        ('" 007 "', " 007 "),
        ("1.50", "1.50"),
        ("1e3", "1e3"),
        ("9" * 5000, "9" * 5000),
        ("NaN", "NaN"),
        ("true", "true"),
        ("null", None),
        ('""', ""),
        ('["a", 1.0]', '["a", 1.0]'),
        ('{"k":  [null, "한"]}', '{"k": [null, "한"]}'),
        ('"\\ud800x"', "\\ud800x"),
    ],
)
def test_an_id_is_kept_as_it_is_written(written, source_id):
    parsed = parse_row(json.dumps(ROW)[:-1] + f', "id": {written}}}')

    assert parsed.rejection is None
    assert parsed.source_id == parsed.sample.source_id == source_id


def test_a_row_without_an_id_has_none_and_a_rejected_row_keeps_its_own():
    assert parse().source_id is None
    assert parse_row('{"id": 12, "messages": 3}').source_id == "12"
    assert parse(id="a", images=[]).source_id == "a"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"messages": None}, "`messages` is empty"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "hello"}, "`messages` is the string 'hello'"),
        ({"messages": {"role": "user"}}, "`messages` is an object"),
        ({"conversations": [ASK]}, "both `messages` and `conversations`"),
        ({"messages": ["hi", ANSWER]}, "turn 0 is the string 'hi'"),
        ({"messages": [ASK, {"role": "tool", "content": "x"}]}, "turn 1 has 'tool' for its role"),
        ({"messages": [{"content": "x"}, ANSWER]}, "turn 0 has null or absent for its role"),
        ({"messages": [{"role": 3, "content": "x"}, ANSWER]}, "turn 0 has the number 3 for its role"),
        ({"messages": [{"role": "user"}, ANSWER]}, "the content of turn 0 is null or absent"),
        ({"messages": [ASK, {"role": "gpt", "content": 1.5}]}, "the content of turn 1 is the number 1.5"),
        ({"messages": [{"role": "user", "content": {"type": "image"}}, ANSWER]}, "turn 0 is an object"),
        ({"messages": [{"role": "user", "content": [3]}, ANSWER]}, "part 0 of turn 0 is the number 3"),
        ({"messages": [{"role": "user", "content": [{"type": "pdf"}]}, ANSWER]}, "'pdf' for its type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]},
            "`text` in part 0 of turn 0",
        ),
        ({"messages": [ASK]}, "none of the 1 turn(s) is an assistant's"),
        ({"system": ["x"]}, "`system` is a list of 1"),
        ({"images": 3}, "`images` is the number 3"),
        ({"images": False}, "`images` is a boolean"),
        ({"images": {"name": "a.png"}}, "`images` is an object"),
        ({"images": ["a.png", ""]}, "`images` holds the string ''"),
        ({"images": [None]}, "`images` holds null or absent"),
        ({"images": [{"bytes": "???", "path": None}]}, "bytes that are not Base64"),
        ({"image": "b.png"}, "`images` and `image` name different images"),
        ({"messages": [{"role": "system", "content": "x"}, ANSWER]}, "1 image(s) but no user turn"),
        ({"images": ["\ud800.png"]}, r"the lone surrogate \ud800"),
        ({"messages": [ASK, {"role": "gpt", "content": "\udfff"}]}, r"the lone surrogate \udfff"),
    ],
)
def test_a_row_off_the_layout_is_malformed_and_says_where(fields, found):
    reason, detail = rejected(json.dumps({**ROW, **fields}))

    assert reason is Reason.MALFORMED_ROW
    assert found in detail
    assert "; " in detail, "the detail names a remedy"
    detail.encode()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1]", "the row is a list of 1"),
        ("null", "the row is null"),
        ('"x"', "the row is the string 'x'"),
        ("12", "the row is the number 12"),
        ("", "not valid JSON: Expecting value at character 0"),
        ('{"messages": [', "not valid JSON"),
        ("{} {}", "not valid JSON: Extra data"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "neither `messages` nor `conversations`"),
        ('{"id": ' + "[" * 600 + "]" * 600 + ', "messages": 1}', ""),
    ],
)
def test_text_that_is_no_row_is_malformed(text, found):
    reason, detail = rejected(text)

    assert reason is Reason.MALFORMED_ROW
    assert found in detail


def test_unrelated_oddities_do_not_hurt():
    text = json.dumps(ROW)[:-1] + ', "a": NaN, "a": -Infinity, "b": "\\ud800", "c": 1' + "0" * 9000 + "}"

    assert parse_row(text).sample == sample_of()


def test_the_last_of_two_equal_keys_counts():
    assert parse_row(json.dumps(ROW)[:-1] + ', "images": ["b.png"]}').sample.images == ("b.png",)


@settings(deadline=None)
@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["user", "gpt", "<image>"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "conversations", "role", "from", "content", "value", "images", "id"]
                ),
                inner,
                max_size=5,
            )
        ),
    ).map(json.dumps)
)
def test_no_text_makes_the_parser_fall(text):
    parsed = parse_row(text)

    assert (parsed.sample is None) != (parsed.rejection is None)


def test_a_row_with_neither_image_nor_mark_is_text_only():
    for images in (None, "", []):
        row = {**ROW, "messages": turns("What?", "x"), "images": images}
        assert rejected(json.dumps(row))[0] is Reason.TEXT_ONLY


@pytest.mark.parametrize(
    ("contents", "images", "counts"),
    [
        (["<image><image>", "x"], ["a.png"], "2 <image> mark(s) but the row names 1 image(s)"),
        (["<image>", "x", "<image>?", "x"], ["a.png"] * 3, "2 <image> mark(s) but the row names 3 image(s)"),
        (["<image>What?", "x"], [], "1 <image> mark(s) but the row names 0 image(s)"),
    ],
)
def test_marks_and_images_must_be_equally_many(contents, images, counts):
    reason, detail = rejected(json.dumps({"messages": turns(*contents), "images": images}))

    assert reason is Reason.IMAGE_COUNT_MISMATCH
    assert counts in detail


def test_a_row_without_any_instruction_is_rejected_for_that():
    for contents in (["<image>", "A dog."], ["<image>\n", "A dog.", " \t", "A cat."]):
        row = {**ROW, "messages": turns(*contents)}
        assert rejected(json.dumps(row))[0] is Reason.NO_INSTRUCTION_TEXT
    assert sample_of(messages=turns("<image>", "A dog."), system="Describe.")


def test_reasons_are_tried_in_the_documented_order():
    no_text_no_image = turns(" ", "x")
    assert rejected(json.dumps({"messages": no_text_no_image}))[0] is Reason.TEXT_ONLY
    assert rejected(json.dumps({"messages": turns("<image>", "x")}))[0] is Reason.IMAGE_COUNT_MISMATCH
    assert rejected(json.dumps({"messages": no_text_no_image[:1]}))[0] is Reason.MALFORMED_ROW


def test_a_detail_does_not_repeat_an_embedded_image():
    row = {**ROW, "messages": [{"role": "data:" + "A" * 10_000, "content": "x"}, ANSWER]}

    assert len(rejected(json.dumps(row))[1]) < 400


def test_the_content_key_covers_turns_marks_and_images_and_nothing_else():
    key = content_key(sample_of(), ["a.png"])
    same = [
        content_key(sample_of(id=5, extra=[1]), ["a.png"]),
        content_key(sample_of(images=["./a.png"]), ["a.png"]),
        content_key(sample_of(images="a.png"), ["a.png"]),
        content_key(sample_of(messages=turns("What is it?", "A dog.")), ["a.png"]),
    ]
    other = [
        content_key(sample_of(), ["b.png"]),
        content_key(sample_of(messages=turns("What is it?<image>", "A dog.")), ["a.png"]),
        content_key(sample_of(messages=turns("<image>What is it?", "A cat.")), ["a.png"]),
        content_key(sample_of(system="s"), ["a.png"]),
        text_key(json.dumps(ROW)),
    ]

    assert set(same) == {key}
    assert len({key, *other}) == 1 + len(other)
    assert len(key) == 32
    assert int(key, 16) >= 0


def test_occurrences_of_one_content_have_keys_of_their_own():
    keys = [occurrence_key("ab", n) for n in range(5)]

    assert keys[0] == "ab"
    assert len(set(keys)) == 5
    assert keys == [occurrence_key("ab", n) for n in range(5)]


def test_new_image_paths_leave_the_rest_of_the_row_verbatim():
    said = f'"messages" :{json.dumps(turns("What?", "x"))}'
    text = f'{{ "images" :["a.png", "a.png"],"x":{{"images": [1.50]}}, "image": null ,\n"n":1e0, {said}}}'

    assert with_image_paths(text, ["한/a.png", "b.png"]) == text.replace(
        '["a.png", "a.png"]', '["한/a.png", "b.png"]'
    )
    assert with_image_paths(f'{{"image":"a",{said}}}', ["b/a"]) == f'{{"image":"b/a",{said}}}'
    assert with_image_paths(f"{{ {said}}}", []) == f"{{ {said}}}"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": " <image> a"}, {"role": "assistant", "content": "b "}],
             "images": ["x"]},
            [("user", " <image> a"), ("assistant", "b ")],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "image": "x"},
            [("user", "<image>a"), ("assistant", "b")],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, ANSWER], "system": "s"},
            [("system", "s"), ("user", "a"), ("assistant", "A dog.")],
        ),
    ],
)  # fmt: skip
def test_turns_are_given_as_written_with_a_mark_for_each_image(row, expected):
    text = json.dumps(row)
    turns = written_turns(text)
    assert list(turns) == expected
    sample = parse_row(text).sample
    assert sample is None or conversation_of(turns) == sample.conversation


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON"])
def test_turns_of_a_malformed_row_are_an_error(text):
    with pytest.raises(ValueError, match="row"):
        written_turns(text)


def test_an_id_is_kept_as_written_however_deep_its_parts_lie():
    nested = "[" * 300 + '"x", 1.50, {"a": [true, null]}' + "]" * 300
    assert sample_of(id=0).source_id == "0"
    row = json.dumps({**ROW, "id": 0}).replace('"id": 0', f'"id": {nested}')
    assert parse_row(row).source_id == nested


def test_no_part_of_an_id_is_copied_for_each_level_around_it():
    inner, pieces = "x" * 1000, []
    written_json._write([[[{"a": inner}]]], pieces)
    assert "".join(pieces) == json.dumps([[[{"a": inner}]]])
    assert sum(map(len, pieces)) == len(inner) + len('[[[{"a": ""}]]]')
