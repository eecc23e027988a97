"""Why a sample was selected, or not: where its leverage comes from, what it is like, and what the model saw.

`explain` needs no model: it reads what the store holds. `attention_of` loads the model and computes the
sample's attention map by the code that made its vector. Reads only.

Costs of `explain`: four columns of every shard's rows to find the sample, two columns of every shard's scores
for its rank, and one pass over all vectors (n·d·4 bytes) for the samples like it and those that lie furthest
along its directions; memory of one shard's scores or one batch of vectors, and of the keys of the selected.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from json import loads
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from resources.artifacts import ArtifactStore
from resources.embedding_store import EmbeddingStore, EmbeddingTable, VectorBatch
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import (
    attention_embeddings,
    importance_scores,
    raw_samples,
    selected_subset,
    subspace_basis,
)
from scalselect_assets.sample_directions import DEFAULT_DIRECTIONS, rows_of
from scalselect_assets.sample_lineage import SamplePlace, find_sample, last_shards, remedy
from scalselect_assets.selection import Selection

if TYPE_CHECKING:
    from PIL import Image

    from scalselect_assets.method.attention_map import AttentionMap
    from scalselect_assets.method.subspace import Subspace

DEFAULT_SIMILAR: Final = 5
DEFAULT_EXEMPLARS: Final = 2

# Recomputed in float64, a stored leverage may be off by the rounding of float32 projections, 1e-5 at most.
_SCORE_TOLERANCE = 1e-4
# Equal vectors in different places differ by the rounding of a product; to this many digits they tie.
_TIE_DIGITS = 12
_VECTOR_COLUMNS = ("n_tokens", "n_vision_tokens", "n_dominant_tokens", "n_instruction_tokens")

Status: TypeAlias = Literal["selected", "not selected", "rejected"]


class ExplanationError(RuntimeError):
    """What the store holds of a sample is not there or does not fit together; the message has the remedy."""


@dataclass(frozen=True, slots=True)
class Score:
    """A sample's place in the pool.

    Attributes:
        leverage: As stored.
        normalised_leverage: n·leverage/k, by which the pool is ranked.
        rank: Place among all scored samples, from 1; ties by `sample_key`, then shard.
        pool: Scored samples.
        percentile: How many percent of the others rank below: 100 for the first, 0 for the last.
        selected: Samples in the selected subset.
        lowest_selected: The lowest normalised leverage among them.
        k: Directions of the basis that the sample is scored with.
        basis: Version of that basis.
    """

    leverage: float
    normalised_leverage: float
    rank: int
    pool: int
    percentile: float
    selected: int
    lowest_selected: float | None
    k: int
    basis: str


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A sample that lies far along a direction.

    Attributes:
        shard: Its shard.
        row: Its row there.
        sample_key: Its key.
        source_id: Its own id.
        coordinate: u_ij.
        selected_rank: Its place in the selected subset; none where it is not selected.
    """

    shard: str
    row: int
    sample_key: str
    source_id: str | None
    coordinate: float
    selected_rank: int | None


@dataclass(frozen=True, slots=True)
class Direction:
    """What one direction adds to a sample's leverage.

    Attributes:
        direction: Its number, from 1; the strongest in the pool is 1.
        coordinate: u_ij; the sign tells on which side of the mean the sample lies.
        leverage: u_ij².
        share: Of the sample's leverage, in [0, 1].
        singular_value: Of the direction.
        energy_share: Of the pool's energy, in [0, 1].
        same_side: The samples of the pool that lie furthest on the sample's side, furthest first.
        other_side: Likewise on the other side.
    """

    direction: int
    coordinate: float
    leverage: float
    share: float
    singular_value: float
    energy_share: float
    same_side: tuple[Exemplar, ...]
    other_side: tuple[Exemplar, ...]


@dataclass(frozen=True, slots=True)
class SimilarSample:
    """A sample whose vector points the same way from the pool's mean.

    Attributes:
        shard: Its shard.
        row: Its row there.
        sample_key: Its key.
        source_id: Its own id.
        cosine: Of the two centred vectors, in [-1, 1].
        selected_rank: Its place in the selected subset; none where it is not selected.
    """

    shard: str
    row: int
    sample_key: str
    source_id: str | None
    cosine: float
    selected_rank: int | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a sample's vector was made from.

    Attributes:
        n_tokens: Length of the model's input.
        n_vision_tokens: Image tokens in it.
        n_dominant_tokens: Those whose mean the vector is.
        n_instruction_tokens: Tokens that are neither vision nor content of an answer.
        vision_attention: Share of the instruction's attention that falls on vision tokens, in [0, 1].
    """

    n_tokens: int
    n_vision_tokens: int
    n_dominant_tokens: int
    n_instruction_tokens: int
    vision_attention: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a sample was selected, or not.

    Attributes:
        sample: Its key, id, shard, row and line.
        status: What has become of it.
        selected_rank: Its place in the selected subset, if it is selected.
        reason: Why it was rejected, if it was: see `method.rejection.RejectionReason`.
        detail: What was found and what to do; likewise.
        score: Its place in the pool; none where it was rejected.
        directions: Where most of its leverage comes from, strongest first.
        similar: The samples most like it, most alike first.
        tokens: What its vector was made from; none where it was rejected.
        problems: What could not be compared, each with what mends it.
    """

    sample: SamplePlace
    status: Status
    selected_rank: int | None = None
    reason: str | None = None
    detail: str | None = None
    score: Score | None = None
    directions: tuple[Direction, ...] = ()
    similar: tuple[SimilarSample, ...] = ()
    tokens: Tokens | None = None
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "sample": self.sample.to_json()}

    def lines(self) -> Iterator[tuple[str, str]]:
        """Label and value of each line to print; what belongs to a line stands indented below it."""
        for name, value in self.sample.to_json().items():
            yield name.replace("_", " "), "-" if value is None else str(value)
        yield "", ""
        if self.status == "rejected":
            yield "rejected as", str(self.reason)
            yield "", str(self.detail)
        if self.score is not None:
            yield from self._score_lines(self.score)
        for direction in self.directions:
            yield "", ""
            side = "above" if direction.coordinate > 0 else "below"
            yield (
                f"direction {direction.direction}",
                f"{direction.share:.1%} of its leverage; {side} the mean; holds "
                f"{direction.energy_share:.1%} of the pool's energy",
            )
            for label, exemplars in (
                ("furthest on its side", direction.same_side),
                ("on the other side", direction.other_side),
            ):
                for place, other in enumerate(exemplars):
                    itself = (other.shard, other.row) == (self.sample.shard, self.sample.row)
                    told = _named(other.shard, other.row, other.sample_key, other.selected_rank)
                    told = "this sample" if itself else told
                    yield "" if place else f"  {label}", f"{other.coordinate:+.4f}  {told}"
        if self.similar:
            yield "", ""
        for place, near in enumerate(self.similar):
            told = _named(near.shard, near.row, near.sample_key, near.selected_rank)
            yield "" if place else "most like it (cosine)", f"{near.cosine:+.4f}  {told}"
        if self.tokens is not None:
            yield "", ""
            yield "tokens", f"{self.tokens.n_tokens:,}, of which {self.tokens.n_vision_tokens:,} vision"
            yield "  kept", f"{self.tokens.n_dominant_tokens:,} vision tokens, whose mean the vector is"
            yield (
                "  attention",
                f"{self.tokens.vision_attention:.1%} of that of {self.tokens.n_instruction_tokens:,} "
                "instruction tokens falls on vision",
            )

    def _score_lines(self, score: Score) -> Iterator[tuple[str, str]]:
        chosen = "" if self.selected_rank is None else f", rank {self.selected_rank:,} of {score.selected:,}"
        yield "status", f"{self.status}{chosen}"
        yield (
            "rank in the pool",
            f"{score.rank:,} of {score.pool:,}; {score.percentile:.1f} % of the others rank below",
        )
        yield "leverage", f"{score.leverage:.6g} in {score.k} directions"
        lowest = score.lowest_selected
        needed = "" if lowest is None else f"; the lowest selected has {lowest:.4g}"
        yield "  normalised", f"{score.normalised_leverage:.4g} where the pool's mean is 1{needed}"


def _named(shard: str, row: int, sample_key: str, selected_rank: int | None) -> str:
    chosen = "not selected" if selected_rank is None else f"selected, rank {selected_rank:,}"
    return f"{shard}#{row}  {sample_key}  {chosen}"


def explain(
    selection: Selection,
    storage: StorageResource,
    sample: str,
    *,
    similar: int = DEFAULT_SIMILAR,
    directions: int = DEFAULT_DIRECTIONS,
    exemplars: int = DEFAULT_EXEMPLARS,
    shards: Iterable[str] = (),
) -> Explanation:
    """Why a sample was selected, or not, from what the store holds.

    Args:
        selection: Whose sample.
        storage: Opens the store.
        sample: As for `sample_lineage.find_sample`.
        similar: How many of the samples most like it.
        directions: How many of its strongest directions.
        exemplars: How many samples on either side of each direction.
        shards: Where else to look for it than in the shards of the last basis: those that are new, or could
            not be embedded.

    Raises:
        SampleKeyError: No sample goes by it, or several do.
        ExplanationError: The sample's vector, score and basis are not of one another.
        ArtifactMissingError: Something is not in the store that the explanation needs.
        ArtifactCorruptError: Something cannot be read.
        EmbeddingTableError: Likewise.
        ValueError: A number is out of range.
    """
    if similar < 0 or directions < 1 or exemplars < 0:
        raise ValueError(
            f"Got similar={similar}, directions={directions}, exemplars={exemplars}; allowed are numbers "
            "from 0, 1 and 0 on."
        )
    store = _Store(selection, storage)
    place = store.find(sample, shards)
    rejected = store.rejection(place)
    if rejected is not None:
        return Explanation(place, "rejected", reason=rejected[0], detail=rejected[1])
    return _Scored(store, place).explanation(similar, directions, exemplars)


class _Store:
    """What is read of a store for one explanation."""

    def __init__(self, selection: Selection, storage: StorageResource) -> None:
        self.selection = selection
        self.artifacts: ArtifactStore = storage.artifacts(selection.store)
        self.embeddings: EmbeddingStore = storage.embeddings(selection.store)
        self.remedy = remedy(selection)

    def find(self, sample: str, shards: Iterable[str]) -> SamplePlace:
        """The one sample that goes by what was given."""
        return find_sample(self.selection, self.artifacts, {*shards, *last_shards(self.artifacts)}, sample)

    def rejection(self, place: SamplePlace) -> tuple[str, str] | None:
        """Reason and detail of a rejected sample, on reading or by the model."""
        for asset in (raw_samples.NAME, attention_embeddings.REJECTED):
            rows, _ = self.artifacts.read_frame(asset, place.shard, columns=["row", "reason", "detail"])
            found = rows.filter((pl.col("row") == place.row) & pl.col("reason").is_not_null())
            if found.height:
                return found["reason"][0], found["detail"][0]
        return None

    def table(self, place: SamplePlace) -> tuple[EmbeddingTable, dict[str, str]]:
        """The table that holds a sample's vector, and its header.

        Raises:
            ExplanationError: The rows have been read anew since.
        """
        table, header = attention_embeddings.recorded_table(self.artifacts, place.shard)
        raw = self.artifacts.read_header(raw_samples.NAME, place.shard)
        if header["raw_samples"] != raw["data_version"]:
            raise ExplanationError(
                f"the rows of shard {place.shard!r} have been read anew since they were embedded, so that "
                f"row {place.row} may be another one; {self.remedy}"
            )
        return table, header

    def row(self, table: EmbeddingTable, place: SamplePlace, columns: Sequence[str]) -> dict[str, Any]:
        """Some columns of a sample's row, vectors apart."""
        rows = pl.DataFrame(self.embeddings.read_rows(table, columns))
        found = rows.filter(pl.col("row") == place.row)
        if not found.height:
            raise ExplanationError(f"{place} is neither embedded nor rejected; {self.remedy}")
        return found.row(0, named=True)


class _Scored:
    """Explains a sample that has a vector."""

    def __init__(self, store: _Store, place: SamplePlace) -> None:
        self._store, self._place = store, place
        self._artifacts, self._selection = store.artifacts, store.selection
        self._subspace, basis = subspace_basis.read_basis(self._artifacts)
        self._basis_version, self._in_basis = basis["data_version"], loads(basis["shards"])
        self._table, header = store.table(place)
        fitted = self._in_basis.get(place.shard, {}).get("attention_embeddings")
        if fitted != header["data_version"]:
            raise ExplanationError(
                f"the vectors of shard {place.shard!r} are not those that the basis was fitted on "
                f"({header['data_version']} and {fitted}); {store.remedy}"
            )
        self._problems: list[str] = []

    def explanation(self, n_similar: int, n_directions: int, n_exemplars: int) -> Explanation:
        """All that is told of the sample."""
        from scalselect_assets.method.directions import coordinates, strongest_directions

        place = self._place
        tokens = self._store.row(self._table, place, [*_VECTOR_COLUMNS, "vision_attention"])
        tokens.pop("row")
        vector = rows_of(self._store.embeddings, self._table, [place.row], self._selection.unit_rows)
        subspace = self._subspace
        subset, score = self._score()
        strongest = strongest_directions(subspace, vector, n_directions)
        whole = float(np.square(coordinates(subspace, vector)).sum())
        if abs(min(whole, 1.0) - score.leverage) > _SCORE_TOLERANCE * max(score.leverage, 1e-12):
            raise ExplanationError(
                f"the score of {place} is {score.leverage:.9g}, and its vector gives {whole:.9g}; "
                f"{self._store.remedy}"
            )
        nearest = _Leading(n_similar)
        sides = [(_Leading(n_exemplars), _Leading(n_exemplars)) for _ in range(strongest.direction.shape[1])]
        self._pass_over_pool(subspace, vector[0], strongest.direction[0] - 1, nearest, sides)
        found = self._selected_rank(subset)
        return Explanation(
            place,
            "not selected" if found is None else "selected",
            selected_rank=found,
            score=score,
            directions=tuple(
                self._direction(subspace, subset, number, coordinate, share, same, other)
                for number, coordinate, share, (same, other) in zip(
                    strongest.direction[0], strongest.coordinate[0], strongest.share[0], sides, strict=True
                )
            ),
            similar=tuple(SimilarSample(**row) for row in nearest.rows(subset, "cosine")),
            tokens=Tokens(**tokens),
            problems=tuple(self._problems),
        )

    # Its place

    def _score(self) -> tuple[pl.DataFrame, Score]:
        """The selected subset's keys and ranks, and the sample's place in the pool."""
        place = self._place
        subset, header = self._artifacts.read_frame(
            selected_subset.NAME, columns=["rank", "sample_key", "shard", "normalised_leverage"]
        )
        if header["subspace_basis"] != self._basis_version:
            raise ExplanationError(
                f"{selected_subset.NAME} was chosen by another basis ({header['subspace_basis']}) than the "
                f"present one ({self._basis_version}); {self._store.remedy}"
            )
        own = self._scores(place.shard, ["row", "leverage", "normalised_leverage"])
        own = own.filter(pl.col("row") == place.row)
        if not own.height:
            raise ExplanationError(f"{place} has no score; {self._store.remedy}")
        normalised = float(own["normalised_leverage"][0])
        before = pool = 0
        for shard in sorted(self._in_basis):
            scores = self._scores(shard, ["sample_key", "normalised_leverage"])
            pool += scores.height
            key_first = pl.col("sample_key") < place.sample_key
            if shard < place.shard:
                key_first |= pl.col("sample_key") == place.sample_key
            higher = pl.col("normalised_leverage") > normalised
            tied = pl.col("normalised_leverage") == normalised
            before += scores.filter(higher | (tied & key_first)).height
        lowest = subset["normalised_leverage"].min()
        return subset.drop("normalised_leverage"), Score(
            leverage=float(own["leverage"][0]),
            normalised_leverage=normalised,
            rank=before + 1,
            pool=pool,
            percentile=importance_scores.percentile(before + 1, pool),
            selected=subset.height,
            lowest_selected=None if lowest is None else float(lowest),  # type: ignore[arg-type]
            k=self._subspace.k,
            basis=self._basis_version,
        )

    def _scores(self, shard: str, columns: list[str]) -> pl.DataFrame:
        """The scores of a shard, if they are of the present basis."""
        scores, header = self._artifacts.read_frame(importance_scores.NAME, shard, columns=columns)
        if header["subspace_basis"] != self._basis_version:
            raise ExplanationError(
                f"the scores of shard {shard!r} are of basis {header['subspace_basis']}, and are to be of "
                f"{self._basis_version}; {self._store.remedy}"
            )
        return scores

    def _selected_rank(self, subset: pl.DataFrame) -> int | None:
        found = subset.filter(
            (pl.col("sample_key") == self._place.sample_key) & (pl.col("shard") == self._place.shard)
        )
        return int(found["rank"][0]) if found.height else None

    # The pool around it

    def _pass_over_pool(
        self,
        subspace: "Subspace",
        vector: NDArray[Any],
        directions: NDArray[np.int64],
        nearest: "_Leading",
        sides: Sequence[tuple["_Leading", "_Leading"]],
    ) -> None:
        """Find the rows nearest to the sample, and those furthest along directions on either side."""
        from scalselect_assets.method.directions import centred_cosines, coordinates

        own = np.where(coordinates(subspace, vector[None], directions)[0] < 0, -1.0, 1.0)
        for shard, batch, x in self._batches():
            cosine = centred_cosines(subspace, x, vector)
            if shard == self._place.shard:
                cosine[batch.row == self._place.row] = -np.inf
            nearest.offer(shard, batch, cosine)
            for (same, other), u in zip(sides, (coordinates(subspace, x, directions) * own).T, strict=True):
                same.offer(shard, batch, np.where(u > 0, u, -np.inf))
                other.offer(shard, batch, np.where(u < 0, -u, -np.inf))

    def _batches(self) -> Iterator[tuple[str, VectorBatch, NDArray[Any]]]:
        """All vectors of the pool, as they are scored, with their shards."""
        from scalselect_assets.method.preprocessing import prepared_rows

        for shard in sorted(self._in_basis):
            table, header = attention_embeddings.recorded_table(self._artifacts, shard)
            if header["data_version"] != self._in_basis[shard]["attention_embeddings"]:
                self._problems.append(
                    f"the vectors of shard {shard!r} are newer than the basis and were not compared; "
                    f"{self._store.remedy}"
                )
                continue
            for batch in self._store.embeddings.read(table):
                yield shard, batch, prepared_rows(batch.vector, to_unit_length=self._selection.unit_rows)

    def _direction(
        self,
        subspace: "Subspace",
        subset: pl.DataFrame,
        number: int,
        coordinate: float,
        share: float,
        same: "_Leading",
        other: "_Leading",
    ) -> Direction:
        side = -1.0 if coordinate < 0 else 1.0
        strength = float(subspace.singular_values[number - 1])
        return Direction(
            direction=int(number),
            coordinate=float(coordinate),
            leverage=float(coordinate**2),
            share=float(share),
            singular_value=strength,
            energy_share=strength**2 / float(subspace.spectrum.sum()),
            same_side=tuple(Exemplar(**row) for row in same.rows(subset, "coordinate", side)),
            other_side=tuple(Exemplar(**row) for row in other.rows(subset, "coordinate", -side)),
        )


class _Leading:
    """The rows of highest value in a stream; ties by key, then shard."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows = pl.DataFrame(
            schema={
                "value": pl.Float64,
                "shard": pl.String,
                "row": pl.Int64,
                "sample_key": pl.String,
                "source_id": pl.String,
            }
        )

    def offer(self, shard: str, batch: VectorBatch, values: NDArray[np.float64]) -> None:
        """Take in a batch; rows of value -inf are not meant."""
        if not self._size:
            return
        # All that could still be among the first, ties included; the rest never becomes a frame.
        finite = np.flatnonzero(np.isfinite(values))
        if len(finite) > self._size:
            least = np.partition(values[finite], -self._size)[-self._size]
            finite = finite[values[finite] >= least - 10.0**-_TIE_DIGITS]
        rows = pl.DataFrame(
            {
                "value": values[finite],
                "shard": [shard] * len(finite),
                "row": batch.row[finite],
                "sample_key": [batch.sample_key[place] for place in finite],
                "source_id": [batch.source_id[place] for place in finite],
            },
            schema=self._rows.schema,
        )
        self._rows = (
            pl.concat([self._rows, rows])
            .sort(pl.col("value").round(_TIE_DIGITS), "sample_key", "shard", descending=[True, False, False])
            .head(self._size)
        )

    def rows(self, subset: pl.DataFrame, name: str, factor: float = 1.0) -> list[dict[str, Any]]:
        """The rows in order, the value by ``name`` and times ``factor``, with their places in the subset."""
        found = self._rows.join(
            subset, on=["sample_key", "shard"], how="left", maintain_order="left", nulls_equal=False
        )
        return [
            {name: row.pop("value") * factor, "selected_rank": row.pop("rank"), **row}
            for row in found.iter_rows(named=True)
        ]


# What the model saw


@dataclass(frozen=True, slots=True, eq=False)
class SampleAttention:
    """A sample's attention map with its images.

    Attributes:
        map: Computed by the code that made the vector.
        images: Upright, in the order of the image marks.
        paths: Of the images.
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
        from scalselect_assets.method.attention_map import overlay_png

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
    from scalselect_assets.method.attention_map import attention_map
    from scalselect_assets.method.conversation import Conversation
    from scalselect_assets.method.encoder import ChatSample
    from scalselect_assets.method.images import decode_image
    from scalselect_assets.method.rejection import Rejection

    store = _Store(selection, storage)
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
    source = storage.samples(selection.source, selection.image_root, selection.store)
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
