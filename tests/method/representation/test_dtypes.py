"""Where no dtype is asked for, the checkpoint decides and never the machine."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalselect_assets.method.representation.dtypes import DtypeError, automatic_dtype, slow_here
from scalselect_assets.method.representation.encoder import Representation, VlmEncoder
from scalselect_assets.method.representation.loading import load_card, load_encoder
from tests.method.samples import question, read_image

pytestmark = pytest.mark.usefixtures("one_torch_thread")

AUTOMATIC = {
    torch.float32: "float32",
    torch.float64: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "bfloat16",
}


@pytest.mark.parametrize("own", AUTOMATIC)
def test_half_precision_is_computed_in_bfloat16_and_any_other_in_float32(own: torch.dtype) -> None:
    assert automatic_dtype(own) == AUTOMATIC[own]


def test_weights_of_another_kind_need_a_declaration() -> None:
    with pytest.raises(DtypeError, match=r"weights are float8_e4m3fn.*declare dtype as one of float32, b"):
        automatic_dtype(torch.float8_e4m3fn)


@pytest.fixture
def checkpoint(tiny_vlm: Callable[[str], Path], tmp_path: Path) -> Callable[[torch.dtype, bool], Path]:
    """The tiny model in a dtype of its own, which its configuration names or leaves open."""

    def make(dtype: torch.dtype, named: bool) -> Path:
        folder = shutil.copytree(tiny_vlm("llava"), tmp_path / f"{dtype}-{named}")
        for path in folder.glob("*.safetensors"):
            save_file({name: one.to(dtype) for name, one in load_file(path).items()}, path, {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part.pop("torch_dtype", None)
            part.pop("dtype", None)
        if named:
            config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("named", [True, False], ids=["named in the configuration", "left open"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_without_a_declared_dtype_is_as_one_with_the_automatic_one_declared(
    own: torch.dtype, named: bool, checkpoint: Callable[[torch.dtype, bool], Path]
) -> None:
    folder = str(checkpoint(own, named))
    automatic = load_card(folder)
    assert automatic.dtype == AUTOMATIC[own]
    assert automatic == load_card(folder, dtype=AUTOMATIC[own])  # type: ignore[arg-type]


def test_only_the_weights_are_rounded(checkpoint: Callable[[torch.dtype, bool], Path]) -> None:
    """Rotary frequencies stay in float32, as Transformers keeps them."""
    encoder = load_encoder(str(checkpoint(torch.float16, True)), device="cpu")
    assert encoder.base_model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert encoder.base_model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    (outcome,) = encoder.encode([question("Why?")], read_image)
    assert isinstance(outcome, Representation)


def test_a_store_that_declared_float32_keeps_its_fingerprint(
    tiny_vlm: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    declared = load_card(str(tiny_vlm("llava")), dtype="float32")
    assert declared.fingerprint == tiny_encoder("llava").card.fingerprint


# What a CPU says


def test_only_half_precision_on_a_cpu_is_worth_a_word() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert slow_here("float32", cpu) is slow_here("bfloat16", gpu) is slow_here("float16", gpu) is None
    assert "declare dtype float32" in (slow_here("bfloat16", cpu) or "")
    assert "many times as long" in (slow_here("float16", cpu) or "")


def test_a_cpu_says_so_when_it_loads_the_model(
    tiny_vlm: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tiny_vlm("llava"))
    with caplog.at_level(logging.WARNING):
        load_encoder(folder, device="cpu")
        assert caplog.text == ""
        load_encoder(folder, device="cpu", dtype="bfloat16")
    assert f"{folder}: the model is computed in bfloat16 on a CPU" in caplog.text
