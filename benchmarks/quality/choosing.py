"""Scores and choices of a pool, by the product's own code.

A strategy's name may have words before it: ``dedup+top_leverage`` removes near-duplicates first, by vectors
and texts as the product's defaults do; ``vectors+top_leverage`` removes them by vectors only, at a cosine
of 0.95.
"""

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.quality.pools import Questions
from scalselect_assets.choice.text_overlap import words
from scalselect_assets.method.choice.agreement import agree
from scalselect_assets.method.choice.candidates import Candidates, Labels, projected
from scalselect_assets.method.choice.cells import Cells, cells_of
from scalselect_assets.method.choice.choose import choose
from scalselect_assets.method.choice.near_duplicates import Contents, centred_directions, near_duplicates
from scalselect_assets.method.choice.nearest_cosines import nearest_cosines
from scalselect_assets.method.choice.strategies import strategy_named
from scalselect_assets.method.choice.terms import Budget
from scalselect_assets.method.choice.text_likeness import Shingles, TextLikeness, shingles
from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from scalselect_assets.method.representation.encoder import ChatSample, Representation, VlmEncoder
from scalselect_assets.method.subspace.basis import Subspace, fit_subspace
from scalselect_assets.method.subspace.leverage import LeverageScorer
from scalselect_assets.method.subspace.moments import accumulate
from scalselect_assets.method.subspace.rank import parse_rank_rule

_LIKENESS = 0.9  # the product's default (declaration.curation)
_VECTORS_ONLY_COSINE = 0.95
_QUERIES = 512


@dataclass(frozen=True, slots=True)
class PackedPictures:
    """Pictures in one file; a reference is ``offset:length``. Picklable, for the encoder's processes."""

    path: str

    def __call__(self, reference: str) -> bytes:
        """The bytes of a picture."""
        offset, length = map(int, reference.split(":"))
        with Path(self.path).open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass(frozen=True, slots=True, eq=False)
class Removed:
    """Rows that near-duplicate removal takes out.

    Attributes:
        rows: int64, ascending.
        cosine: The threshold.
        same_picture_other_question: How many of them share their picture with the kept row, but not its
            question.
    """

    rows: NDArray[np.int64]
    cosine: float
    same_picture_other_question: int


@dataclass(frozen=True, slots=True)
class MatrixVectors:
    """The `near_duplicates.Vectors` of a matrix."""

    matrix: NDArray[np.float32]

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Vectors`."""
        return self.matrix[positions]

    def near(
        self,
        queries: NDArray[np.float32],  # noqa: ARG002 - all rows are candidates
        cosine: float,  # noqa: ARG002
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """See `Vectors`."""
        yield np.arange(len(self.matrix)), self.matrix


class ScoredPool:
    """A pool with the vectors, the subspace and the leverages that the product computes for it.

    Attributes:
        vectors: (n, d) float32.
        subspace: Fitted on them.
        candidates: What strategies choose from.
        seconds: Of representing and scoring.
    """

    def __init__(
        self,
        pool: Questions,
        vectors: NDArray[np.float32],
        n_text: NDArray[np.int64],
        n_vision: NDArray[np.int64],
        *,
        energy: float = 0.9,
        centred: bool = True,
        seconds: float = 0.0,
    ) -> None:
        self.pool, self.seconds = pool, seconds
        # Without centring, the rows and their mirror images have a mean of zero and the same right vectors.
        self.vectors = vectors
        fitted = [vectors] if centred else [vectors, -vectors]
        self.subspace: Subspace = fit_subspace(
            accumulate(fitted, vectors.shape[1]), parse_rank_rule("energy", energy)
        )
        scorer = LeverageScorer(self.subspace)
        leverage = scorer.scores(vectors) * scorer.normalisation
        keys = np.array(
            [
                f"{asked}\0{answer}\0{row}"
                for row, (asked, answer) in enumerate(zip(pool.asked, pool.answers, strict=True))
            ]
        )
        tie_order = np.empty(len(pool), np.int64)
        tie_order[np.argsort(keys, kind="stable")] = np.arange(len(pool))
        self.candidates = Candidates(
            leverage, tie_order, n_text, n_vision, {"source": Labels.of(pool.sources)}
        )

    def blocks(self, at_once: int = 1024) -> Iterator[NDArray[np.float64]]:
        """The rows of U_k in order."""
        for start in range(0, len(self.vectors), at_once):
            yield projected(self.vectors[start : start + at_once], self.subspace)

    def cells(self, size: int) -> Cells:
        """The cells that the advice counts for a choice of a size."""
        return cells_of(self.blocks, len(self.pool), size)

    def choose(self, name: str, share: float, seed: int) -> NDArray[np.int64]:
        """The rows that a strategy chooses."""
        removal, _, strategy = name.rpartition("+")
        excluded = self.removed(by_text=removal == "dedup").rows if removal else np.empty(0, np.int64)
        size = min(max(1, round(share * len(self.pool))), len(self.pool) - len(excluded))
        terms = agree(self.candidates, Budget(size), exclude=excluded)
        made = strategy_named(strategy, seed=seed, stratify_by="source")
        return choose(self.candidates, made, terms, self.blocks).rows

    def removed(self, *, by_text: bool) -> Removed:
        """Near-duplicates of rows of higher leverage."""
        order = self.candidates.by(self.candidates.normalised_leverage, np.arange(len(self.pool)))
        if not by_text:
            cosine, contents = _VECTORS_ONLY_COSINE, None
        else:
            contents = self._contents
            some = order[:: -(-len(order) // _QUERIES)]
            everything = [(np.arange(len(self.pool)), self._directions)]
            cosine = nearest_cosines(some, self._directions[some], everything, contents).suggested()
        found = near_duplicates(order, MatrixVectors(self._directions), cosine, contents=contents)
        rows = np.flatnonzero(~found.kept)
        partners = found.partner[rows]
        same = self.pool.picture[rows] == self.pool.picture[partners]
        other = self._contents.likeness.asked.likeness(rows, partners) < _LIKENESS
        return Removed(rows, cosine, int(np.count_nonzero(same & other)))

    @cached_property
    def _directions(self) -> NDArray[np.float32]:
        return centred_directions(self.vectors, self.subspace.mean, self.subspace.scale, to_unit_length=False)

    @cached_property
    def _contents(self) -> Contents:
        sides = ([shingles(words(text)) for text in side] for side in (self.pool.asked, self.pool.answers))
        return Contents(self.pool.picture, TextLikeness(*map(Shingles.of, sides)), _LIKENESS)


def represent(
    encoder: VlmEncoder, pool: Questions, *, workers: int, batch_tokens: int
) -> tuple[list[Representation], float]:
    """What the product's encoder makes of every row, and the seconds that it took.

    Raises:
        SystemExit: It refuses a row.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder, "pictures")
        references = _pack(pool.pictures, file)
        samples = [
            ChatSample(
                Conversation((Turn("user", (IMAGE, asked)), Turn("assistant", (answer,)))),
                (references[picture],),
            )
            for asked, answer, picture in zip(pool.asked, pool.answers, pool.picture.tolist(), strict=True)
        ]
        start = time.perf_counter()
        outcomes = encoder.encode(
            samples, PackedPictures(str(file)), batch_tokens=batch_tokens, workers=workers
        )
        seconds = time.perf_counter() - start
    made = [outcome for outcome in outcomes if isinstance(outcome, Representation)]
    if len(made) < len(outcomes):
        refused = next(one for one in outcomes if not isinstance(one, Representation))
        raise SystemExit(f"the encoder refuses {len(outcomes) - len(made)} rows of the pool: {refused}")
    return made, seconds


def score(
    encoder: VlmEncoder,
    pool: Questions,
    *,
    workers: int,
    batch_tokens: int,
    energy: float = 0.9,
    centred: bool = True,
) -> ScoredPool:
    """Represent and score a pool."""
    made, seconds = represent(encoder, pool, workers=workers, batch_tokens=batch_tokens)
    start = time.perf_counter()
    n_vision = np.array([one.n_vision_tokens for one in made], np.int64)
    n_text = np.array([one.n_tokens for one in made], np.int64) - n_vision
    vectors = np.stack([one.vector for one in made])
    scored = ScoredPool(pool, vectors, n_text, n_vision, energy=energy, centred=centred)
    scored.seconds = seconds + time.perf_counter() - start
    return scored


def _pack(pictures: NDArray[np.uint8], file: Path) -> list[str]:
    references = []
    with file.open("wb") as out:
        for picture in pictures:
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
            references.append(f"{out.tell()}:{buffer.tell()}")
            out.write(buffer.getvalue())
    return references
