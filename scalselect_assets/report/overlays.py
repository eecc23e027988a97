"""Pictures of where the instruction's attention lies, for the samples that the report shows.

Holds: one picture for each shown sample in `attention_overlays`, named by the model, the sample and the bytes
of its images, so that a night draws only those that the galleries did not show before; the model is loaded
for these. What the present report does not show is removed. Costs: of each new one, a forward pass of the
vision tower and one layer.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import numpy as np
from upath import UPath

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.explain.explanation import ExplanationError
from scalselect_assets.explain.sample_attention import attention_of
from scalselect_assets.explain.sample_search import SamplePlace
from scalselect_assets.resources.artifacts import ARRAYS, ArtifactCorruptError, ArtifactMissingError
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource

if TYPE_CHECKING:
    from scalselect_assets.report.gallery_sample import GallerySample

FOLDER: Final = "attention_overlays"
_MAX_SIDE: Final = 512


class AttentionOverlays:
    """Draws or remembers the overlay of each sample's first image."""

    def __init__(self, selection: Selection, storage: StorageResource, vlm: VlmResource) -> None:
        """The overlays in the store of ``selection``."""
        self._selection, self._storage, self._vlm = selection, storage, vlm
        self._artifacts = storage.artifacts(selection.store)
        self._shown: set[UPath] = set()

    def of(self, sample: "GallerySample") -> bytes | None:
        """The overlay as PNG; none where it must be drawn and image or model are not those of the vector."""
        content = digest(
            sample.fingerprint,
            sample.shard,
            sample.row,
            sample.sample_key,
            sample.text,
            list(sample.image_sha256),
        )
        self._shown.add(self._artifacts.path(FOLDER, content, suffix=ARRAYS))
        with suppress(ArtifactMissingError, ArtifactCorruptError):
            return bytes(self._artifacts.read_arrays(FOLDER, content)[0]["png"])
        place = SamplePlace(sample.shard, sample.row, 0, sample.sample_key, None)
        try:
            drawn = attention_of(self._selection, self._storage, self._vlm, place).pngs(_MAX_SIDE)[0]
        except (ExplanationError, FileNotFoundError):
            return None  # the picture beside it says what is wrong with the image
        self._artifacts.write_arrays(FOLDER, {"png": np.frombuffer(drawn, np.uint8)}, {}, content)
        return drawn

    def forget_others(self) -> None:
        """Remove the overlays that were not asked for."""
        for suffix in (ARRAYS, ".png"):  # as earlier releases wrote them
            for path in self._artifacts.paths(FOLDER, suffix=suffix):
                if path not in self._shown:
                    path.unlink(missing_ok=True)
