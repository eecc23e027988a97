"""Only answers are learnt, whatever the family's template; no row is cut or lost without a reason."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from scalselect_assets.method.representation.processors import load_processor
from scalselect_assets.method.representation.quiet import quiet_transformers
from scalselect_assets.method.representation.rejection import Rejection
from tests.conftest import png_bytes, sharegpt_row
from tests.training.conftest import ROWS
from training.examples import IGNORED, Collator, TrainingPrompt, TrainingRows, judge

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ENDS = {
    "llava": "</s>",  # its template writes none; after the last answer only
    "llava_next": "</s>",
    "qwen2_5_vl": "<|im_end|>",
    "internvl": "<|im_end|>",
    "idefics3": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
}


def processor_of(folder: Path) -> Any:
    with quiet_transformers():
        return load_processor(str(folder), None, AutoConfig.from_pretrained(folder))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(png_bytes(index))
    return tmp_path


def rows_of(rows: Sequence[Any], processor: Any, folder: Path) -> TrainingRows:
    return TrainingRows([json.dumps(row) for row in rows], processor, str(folder), {})


def prompts_of(rows: TrainingRows) -> list[TrainingPrompt]:
    return [rows[index] for index in range(len(rows))]


def learnt_texts(batch: dict[str, Any], tokenizer: Any) -> list[list[str]]:
    """The runs of learnt tokens of each row, as text."""
    found: list[list[str]] = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        runs: list[list[int]] = [[]]
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            if label == IGNORED:
                runs.append([])
            else:
                assert label == token
                runs[-1].append(token)
        found.append([tokenizer.decode(run).strip() for run in runs if run])
    return found


def answers(row: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]


@pytest.mark.parametrize("family", ENDS)
def test_answers_and_what_ends_them_are_learnt_and_nothing_else(
    family: str, tiny_vlm: Callable[[str], Path], pool: Path
) -> None:
    processor = processor_of(tiny_vlm(family))
    prompts = prompts_of(rows_of(ROWS, processor, pool))
    with quiet_transformers():
        batch = Collator(processor)(prompts)
    end = ENDS[family]
    expected = [[f"{answer}{end}" for answer in answers(row)] for row in ROWS]
    if family == "llava":
        expected = [[*(text.removesuffix(end) for text in texts[:-1]), texts[-1]] for texts in expected]
    assert learnt_texts(batch, processor.tokenizer) == expected


@pytest.mark.parametrize("family", ENDS)
def test_a_batch_says_of_each_row_what_the_row_alone_says(
    family: str, tiny_vlm: Callable[[str], Path], pool: Path
) -> None:
    processor = processor_of(tiny_vlm(family))
    prompts = prompts_of(rows_of(ROWS, processor, pool))
    with quiet_transformers():
        together = Collator(processor)(prompts)
        for index, prompt in enumerate(prompts):
            alone = Collator(processor)([prompt])
            assert ("pixel_values" in alone) == bool(prompt.images)
            for name in ("input_ids", "labels"):
                n = alone[name].shape[1]
                assert torch.equal(together[name][index, :n], alone[name][0])
            assert (together["labels"][index, n:] == IGNORED).all()


def test_labels_agree_with_a_template_that_marks_its_answers(demo_vlm: Path, pool: Path) -> None:
    processor = processor_of(demo_vlm)
    row = ROWS[6]
    (prompt,) = prompts_of(rows_of([row], processor, pool))
    batch = Collator(processor)([prompt])
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it Yes or No?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "No"}]},
    ]
    # The template's own marks are in the text before images are expanded: compared are the tokens marked.
    marked = processor.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    theirs = [t for t, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    eos = processor.tokenizer.eos_token_id
    ours = [label for label in batch["labels"][0].tolist() if label not in (IGNORED, eos)]
    assert ours == theirs
    assert (batch["labels"][0] == eos).sum() == 2


def test_padding_does_not_change_the_loss(demo_vlm: Path, pool: Path) -> None:
    processor = processor_of(demo_vlm)
    prompts = prompts_of(rows_of(ROWS, processor, pool))
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForImageTextToText.from_pretrained(demo_vlm)
        collator = Collator(processor)

        def total(batch: dict[str, Any]) -> float:
            # Of the sum over tokens: what the Trainer adds up over micro-batches before it divides.
            return float(model(**batch, num_items_in_batch=1).loss)

        assert total(collator(prompts)) == pytest.approx(sum(total(collator([p])) for p in prompts), rel=1e-5)


def test_rows_that_cannot_be_trained_on_are_left_out_with_a_reason_and_no_other_is(
    demo_vlm: Path, pool: Path
) -> None:
    processor = processor_of(demo_vlm)
    (pool / "broken.png").write_bytes(b"no image")
    (pool / "inside").mkdir()
    (pool / "inside" / "4.png").write_bytes((pool / "4.png").read_bytes())
    rows = [
        sharegpt_row("4.png", id="good"),
        sharegpt_row("gone.png", id=1),
        sharegpt_row("broken.png", id=2),
        sharegpt_row("../4.png", id=3),
        sharegpt_row("4.png", answer="word " * 300, id=4),
        sharegpt_row(["4.png"], "<image><image> Two?", id=5),
        sharegpt_row("4.png", id="also good"),
    ]
    (pool / "inside" / "broken.png").write_bytes(b"no image")
    found = rows_of(rows, processor, pool / "inside")
    lengths, left_out = judge(found, Collator(processor), max_tokens=200)
    assert set(lengths) == {0, 6}
    assert lengths[0] == Collator(processor)([found[0]])["input_ids"].shape[1]
    assert [(row.row, row.source_id, row.reason) for row in left_out] == [
        (1, "1", "missing_image"),
        (2, "2", "undecodable_image"),
        (3, "3", "outside_image_root"),
        (4, "4", "too_long"),
        (5, "5", "image_count_mismatch"),
    ]
    assert "at most 200 are trained on" in left_out[3].detail


def test_prompts_have_their_images_where_the_selection_had_them(
    tiny_vlm: Callable[[str], Path], pool: Path
) -> None:
    processor = processor_of(tiny_vlm("qwen2_5_vl"))
    rows = [
        json.dumps(sharegpt_row("0.png", text, "Yes")) for text in ("Is it 0?\n<image>", "<image>\nIs it 0?")
    ]

    def texts(*place: Any) -> list[str]:
        return [prompt.text for prompt in prompts_of(TrainingRows(rows, processor, str(pool), {}, *place))]

    late, early = texts("as_written")
    assert late != early
    assert texts("first") == [early, early]
    assert texts() == [late, early]


def test_a_limit_below_a_row_refuses_it_and_never_cuts_its_image(demo_vlm: Path, pool: Path) -> None:
    processor = processor_of(demo_vlm)
    rows = rows_of(ROWS, processor, pool)
    lengths, _ = judge(rows, Collator(processor), max_tokens=10_000)
    shorter, left_out = judge(rows, Collator(processor), max_tokens=lengths[0])
    assert shorter == {row: n for row, n in lengths.items() if n <= lengths[0]}
    assert {row.reason for row in left_out} == {"too_long"}
    assert len(shorter) + len(left_out) == len(ROWS)


def test_worker_processes_judge_alike(demo_vlm: Path, pool: Path) -> None:
    processor = processor_of(demo_vlm)
    rows = rows_of([*ROWS, sharegpt_row("gone.png")], processor, pool)
    assert judge(rows, Collator(processor), 150, workers=1) == judge(rows, Collator(processor), 150)


def test_a_row_that_has_become_unusable_stops_the_training_by_name(demo_vlm: Path, pool: Path) -> None:
    rows = rows_of(ROWS, processor_of(demo_vlm), pool)
    (pool / "0.png").unlink()
    assert isinstance(rows.prompt(0), Rejection)
    with pytest.raises(RuntimeError, match="row 0 cannot be trained on any more: missing_image"):
        rows[0]
