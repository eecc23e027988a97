"""A model's files may not name code, weights or a base model from elsewhere.

Transformers follows some entries of a model's own files to other places: an attention implementation is
fetched as code from the hub, an index of weights names files by any path, and an adapter beside the weights
brings another model's. The model's fingerprint covers none of these, so a model that has one is
refused before any part of it is loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from scalselect_assets.method.representation.families import UnsupportedModelError
from scalselect_assets.method.representation.step_limit import unbounded_operator

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ADAPTER = "adapter_config.json"


def refuse_files_that_lead_elsewhere(model: str, revision: str | None) -> None:
    """Look through a model's files before it is loaded.

    Args:
        model: Local folder or hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UnsupportedModelError: A file leads elsewhere; the message names the file and the reason.
        OSError: A hub id's files cannot be fetched.
    """
    found = _read_json(model, revision, "config.json")
    named = next(_implementations(found, "config.json"), None)
    if named is not None:
        place, value = named
        raise UnsupportedModelError(
            f"{model!r} names the attention implementation {value!r} in {place}, which may be code from "
            "elsewhere and is chosen here, not by a model; remove that entry"
        )
    for index in _INDEXES:
        weights = _read_json(model, revision, index)
        for name in _weight_files(weights):
            if _leads_out(name):
                raise UnsupportedModelError(
                    f"{model!r} names the weight file {name!r} in {index}, which lies outside the model's "
                    "folder; put the file into the folder and its plain name into the index"
                )
    if _read_json(model, revision, _ADAPTER) is not None:
        raise UnsupportedModelError(
            f"{model!r} has an {_ADAPTER} beside its weights, so that it would be loaded as an adapter of "
            "another model; merge the adapter into the weights, or move it out of the folder"
        )


def refuse_unbounded_template(model: str, processor: Any) -> None:
    """Refuse a chat template with an operator whose single step may compute for ever.

    Raises:
        UnsupportedModelError: The template has such an operator.
    """
    for part in (processor, processor.tokenizer):
        templates = getattr(part, "chat_template", None) or {}
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if operator := unbounded_operator(template):
                raise UnsupportedModelError(
                    f"the chat template of {model!r} raises numbers to a power ({operator}), which no limit "
                    "on its steps can bound; remove that"
                )


def _read_json(model: str, revision: str | None, name: str) -> Any:
    """A file of the model; None if there is no such file. The loader reports a damaged file."""
    from transformers.utils import cached_file

    path = cached_file(
        model,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return {}


def _implementations(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Each attention or experts implementation in a configuration, at any depth: its place and its value."""
    pending = [(place, value)]
    while pending:
        here, found = pending.pop()
        if isinstance(found, list):
            pending += [(here, item) for item in found]
        if not isinstance(found, dict):
            continue
        for key, item in found.items():
            if (
                key.strip("_")
                .removesuffix("_internal")
                .endswith(("attn_implementation", "experts_implementation"))
            ):
                if item is not None:
                    yield f"{here}: {key}", item
            else:
                pending.append((f"{here}: {key}", item))


def _weight_files(index: Any) -> list[Any]:
    weights = index.get("weight_map") if isinstance(index, dict) else None
    return list(dict.fromkeys(map(str, weights.values()))) if isinstance(weights, dict) else []


def _leads_out(name: str) -> bool:
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    return ".." in parts or name.startswith("/") or PureWindowsPath(name).is_absolute() or "\0" in name
