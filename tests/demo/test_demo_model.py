import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from scalselect_assets.demo import architecture
from scalselect_assets.demo.architecture import MAX_POSITIONS, N_IMAGE_TOKENS
from scalselect_assets.demo.demo_model import RECIPE_FILE, write_demo_vlm
from scalselect_assets.demo.demo_pool import write_demo_pool

pytestmark = pytest.mark.usefixtures("one_torch_thread", "demo_vlm")


@pytest.fixture(scope="module")
def folder(demo_vlm):
    return demo_vlm


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_demo_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def vlm(folder):
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mtimes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in [folder, *sorted(folder.iterdir())]}


def inputs(processor, image: Path, question: str):
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}], tokenize=False
    )
    with Image.open(image) as opened:
        return processor(
            text=text, images=opened.convert("RGB"), return_tensors="pt", add_special_tokens=False
        )


def first_layer(vlm, processor, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass over the vision tokens, and their states after the first layer."""
    with torch.no_grad():
        out = vlm(**batch, output_attentions=True, output_hidden_states=True, use_cache=False)
    vision = batch["input_ids"][0] == processor.image_token_id
    mass = out.attentions[0][0].mean(0)[~vision][:, vision].mean(0)
    return mass / mass.sum(), out.hidden_states[1][0][vision]


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_weights(folder, tmp_path):
    first = contents(folder)
    assert contents(write_demo_vlm(tmp_path / "again")) == first
    other = contents(write_demo_vlm(tmp_path / "other", seed=1))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors", RECIPE_FILE}


def test_the_callers_random_stream_does_not_move(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    write_demo_vlm(tmp_path / "vlm")
    assert torch.equal(torch.rand(4), expected)


def test_a_second_call_touches_nothing(folder):
    before = mtimes(folder)
    assert write_demo_vlm(folder) == folder
    assert mtimes(folder) == before


@pytest.mark.parametrize("damage", ["weights cut", "tokenizer gone", "other recipe"])
def test_a_damaged_or_older_model_is_replaced(folder, tmp_path, damage):
    path = write_demo_vlm(tmp_path / "vlm")
    if damage == "weights cut":
        (path / "model.safetensors").write_bytes(b"")
    elif damage == "tokenizer gone":
        (path / "tokenizer.json").unlink()
    else:
        recipe = json.loads((path / RECIPE_FILE).read_text())
        (path / RECIPE_FILE).write_text(json.dumps({**recipe, "transformers": "4.0.0"}))
    write_demo_vlm(path)
    assert contents(path) == contents(folder)
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_leaves_no_half_model(tmp_path, monkeypatch):
    def fail(tokenizer):
        raise RuntimeError("killed here")

    monkeypatch.setattr(architecture, "demo_processor", fail)
    with pytest.raises(RuntimeError, match="killed here"):
        write_demo_vlm(tmp_path / "vlm")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(FileExistsError, match=RECIPE_FILE):
        write_demo_vlm(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_the_folder_is_small(folder):
    assert sum(map(len, contents(folder).values())) < 10_000_000


def test_auto_classes_load_it_whole(folder):
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert model.config.model_type == "llava"
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]


def test_each_image_becomes_64_tokens(processor, vlm, pool):
    images = [Image.open(pool.root / f"images/counting-00{i}.png") for i in range(2)]
    out = processor(text="<s>USER: <image>\nand <image>", images=images, return_tensors="pt")
    assert N_IMAGE_TOKENS == 64
    assert int((out["input_ids"] == processor.image_token_id).sum()) == 2 * 64
    assert vlm.get_image_features(out["pixel_values"]).pooler_output[0].shape == (64, 128)


def test_the_template_reads_parts_and_plain_text_alike(processor):
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "몇 개인가요?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "두 개"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And in"}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "One"}]},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\n몇 개인가요?"},
        {"role": "assistant", "content": "두 개"},
        {"role": "user", "content": "And in\n<image>\n?"},
        {"role": "assistant", "content": "One"},
    ]
    expected = (
        "<s>Be brief. USER: <image>\n몇 개인가요? ASSISTANT: 두 개</s>"
        "USER: And in\n<image>\n? ASSISTANT: One</s>"
    )
    for render in (processor, processor.tokenizer):
        assert render.apply_chat_template(parts, tokenize=False) == expected
        assert render.apply_chat_template(plain, tokenize=False) == expected
    prompt = processor.apply_chat_template(plain[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("몇 개인가요? ASSISTANT:")


def test_text_survives_the_tokenizer(processor):
    text = "USER: 초록색 별이 있나요? — naïve ☃ ASSISTANT: 네"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids) == text


def test_only_the_row_planned_as_too_long_exceeds_the_positions(processor, pool):
    lengths = {False: 0, True: 0}
    for shard in sorted(pool.root.glob("shard-*.jsonl")):
        for line in shard.read_text(encoding="utf-8").splitlines():
            if '"messages"' not in line or not line.endswith("}"):
                continue
            row = json.loads(line)
            text = "".join(f"ASSISTANT: {message['content']}</s>" for message in row["messages"])
            n = len(processor.tokenizer(text)["input_ids"]) + (N_IMAGE_TOKENS - 1) * text.count("<image>")
            planned = row.get("expected_rejection") == "too_long"
            lengths[planned] = max(lengths[planned], n)
    assert processor.tokenizer.model_max_length == MAX_POSITIONS
    assert lengths[False] < MAX_POSITIONS / 2
    assert lengths[True] > 1.5 * MAX_POSITIONS


def test_attention_picks_a_part_of_the_vision_tokens(vlm, processor, pool):
    names = ["counting-000", "counting-001", "colour-002", "layout-003", "rare-noise-0", "rare-sketch-1"]
    for name in names:
        batch = inputs(processor, pool.root / f"images/{name}.png", "Describe the picture in one sentence.")
        mass, _ = first_layer(vlm, processor, batch)
        share = mass.sort(descending=True).values.cumsum(0)
        kept = (int((share <= 0.9).sum()) + 1) / len(mass)
        assert 0.3 < kept < 0.85


def test_the_representation_follows_the_scene(vlm, processor, pool):
    question = "Describe the picture in one sentence."

    def represent(name: str) -> torch.Tensor:
        mass, states = first_layer(
            vlm, processor, inputs(processor, pool.root / f"images/{name}.png", question)
        )
        return (mass[:, None] * states).sum(0)

    def distance(a: str, b: str) -> float:
        return float((represent(a) - represent(b)).norm() / represent(a).norm())

    variants, templates = distance("colour-000", "colour-004"), distance("colour-000", "colour-001")
    assert 0 < variants < templates
    assert distance("colour-000", "rare-noise-0") > 2 * variants
