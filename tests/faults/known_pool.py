"""A pool of which every vector is known without a refresh, and a store of it."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.operations.refresh import RefreshReport
from scalselect_assets.resources.vlm import VlmResource
from tests.bench import Bench
from tests.conftest import sharegpt_row, write_lines
from tests.faults.standin import DAMAGED, MODEL, vector_of

ENERGY = 0.9
BUDGET = 0.5


class Pool:
    """Shards of numbered samples. No number is ever used twice, so content tells versions of a shard apart.

    Of each ten numbers, one has an image that cannot be decoded and one has none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, list[int]] = {}
        self.answers: dict[int, str] = {}
        self._next = 0
        (folder / "images").mkdir(parents=True)

    def add(self, shard: str, n_rows: int) -> None:
        """A new shard."""
        self.shards[shard] = self._new(n_rows)
        self.write(shard)

    def change(self, shard: str, places: list[int]) -> None:
        """Replace the samples at some places by new ones."""
        for place, number in zip(places, self._new(len(places)), strict=True):
            self.shards[shard][place] = number
        self.write(shard)

    def remove(self, shard: str) -> None:
        """Delete a shard's file."""
        del self.shards[shard]
        (self.folder / shard).unlink()

    def texts(self, shard: str) -> dict[int, str]:
        """The rows of a shard as its file has them."""
        return {
            row: json.dumps(self._row(number), ensure_ascii=False)
            for row, number in enumerate(self.shards[shard])
        }

    def vectors(self, shard: str) -> dict[int, NDArray[np.float32]]:
        """The vectors of the rows that have one."""
        return {
            row: vector_of(_question(number), _image(number))
            for row, number in enumerate(self.shards[shard])
            if _is_good(number)
        }

    def rejected(self, shard: str) -> dict[int, str]:
        """The reason by row for those that have no vector."""
        reasons = {3: "undecodable_image", 8: "missing_image"}
        return {
            row: reasons[number % 10] for row, number in enumerate(self.shards[shard]) if not _is_good(number)
        }

    def scores(self) -> tuple[int, dict[tuple[str, int], float]]:
        """The rank, and the leverage of each embedded row, by the definition."""
        vectors = {
            (shard, row): vector for shard in self.shards for row, vector in self.vectors(shard).items()
        }
        x = np.array(list(vectors.values()), np.float64)
        u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
        rank = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), ENERGY)) + 1
        leverage = (u[:, :rank] ** 2).sum(1)
        return rank, dict(zip(vectors, leverage.tolist(), strict=True))

    def selected(self) -> list[tuple[str, int]]:
        """The rows of highest leverage within the budget, best first."""
        _, scores = self.scores()
        return sorted(scores, key=lambda place: -scores[place])[: int(BUDGET * len(scores) + 0.5)]

    def _new(self, n_rows: int) -> list[int]:
        numbers = list(range(self._next, self._next + n_rows))
        self._next += n_rows
        for number in numbers:
            if number % 10 != 8:
                (self.folder / "images" / f"{number}.png").write_bytes(_image(number))
        return numbers

    def write(self, shard: str) -> None:
        """Write a shard's file as it is to be."""
        write_lines(self.folder / shard, map(self._row, self.shards[shard]))

    def _row(self, number: int) -> dict[str, object]:
        return sharegpt_row(
            f"images/{number}.png",
            f"<image>\n{_question(number)}",
            self.answers.get(number, "Yes"),
            id=number,
        )


def _is_good(number: int) -> bool:
    return number % 10 not in {3, 8}


def _question(number: int) -> str:
    return f"Is this picture {number}?"


def _image(number: int) -> bytes:
    return (DAMAGED if number % 10 == 3 else b"image ") + str(number).encode()


class FaultBench(Bench):
    """A store of a pool under the stand-in for a model; finished rows are set aside at once."""

    def __init__(self, pool: Path, store: Path, **options: object) -> None:
        super().__init__(pool, store, Path(MODEL))
        self.options.update(target_model=MODEL, budget=BUDGET, energy=ENERGY, **options)
        self.vlm = VlmResource(device="cpu", set_aside_seconds=0)


def refresh(pool: Path, store: Path) -> RefreshReport:
    """One refresh, as a function for a child."""
    return FaultBench(pool, store).refresh()


def problems(bench: FaultBench) -> list[str]:
    """What a refresh says is wrong, whether it went on or not; nothing if all is well."""
    try:
        return bench.refresh().problems()
    except (OSError, RuntimeError) as error:
        return [str(error)]
