"""Why a sample was chosen, or not: its score, its place and its directions."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.choice import selected_subset
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.explain.sample_search import SamplePlace, find_sample, last_shards, remedy
from scalselect_assets.pool import raw_samples
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingStore, EmbeddingTable, VectorBatch
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import importance_scores, subspace_basis
from scalselect_assets.subspace.sample_directions import DEFAULT_DIRECTIONS, rows_of

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace

from scalselect_assets.embedding import receipts
from scalselect_assets.explain.explanation import (
    DEFAULT_EXEMPLARS,
    DEFAULT_SIMILAR,
    Direction,
    Exemplar,
    Explanation,
    ExplanationError,
    Score,
    SimilarSample,
    Tokens,
)

# Recomputed in float64, a stored leverage may be off by the rounding of float32 projections, 1e-5 at most.
_SCORE_TOLERANCE = 1e-4
# Equal vectors in different places differ by the rounding of a product; to this many digits they tie.
_TIE_DIGITS = 12
_VECTOR_COLUMNS = ("n_tokens", "n_vision_tokens", "n_dominant_tokens", "n_instruction_tokens")


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
        selection: The selection that the sample belongs to.
        storage: Opens the store.
        sample: Key, id or place of the sample, as `sample_search.find_sample` takes it.
        similar: Number of the samples most like it.
        directions: Number of its strongest directions.
        exemplars: Number of samples on either side of each direction.
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
    store = _ExplainedStore(selection, storage)
    place = store.find(sample, shards)
    rejected = store.rejection(place)
    if rejected is not None:
        return Explanation(place, "rejected", reason=rejected[0], detail=rejected[1])
    return _Scored(store, place).explanation(similar, directions, exemplars)


class _ExplainedStore:
    """The parts of a store that one explanation reads."""

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
        for asset in (raw_samples.NAME, receipts.REJECTED):
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
        table, header = receipts.recorded_table(self.artifacts, place.shard)
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

    def __init__(self, store: _ExplainedStore, place: SamplePlace) -> None:
        self._store, self._place = store, place
        self._artifacts, self._selection = store.artifacts, store.selection
        self._subspace, basis = subspace_basis.read_basis(self._artifacts)
        self._basis_version, self._in_basis = basis.data_version, basis.shards
        self._table, header = store.table(place)
        fitted = basis.vectors_of(place.shard)
        if fitted != header["data_version"]:
            raise ExplanationError(
                f"the vectors of shard {place.shard!r} are not those that the basis was fitted on "
                f"({header['data_version']} and {fitted}); {store.remedy}"
            )
        self._problems: list[str] = []

    def explanation(self, n_similar: int, n_directions: int, n_exemplars: int) -> Explanation:
        """Everything that the explanation says of the sample."""
        from scalselect_assets.method.subspace.directions import coordinates, strongest_directions

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
        from scalselect_assets.method.subspace.directions import centred_cosines, coordinates

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
        from scalselect_assets.method.subspace.preprocessing import prepared_rows

        for shard in sorted(self._in_basis):
            table, header = receipts.recorded_table(self._artifacts, shard)
            if header["data_version"] != self._in_basis[shard].attention_embeddings:
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
