"""Checks for checkpoints that Transformers cannot load, with messages that name the cause and the remedy.

On such a folder, Transformers raises many kinds of errors. This module first looks at the few files that show
the cause. If it recognises none, the loader reports the error.
"""

import json
from pathlib import Path
from typing import Any

from scalselect_assets.method.representation.families import UnsupportedModelError

_LFS_POINTER = b"version https://git-lfs"
_ORIGINAL_LLAVA = ("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen", "llava_phi", "llava_gemma")
_METHODS = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8"}
_NEXT = "name the checkpoint with full weights that it was made from"


def check_folder(model: str) -> None:
    """Refuse a local folder if its files show that it is no complete Transformers checkpoint.

    Args:
        model: Local folder, or a hub id, which is not checked.

    Raises:
        UnsupportedModelError: The folder is no such checkpoint; the message says what it is and what to do.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".model", ".jinja") and _is_pointer(path):
            raise UnsupportedModelError(
                f"{path} is a Git LFS pointer: the repository was cloned without its large files. Run "
                "`git lfs pull` in it"
            )
    # `model_files` refuses an adapter that stands beside whole weights.
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        _refuse_adapter(folder)
    config = _settings(folder / "config.json")
    kind = str(config.get("model_type", ""))
    if kind in _ORIGINAL_LLAVA or "mm_vision_tower" in config:
        raise UnsupportedModelError(
            f"{model} is a checkpoint of LLaVA's own code (model_type {kind!r}), which Transformers does not "
            "read. Name its converted twin (llava-hf/... on the hub), or convert it with Transformers' "
            "convert_llava_weights_to_hf.py"
        )


def check_config(model: str, config: Any) -> None:
    """Refuse a configuration whose weights cannot be read as numbers of full precision.

    Raises:
        UnsupportedModelError: The weights are quantized.
    """
    for part in (config, getattr(config, "text_config", None)):
        settings = getattr(part, "quantization_config", None)
        if not settings:
            continue
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        method = str(settings.get("quant_method", "unknown"))
        raise UnsupportedModelError(
            f"{model!r} has quantized weights ({_METHODS.get(method, method)}), and samples are represented "
            f"with weights as they are trained: {_NEXT}"
        )


def unknown_type(model: str, error: Exception) -> UnsupportedModelError:
    """The refusal of a configuration that Transformers has no class for."""
    config = _settings(Path(model) / "config.json")
    if "auto_map" in config or "trust_remote_code" in str(error):
        return UnsupportedModelError(
            f"{model!r} (model_type {config.get('model_type', 'unknown')!r}) needs Python code of its own "
            "repository, and such code is never run here. Name a version that Transformers has classes for, "
            "often the one with -hf in its name"
        )
    return UnsupportedModelError(f"{model!r} is not a model that Transformers itself knows: {error}")


def check_parts(model: str, config: Any, processor: Any, base_model: Any) -> None:
    """Refuse a processor that does not fit the model.

    Raises:
        UnsupportedModelError: The processor lacks a setting that counts an image's tokens, or its tokenizer
            has more tokens than the model.
    """
    if getattr(processor, "patch_size", 0) is None:
        size = getattr(config.vision_config, "patch_size", None)
        raise UnsupportedModelError(
            f"the processor of {model!r} has no patch_size, so that it cannot tell how many tokens an image "
            f'takes. Write "patch_size": {size or "..."} into its processor_config.json'
        )
    n_rows = int(base_model.get_input_embeddings().weight.shape[0])
    if len(processor.tokenizer) > n_rows:
        raise UnsupportedModelError(
            f"the tokenizer of {model!r} has {len(processor.tokenizer):,} tokens and the model embeds "
            f"{n_rows:,}: they are of two models, or the embeddings were not resized. Take the tokenizer "
            "that the model was saved with"
        )


def _refuse_adapter(folder: Path) -> None:
    base = _settings(folder / "adapter_config.json").get("base_model_name_or_path")
    named = f" of {base!r}" if base else ""
    raise UnsupportedModelError(
        f"{folder} is a LoRA adapter{named}, not a whole model. Name the model that it adapts, or merge the "
        "two (peft: merge_and_unload, save_pretrained) and name the result"
    )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _settings(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty if it is missing or no object (the loader reports that)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
