"""Processors for images and text are the families' own, whether or not their video part can be built."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from scalselect_assets.method.representation.families import UnsupportedModelError
from scalselect_assets.method.representation.processors import load_processor
from tests.method import zoo
from tests.method.samples import SAMPLES, pixels

FAMILIES = [family for family in zoo.FAMILIES if family != "paligemma"]
WITH_VIDEOS = ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"]


def load(path: Path) -> Any:
    return load_processor(str(path), None, AutoConfig.from_pretrained(path))


def outputs(processor: Any) -> dict[str, Any]:
    """What a processor makes of a chat about three images."""
    sample = SAMPLES["three images of different shapes in one turn"]
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in sample.conversation.turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    images = [[pixels(reference) for reference in sample.images]]
    return dict(processor(text=[text], images=images, return_tensors="pt"))


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_does_what_the_familys_own_does(family: str, tiny_vlm: Callable[[str], Path]) -> None:
    path = tiny_vlm(family)
    own = zoo._image_text_processor(path)
    got = load(path)
    assert type(got).__name__ == type(own).__mro__[1].__name__
    if family == "smolvlm":  # its own asks its video processor for defaults, which is not there
        own.video_processor = got.video_processor
    assert_same(outputs(got), outputs(own))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_comes_back_from_a_pickle_as_it_was(family: str, tiny_vlm: Callable[[str], Path]) -> None:
    processor = load(tiny_vlm(family))
    copied = pickle.loads(pickle.dumps(processor))
    assert type(copied) is type(processor)
    assert copied.to_json_string() == processor.to_json_string()
    assert_same(outputs(copied), outputs(processor))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_loads_alike_twice(family: str, tiny_vlm: Callable[[str], Path]) -> None:
    """Its settings are part of the model's fingerprint."""
    first, second = load(tiny_vlm(family)), load(tiny_vlm(family))
    assert first.to_json_string() == second.to_json_string()
    assert str(tiny_vlm(family)) not in first.to_json_string()


@pytest.mark.skipif(is_torchvision_available(), reason="the video part can be built")
@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_without_torchvision_transformers_own_loader_gives_up(
    family: str, tiny_vlm: Callable[[str], Path]
) -> None:
    """Once this fails, the classes without a video part are no longer needed."""
    with pytest.raises((ImportError, ValueError, TypeError)):
        AutoProcessor.from_pretrained(tiny_vlm(family))
    assert "video_processor" not in load(tiny_vlm(family)).get_attributes()


def test_a_tokenizer_alone_is_no_processor(tiny_vlm: Callable[[str], Path], tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_vlm("llava") / name, tmp_path / name)
    with pytest.raises(UnsupportedModelError, match="no processor with an image processor"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_processor_without_offsets_is_refused(
    family: str, tiny_vlm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(AutoTokenizer.from_pretrained(tiny_vlm(family)))
    monkeypatch.setattr(kind, "is_fast", property(lambda _self: False))
    with pytest.raises(UnsupportedModelError, match="a fast tokenizer"):
        load(tiny_vlm(family))


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_a_chat_template_may_be_the_tokenizers(
    family: str, tiny_vlm: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_vlm(family), tmp_path / family)
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModelError, match="has no chat template"):
        load(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    processor = load(path)
    assert (processor.chat_template or processor.tokenizer.chat_template) == template
