"""The attention of one sample's instruction on its images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.explain.sample_search import SamplePlace
from scalselect_assets.pool import raw_samples
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource

if TYPE_CHECKING:
    from PIL import Image

    from scalselect_assets.method.representation.attention_map import AttentionMap

from scalselect_assets.explain.explanation import ExplanationError
from scalselect_assets.explain.why import _ExplainedStore

# What the model saw


@dataclass(frozen=True, slots=True, eq=False)
class SampleAttention:
    """A sample's attention map with its images.

    Attributes:
        map: Computed by the code that made the vector.
        images: Upright, in the order of the image marks.
        paths: Paths of the images.
        deviation: The largest difference between the vector of this map and the stored one, as a share of the
            stored one's largest component: rounding, of batches and devices.
    """

    map: "AttentionMap"
    images: "tuple[Image.Image, ...]"
    paths: tuple[str, ...]
    deviation: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; p_j and the kept tokens as nested lists, row by row."""
        return {
            "n_dominant_tokens": self.map.representation.n_dominant_tokens,
            "deviation": self.deviation,
            "images": [
                {
                    "path": path,
                    "width": image.layout.size[0],
                    "height": image.layout.size[1],
                    "share": image.share,
                    "kept": image.n_kept,
                    "note": image.layout.note,
                    "grids": [
                        {
                            "box": grid.box,
                            "attention": grid.attention.tolist(),
                            "kept": grid.kept.tolist(),
                            "line_ends": grid.line_ends.tolist(),
                            "line_ends_kept": grid.line_ends_kept.tolist(),
                        }
                        for grid in image.grids
                    ],
                }
                for path, image in zip(self.paths, self.map.images, strict=True)
            ],
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Label and value of each line to print."""
        yield "", ""
        for path, image in zip(self.paths, self.map.images, strict=True):
            yield "looked at", path
            yield "  attention", f"{image.share:.1%} of what falls on vision; {image.n_kept:,} tokens kept"
            yield "  tokens", image.layout.note
        yield "  same vector", f"to {self.deviation:.1e} of its largest component"

    def pngs(self, max_side: int) -> list[bytes]:
        """Each image with its attention over it; see `method.attention_map.overlay`."""
        from scalselect_assets.method.representation.attention_map import overlay_png

        return [
            overlay_png(image, seen, max_side=max_side)
            for image, seen in zip(self.images, self.map.images, strict=True)
        ]


def attention_of(
    selection: Selection, storage: StorageResource, vlm: VlmResource, place: SamplePlace
) -> SampleAttention:
    """The attention map of an embedded sample; loads the target model.

    Raises:
        ExplanationError: The sample was rejected, or its model or one of its images is not the one that its
            vector was made with.
        ModelLoadError: The model cannot be loaded.
        OSError: An image cannot be read.
    """
    from scalselect_assets.method.representation.attention_map import attention_map
    from scalselect_assets.method.representation.conversation import Conversation
    from scalselect_assets.method.representation.encoder import ChatSample
    from scalselect_assets.method.representation.images import decode_image
    from scalselect_assets.method.representation.rejection import Rejection

    store = _ExplainedStore(selection, storage)
    if (rejected := store.rejection(place)) is not None:
        raise ExplanationError(
            f"{place} was rejected as {rejected[0]} ({rejected[1]}), so that no attention of it is known"
        )
    table, _ = store.table(place)
    made_from = store.row(table, place, ["images", "image_sha256"])
    raw, _ = store.artifacts.read_frame(
        raw_samples.NAME, place.shard, columns=["row", "conversation", "images"]
    )
    row = raw.row(by_predicate=pl.col("row") == place.row, named=True)
    source = selection.open_pool(storage)
    encoder = vlm.encoder(store.artifacts, **selection.target)
    if encoder.card.fingerprint != table.fingerprint:
        raise ExplanationError(
            f"the vector of {place} is of model {table.fingerprint}, and the selection's is now "
            f"{encoder.card.fingerprint}; {store.remedy}"
        )
    sample = ChatSample(Conversation.from_json(row["conversation"]), tuple(row["images"]))
    seen = attention_map(encoder, sample, source.open_image)
    if isinstance(seen, Rejection):
        raise ExplanationError(
            f"{place} is embedded, and now rejected as {seen.reason} ({seen.detail}); {store.remedy}"
        )
    for path, then, now in zip(
        row["images"], made_from["image_sha256"], seen.representation.image_sha256, strict=True
    ):
        if then != now:
            raise ExplanationError(
                f"the image {path} of {place} has changed since it was embedded; {store.remedy}"
            )
    stored = store.embeddings.read_vectors(table, [place.row])[0]
    difference = np.abs(seen.representation.vector - stored).max()
    images = tuple(
        decode_image(source.open_image(path), encoder.preparer.max_pixels) for path in sample.images
    )
    deviation = float(difference / max(np.abs(stored).max(), np.finfo(np.float32).tiny))
    return SampleAttention(seen, images, sample.images, deviation)
