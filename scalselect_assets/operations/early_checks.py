"""Mistakes in a declaration that can be known before hours of embedding.

Some checks need only the declaration and the file system, the others need the rows' texts; none loads a
model. The choice and the exports repeat these checks on their own inputs.
"""

from collections.abc import Iterable

import polars as pl

from scalselect_assets.choice import decontamination
from scalselect_assets.choice.labels import label_of
from scalselect_assets.choice.lists import Lists
from scalselect_assets.dataset import training_manifest
from scalselect_assets.dataset.exports import publish
from scalselect_assets.dataset.exports.placed_images import ExportError
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.pool import raw_samples
from scalselect_assets.resources.artifacts import ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource

_VALUES_SHOWN = 10


def check_declaration(selection: Selection, storage: StorageResource, vlm: VlmResource) -> None:
    """Require that everything that the declaration names exists and can be used.

    Raises:
        RefreshError: The declared device is not available, or the exports cannot be written as declared.
        SampleListError: A list cannot be read.
        EvaluationSetError: The evaluation set cannot be used.
    """
    if vlm.device == "cuda":
        _require_cuda()
    Lists.read(selection, storage)
    decontamination.list_files(storage, selection)
    if selection.exports:
        artifacts = storage.artifacts(selection.store)
        source = selection.open_pool(storage)
        folder = artifacts.root / training_manifest.NAME / publish.FOLDER
        try:
            publish.require_possible(selection.exports, source, folder)
        except ExportError as error:
            raise RefreshError(str(error)) from error


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RefreshError(
            f"the device cuda is asked for, and torch {torch.__version__} sees none: run on a machine with "
            "an NVIDIA GPU and a torch build for CUDA, or take --device cpu (or auto)"
        )


def check_quotas(selection: Selection, artifacts: ArtifactStore, shards: Iterable[str]) -> None:
    """Require that every floor names an existing source with enough rows.

    Raises:
        RefreshError: A floor has no such source, or too few rows; the message names the existing sources.
    """
    floors = {quota.label(selection.source_label): quota.floors for quota in selection.quotas if quota.floors}
    if not floors:
        return
    counts: dict[str, dict[str, int]] = {label: {} for label in floors}
    for shard in shards:
        try:
            rows, _ = artifacts.read_frame(raw_samples.NAME, shard, columns=["text", "images", "reason"])
        except ArtifactMissingError:
            continue  # a shard that cannot be read is reported as such
        accepted = rows.filter(pl.col("reason").is_null())
        for label, held in counts.items():
            found = accepted.select(value=label_of(label, shard)).group_by("value").len()
            for value, n_rows in found.iter_rows():
                held[value] = held.get(value, 0) + n_rows
    for label, bounds in floors.items():
        for value, bound in bounds.items():
            _require_rows(label, value, bound, counts[label])


def _require_rows(label: str, value: str, bound: float, held: dict[str, int]) -> None:
    needed = bound if isinstance(bound, int) else min(bound, 1)
    if held.get(value, 0) >= needed and (held.get(value, 0) or not bound):
        return
    there = sorted(held, key=lambda one: (-held[one], one))
    names = ", ".join(f"{name!r} ({held[name]} rows)" for name in there[:_VALUES_SHOWN]) or "none"
    more = f" and {len(there) - _VALUES_SHOWN} more" if len(there) > _VALUES_SHOWN else ""
    raise RefreshError(
        f"a floor of {bound} is declared for {value!r} in {label!r}, and {held.get(value, 0)} row(s) of the "
        f"pool have it; there are {names}{more}. Correct the name, or lower the floor."
    )
