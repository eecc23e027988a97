"""A model folder that leads elsewhere is refused before it is loaded, each kind with its reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalselect_assets.method.representation.families import UnsupportedModelError
from scalselect_assets.method.representation.loading import load_encoder
from scalselect_assets.method.representation.model_files import refuse_files_that_lead_elsewhere

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def folder(tiny_vlm: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_vlm("llava"), tmp_path / "llava"))


def edit(file: Path, **entries: Any) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    for path, value in entries.items():
        place = values
        *parents, last = path.split("__")
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    file.write_text(json.dumps(values))


def refused(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as refusal:
        load_encoder(str(folder), device="cpu")
    return str(refusal.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation_internal": "someone/code:forward"},
        {"text_config__attn_implementation": "someone/code"},
        {"vision_config__deep__attn_implementation": {"": "someone/code"}},
        {"experts_implementation": "someone/code"},
    ],
)
def test_an_attention_implementation_in_the_configuration_is_refused(
    folder: Path, entry: dict[str, Any]
) -> None:
    edit(folder / "config.json", **entry)
    message = refused(folder)
    assert "names the attention implementation" in message
    assert "remove that entry" in message


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_of_weights_that_leads_out_of_the_folder_is_refused(
    folder: Path, name: str, index: str
) -> None:
    (folder / index).write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors", "b": name}})
    )
    message = refused(folder)
    assert repr(name) in message
    assert index in message


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/else")
    assert "adapter of another model" in refused(folder)


def test_a_template_that_raises_numbers_to_a_power_is_refused(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text("{% if 9 ** 9 ** 9 %}{% endif %}" + template.read_text())
    assert "raises numbers to a power" in refused(folder)


def test_plain_files_pass(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation=None, text_config___flash_attn_2_enabled=True)
    weights = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "sub/model.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    refuse_files_that_lead_elsewhere(str(folder), None)
