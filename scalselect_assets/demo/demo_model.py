"""The demo model: LLaVA-1.5's architecture at a few MB, with random weights and its real processor.

It stands in for a target model where none can be downloaded. Its answers make no sense, but the values that
the method reads from it (the patches that the first layer looks at, and the layer's output for them) depend
on the scene. The recipe is in ``demo_recipe.json`` beside the weights.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

RECIPE_FILE: Final = "demo_recipe.json"

# Raise it with every change to the written files, including the wording of the demo pool: a folder with the
# current recipe is never written again.
_RECIPE_VERSION: Final = 1


def write_demo_vlm(path: Path, *, seed: int = 0) -> Path:
    """Write model and processor to the folder ``path``, unless it already holds them unchanged.

    The folder appears in one step: a crash leaves the old folder or none. An older demo model is replaced.

    Args:
        path: Folder to create; ``from_pretrained`` reads it.
        seed: Seed of the weights. The tokenizer does not depend on it.

    Returns:
        ``path``.

    Raises:
        FileExistsError: ``path`` exists and was not written by this function.
    """
    recipe: dict[str, Any] = {
        "recipe": _RECIPE_VERSION,
        "seed": seed,
        "transformers": version("transformers"),
    }
    if _holds(path, recipe):
        return path
    if path.exists() and not (path / RECIPE_FILE).is_file() and (path.is_file() or any(path.iterdir())):
        msg = (
            f"{path} exists and is not a demo model (it has no {RECIPE_FILE}); name a new or an empty folder."
        )
        raise FileExistsError(msg)
    # Imported here, because torch takes seconds to import.
    from scalselect_assets.demo.architecture import demo_model, demo_processor, demo_tokenizer
    from scalselect_assets.method.representation.quiet import quiet_transformers

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as workspace:
        fresh = Path(workspace, "fresh")
        tokenizer = demo_tokenizer()
        with quiet_transformers():
            demo_model(tokenizer, seed).save_pretrained(fresh)
        demo_processor(tokenizer).save_pretrained(fresh)
        files = {file.name: _sha256(file) for file in sorted(fresh.iterdir())}
        (fresh / RECIPE_FILE).write_text(json.dumps({**recipe, "files": files}, indent=2) + "\n")
        if path.exists():
            path.rename(Path(workspace, "replaced"))
        fresh.rename(path)
    return path


def _holds(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the folder was written with this recipe and every file of it is still unchanged."""
    try:
        stored = json.loads((path / RECIPE_FILE).read_text())
        files = stored["files"]
        return bool(
            stored == {**recipe, "files": files}
            and all(_sha256(path / name) == digest for name, digest in files.items())
        )
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return False


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
