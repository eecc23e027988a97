"""Beside the path, all shards: the samples that repeat a better one, exactly or nearly.

Holds: one row per removed sample with the kept one that it repeats. An exact duplicate has the text and the
image bytes of another sample, whatever their names; a near-duplicate's vector points in nearly the same
direction from the pool's mean and its text is like the other's, or both show the same pictures and their
texts are alike (`method.choice.near_duplicates`, `method.choice.text_likeness`). Of samples that repeat
each other, the one of highest normalised leverage stays; ties by `sample_key`, then shard. Costs: one pass
over the vectors and the texts, some 300 bytes of memory per sample and 4 for each of its distinct words and
pairs of words, the vectors once more on the disk while it runs, and the search: exactly, at most n² · d
multiplications; with an index, some milliseconds per sample.

Results cannot be reused: any changed shard moves the mean, and so every direction.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.choice.text_overlap import words
from scalselect_assets.declaration.curation import DEFAULT_LIKENESS, NearDuplicates
from scalselect_assets.embedding import receipts
from scalselect_assets.method.representation.conversation import Role
from scalselect_assets.recording.columns import SELECTED_SUBSET, Column, Table, polars_schema
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingStore, EmbeddingTable
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.samples import parse_row
from scalselect_assets.subspace import importance_scores
from scalselect_assets.subspace.basis_header import BasisHeader

if TYPE_CHECKING:
    from scalselect_assets.method.choice.near_duplicates import Contents, Removals
    from scalselect_assets.method.choice.nearest_cosines import NearestCosines
    from scalselect_assets.method.subspace.basis import Subspace
    from scalselect_assets.resources.search_table import SearchTable

NAME: Final = "near_duplicates"
CODE_VERSION: Final = "2"
EXACT: Final = "exact_duplicate"
NEAR: Final = "near_duplicate"

_RECALL_QUERIES: Final = 256
_NEAREST_QUERIES: Final = 512
_SHOWN_GROUPS: Final = 10
_SIDES: Final[Mapping[str, tuple[Role, ...]]] = {"asked": ("system", "user"), "answered": ("assistant",)}

NEAR_DUPLICATES: Table = {
    "shard": SELECTED_SUBSET["shard"],
    "row": SELECTED_SUBSET["row"],
    "sample_key": SELECTED_SUBSET["sample_key"],
    "reason": Column(pl.String(), "exact_duplicate or near_duplicate."),
    "partner_shard": Column(pl.String(), "Shard of the kept sample that it repeats."),
    "partner_row": Column(pl.Int64(), "Row of the kept sample."),
    "partner_key": Column(pl.String(), "Key of the kept sample; its own, where another shard repeats it."),
    "cosine": Column(
        pl.Float64(),
        "Between the two vectors, from the pool's mean; null for exact duplicates. Of several exact copies "
        "that are near the partner, that of the best of them.",
    ),
    "same_pictures": Column(pl.Boolean(), "Whether both show the same pictures; null for exact duplicates."),
    "question_likeness": Column(
        pl.Float64(),
        "How much of the shorter question the other one shares, 0 to 1; null for exact duplicates.",
    ),
    "text_likeness": Column(
        pl.Float64(), "The same of questions and answers, the lower of both; null for exact duplicates."
    ),
}

_RANKED = pl.Schema(
    {
        "shard": pl.String(),
        "row": pl.Int64(),
        "sample_key": pl.String(),
        "normalised_leverage": pl.Float64(),
        "content": pl.String(),
        "pictures": pl.String(),
        "asked": pl.List(pl.UInt32()),
        "answered": pl.List(pl.UInt32()),
    }
)


PARTNERS_CHECK = "every_partner_is_kept"


@dataclass(frozen=True, slots=True)
class RankedPool:
    """All embedded samples of a pool.

    Attributes:
        ranked: Shard, row, sample key, normalised leverage and what `_contents` gives, the best first.
        tables: The tables of the shards, by shard.
        embeddings: The store of the tables.
    """

    ranked: pl.DataFrame
    tables: Mapping[str, EmbeddingTable]
    embeddings: EmbeddingStore


def read_pool(
    artifacts: ArtifactStore,
    embeddings: EmbeddingStore,
    basis: BasisHeader,
) -> RankedPool:
    """The samples of all shards by leverage; memory of one shard's texts, and of keys and contents of all.

    Args:
        artifacts: The store.
        embeddings: Its tables.
        basis: The header of the basis that the scores must be of.

    Raises:
        dg.Failure: Vectors or scores are not those of the basis.
    """
    tables: dict[str, EmbeddingTable] = {}
    frames = [pl.DataFrame(schema=_RANKED)]
    for shard in sorted(basis.shards):
        tables[shard], _ = receipts.fitted_table(artifacts, shard, basis.vectors_of(shard))
        scores = importance_scores.read_scores(
            artifacts, basis.data_version, shard, ["row", "sample_key", "normalised_leverage"]
        )
        rows = scores.join(_contents(embeddings, tables[shard]), on=["row", "sample_key"])
        if rows.height != tables[shard].n_rows or rows.height != scores.height:
            raise dg.Failure(
                f"shard {shard!r} has {scores.height} scores and {tables[shard].n_rows} vectors, of which "
                f"{rows.height} belong together; materialize importance_scores[{shard}] again",
                allow_retries=False,
            )
        frames.append(rows.with_columns(shard=pl.lit(shard)).select(_RANKED.names()).cast(_RANKED))
    ranked = pl.concat(frames).sort(
        ["normalised_leverage", "sample_key", "shard"], descending=[True, False, False]
    )
    return RankedPool(ranked, tables, embeddings)


def without(pool: RankedPool, removed: pl.DataFrame) -> RankedPool:
    """The pool without some of its rows, by shard and row."""
    return replace(
        pool, ranked=pool.ranked.join(removed, on=["shard", "row"], how="anti", maintain_order="left")
    )


def find(
    pool: RankedPool, subspace: "Subspace", settings: NearDuplicates, *, to_unit_length: bool
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The removals, a frame of `NEAR_DUPLICATES` by shard and row, and what is recorded of the search.

    Exact copies stand or fall with the best of them, and only that is searched for.
    """
    from scalselect_assets.method.choice.near_duplicates import near_duplicates
    from scalselect_assets.method.choice.nearest_cosines import nearest_cosines
    from scalselect_assets.resources.search_table import search_table

    ranked = pool.ranked.with_row_index("rank").with_columns(
        pl.col("rank").cast(pl.Int64), best=pl.col("rank").cast(pl.Int64).min().over("content")
    )
    bests = ranked.filter(pl.col("rank") == pl.col("best"))
    written: list[NDArray[np.int64]] = []
    directions = _directions(pool, bests, subspace, written, to_unit_length=to_unit_length)
    with search_table(pool.embeddings, subspace.d, directions, exact_up_to=settings.exact_up_to) as vectors:
        ranks = np.concatenate([np.empty(0, np.int64), *written])  # by position in the search table
        order = np.argsort(ranks)
        contents = _compared(ranked[ranks], settings.text_likeness or DEFAULT_LIKENESS)
        some = order[:: max(1, -(-len(order) // _NEAREST_QUERIES))]
        nearest = nearest_cosines(some, vectors.take(some), vectors.scan(), contents)
        cosine = nearest.suggested() if settings.cosine == "suggested" else settings.cosine
        removals = near_duplicates(
            order, vectors, cosine, contents=contents if settings.text_likeness else None
        )
        recorded: dict[str, Any] = {
            "search": "ivf" if vectors.indexed else "exact",
            "searched": vectors.n,
            "recall": _recall(vectors, order[removals.kept[order]], cosine) if vectors.indexed else 1.0,
            "cosine": cosine,
            **_numbers_of_nearest(nearest),
        }
    frame = _frame(ranked, ranks, removals, contents)
    groups = (
        frame.group_by("partner_shard", "partner_row", "partner_key")
        .len("removed")
        .sort(["removed", "partner_shard", "partner_row"], descending=[True, False, False])
    )
    sharing = frame.filter("same_pictures")
    return frame, {
        **recorded,
        "groups": groups.height,
        "largest_groups": groups.head(_SHOWN_GROUPS).to_dicts(),
        "near_pairs": frame.filter(reason=NEAR).height,
        "pairs_sharing_pictures": sharing.height,
        "pairs_sharing_pictures_not_question": sharing.filter(
            pl.col("question_likeness") < contents.least_likeness
        ).height,
        "kept_for_their_text": int(np.count_nonzero(removals.spared)),
    }


def _compared(rows: pl.DataFrame, least_likeness: float) -> "Contents":
    """Pictures and texts of some rows, in their order."""
    from scalselect_assets.method.choice.near_duplicates import Contents
    from scalselect_assets.method.choice.text_likeness import Shingles, TextLikeness

    texts = (Shingles.of([text.to_numpy() for text in rows[side]]) for side in ("asked", "answered"))
    pictures = rows["pictures"].rank("dense").cast(pl.Int64).to_numpy()
    return Contents(pictures, TextLikeness(*texts), least_likeness)


def _numbers_of_nearest(nearest: "NearestCosines") -> dict[str, float]:
    """The suggestion and what it is made of; only the suggestion where the pool has no two rows."""
    quantiles = {
        f"{name}_cosine_{percent}": float(np.quantile(values, percent / 100))
        for name, values in (("nearest", nearest.nearest), ("innocent", nearest.innocent))
        for percent in (50, 90, 99)
        if len(values)
    }
    return {"suggested_cosine": nearest.suggested(), **quantiles}


def _contents(embeddings: EmbeddingStore, table: EmbeddingTable) -> pl.DataFrame:
    """Row, key and what each sample says and shows.

    Returns:
        ``content``, a hash of its conversation and its images' bytes; ``pictures``, one of the latter only;
        and the hashed words of what is ``asked`` and ``answered``.
    """
    from scalselect_assets.method.choice.text_likeness import shingles

    held = embeddings.read_rows(table, ["sample_key", "text", "image_sha256"])
    contents, pictures = [], []
    said: dict[str, list[NDArray[np.uint32]]] = {"asked": [], "answered": []}
    for row, text, images in zip(
        *(held[name].to_pylist() for name in ("row", "text", "image_sha256")), strict=True
    ):
        sample = parse_row(text, row).sample
        if sample is None:
            raise dg.Failure(
                f"row {row} of shard {table.shard!r} is embedded, but its text is no sample any more; "
                f"materialize attention_embeddings[{table.shard}] again",
                allow_retries=False,
            )
        contents.append(digest(sample.conversation.to_json(), images))
        pictures.append(digest(images))
        for side, roles in _SIDES.items():
            said[side].append(shingles(words(" ".join(sample.conversation.texts(*roles)))))
    return pl.DataFrame(held.select(["row", "sample_key"])).with_columns(
        content=pl.Series(contents, dtype=pl.String),
        pictures=pl.Series(pictures, dtype=pl.String),
        **{side: pl.Series(texts, dtype=pl.List(pl.UInt32())) for side, texts in said.items()},
    )


def _directions(
    pool: RankedPool,
    bests: pl.DataFrame,
    subspace: "Subspace",
    written: list[NDArray[np.int64]],
    *,
    to_unit_length: bool,
) -> Iterator[NDArray[np.float32]]:
    """The directions of the best of each content, in batches; adds the ranks of each batch to ``written``."""
    from scalselect_assets.method.choice.near_duplicates import centred_directions

    by_shard = {str(shard): rows.sort("row") for (shard,), rows in bests.group_by("shard")}
    for shard, rows in sorted(by_shard.items()):
        row, rank = rows["row"].to_numpy(), rows["rank"].to_numpy()
        for batch in pool.embeddings.read(pool.tables[shard]):
            place = np.minimum(np.searchsorted(row, batch.row), len(row) - 1)
            wanted = row[place] == batch.row
            written.append(rank[place[wanted]])
            yield centred_directions(
                batch.vector[wanted], subspace.mean, subspace.scale, to_unit_length=to_unit_length
            )


def _recall(vectors: "SearchTable", kept: NDArray[np.int64], cosine: float) -> float:
    """Share of what is within the threshold that the index finds, for kept rows from all over the ranking."""
    from scalselect_assets.method.choice.near_duplicates import pairs_within

    step = -(-len(kept) // _RECALL_QUERIES)
    queries = vectors.take(kept[::step])
    there = pairs_within(queries, vectors.scan(), cosine)
    found = pairs_within(queries, vectors.near(queries, cosine), cosine)
    # Each row is within the threshold of itself, so there are some; unless none has a direction.
    hit = np.isin(_pair_numbers(there, vectors.n), _pair_numbers(found, vectors.n))
    return float(hit.mean()) if len(there) else 1.0


def _pair_numbers(pairs: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """One number for each (p, 2) pair of a query and a position below n."""
    numbers: NDArray[np.int64] = pairs[:, 0] * n + pairs[:, 1]
    return numbers


def _frame(
    ranked: pl.DataFrame, ranks: NDArray[np.int64], removals: "Removals", contents: "Contents"
) -> pl.DataFrame:
    """The removals with their partners' names."""
    removed = np.flatnonzero(~removals.kept)
    partner = removals.partner[removed]
    near = pl.DataFrame(
        {
            "best": ranks[removed],
            "near_partner": ranks[partner],
            "cosine": removals.cosine[removed],
            "same_pictures": contents.pictures[removed] == contents.pictures[partner],
            "question_likeness": contents.likeness.asked.likeness(removed, partner),
            "text_likeness": contents.likeness(removed, partner),
        },
        schema={
            "best": pl.Int64,
            "near_partner": pl.Int64,
            "cosine": pl.Float64,
            "same_pictures": pl.Boolean,
            "question_likeness": pl.Float64,
            "text_likeness": pl.Float64,
        },
    )
    names = ranked.select(partner="rank", partner_shard="shard", partner_row="row", partner_key="sample_key")
    return (
        ranked.join(near, on="best", how="left")
        .filter(pl.col("near_partner").is_not_null() | (pl.col("rank") != pl.col("best")))
        .with_columns(
            reason=pl.when(pl.col("near_partner").is_null()).then(pl.lit(EXACT)).otherwise(pl.lit(NEAR)),
            partner=pl.coalesce("near_partner", "best"),
        )
        .join(names, on="partner", how="left")
        .select(polars_schema(NEAR_DUPLICATES).names())
        .cast(polars_schema(NEAR_DUPLICATES))
        .sort(["shard", "row"])
    )


def partners_kept(frame: pl.DataFrame) -> dg.AssetCheckResult:
    """Whether nothing is removed twice, or for something that is removed itself."""
    rows, partners = ["shard", "row"], ["partner_shard", "partner_row"]
    both = frame.join(frame, left_on=partners, right_on=rows, how="semi").height
    repeated = frame.height - frame.select(rows).n_unique()
    return dg.AssetCheckResult(
        check_name=PARTNERS_CHECK,
        passed=both == 0 and repeated == 0,
        metadata={"removed": frame.height, "removed_for_a_removed_one": both, "removed_twice": repeated},
    )
