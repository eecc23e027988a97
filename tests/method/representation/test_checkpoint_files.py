"""A folder that is no checkpoint of Transformers' own says what it is."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from scalselect_assets.method.representation.checkpoint_files import (
    check_config,
    check_folder,
    check_parts,
    unknown_type,
)
from scalselect_assets.method.representation.families import UnsupportedModelError


def folder_with(tmp_path: Path, **files: object) -> str:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / name.replace("__", ".")).write_bytes(data)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"adapter_config__json": {"base_model_name_or_path": "org/base"}}, "LoRA adapter of 'org/base'"),
        ({"config__json": {"model_type": "llava_llama"}}, "LLaVA's own code"),
        ({"config__json": {"model_type": "llava", "mm_vision_tower": "clip"}}, "LLaVA's own code"),
        ({"model__safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
        ({"tokenizer__json": b"version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
    ],
)
def test_a_folder_of_another_kind_is_named(tmp_path: Path, files: dict[str, object], what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        check_folder(folder_with(tmp_path, **files))


def test_a_folder_of_transformers_and_a_hub_id_are_left_to_the_loader(tmp_path: Path, demo_vlm: Path) -> None:
    check_folder(str(demo_vlm))
    check_folder(folder_with(tmp_path, config__json={"model_type": "llava", "text_config": {}}))
    check_folder("org/name")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "hqq"])
def test_quantized_weights_are_refused(method: str) -> None:
    settings = {"quant_method": method}
    for config in (
        SimpleNamespace(quantization_config=settings),
        SimpleNamespace(text_config=SimpleNamespace(quantization_config=settings)),
    ):
        with pytest.raises(UnsupportedModelError, match="quantized weights"):
            check_config("org/name", config)
    check_config("org/name", SimpleNamespace(text_config=SimpleNamespace()))


def test_code_of_its_own_is_told_from_a_type_that_nobody_knows(tmp_path: Path) -> None:
    own = folder_with(tmp_path, config__json={"model_type": "x", "auto_map": {"AutoConfig": "x.X"}})

    assert "code of its own" in str(unknown_type(own, ValueError("unknown")))
    assert "code is never run" in str(unknown_type("org/name", ValueError("set trust_remote_code=True")))
    assert "itself knows: unknown" in str(unknown_type("org/name", ValueError("unknown")))


class _Tokenizer:
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n


def parts(patch_size: int | None, n_tokens: int) -> tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace]:
    embeddings = SimpleNamespace(weight=SimpleNamespace(shape=(100, 8)))
    return (
        SimpleNamespace(vision_config=SimpleNamespace(patch_size=14)),
        SimpleNamespace(patch_size=patch_size, tokenizer=_Tokenizer(n_tokens)),
        SimpleNamespace(get_input_embeddings=lambda: embeddings),
    )


def test_a_processor_that_does_not_fit_its_model_is_refused() -> None:
    check_parts("org/name", *parts(14, 100))
    with pytest.raises(UnsupportedModelError, match='"patch_size": 14'):
        check_parts("org/name", *parts(None, 100))
    with pytest.raises(UnsupportedModelError, match="101 tokens and the model embeds 100"):
        check_parts("org/name", *parts(14, 101))
