"""Pools and their held-out questions: generated ones, easy-VQA, and any folder of ShareGPT rows.

A generated pool ``world-PERCENT`` repeats PERCENT of its rows: another picture of the same scene with
another wording of the same question. ``world-PERCENT-junk`` also makes a tenth of its rows worthless, one
half by a picture of noise and one half by a wrong answer. Sources (skills) are of very unequal size, and
some colours, shapes and skills are rare.
"""

import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.quality.asked import (
    RARE_SKILLS,
    SKILL_SHARES,
    SKILLS,
    TERSE_WORDINGS,
    WORDINGS,
    Asked,
    ask,
    caption,
)
from benchmarks.quality.drawn_scenes import CELL, RARE, DrawnScene, draw_scene, render
from scalselect_assets.resources.samples import parse_row

_JUNK_SHARE = 0.1
_TEST_SEED, _BASE_SEED = 5_000_000, 3
_TRIES = 200
_HELD_OUT = 5  # every fifth question of a folder, by its text
_TRUTHS = {"yes", "no"}
_SHAPES_OF_EASY_VQA = {"circle", "rectangle", "triangle"}


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Rows about pictures.

    Attributes:
        pictures: (m, side, side, 3) uint8.
        picture: (n,) int64, the picture of each row.
        asked: The questions.
        answers: What is to be answered.
        sources: Skills or other sources.
        group: (n,) int64, equal for rows that repeat each other.
        noise: (n,) bool, rows whose picture is noise.
        wrong: (n,) bool, rows whose answer is wrong.
        tail: (n,) bool, rows that show or ask for something rare.
    """

    pictures: NDArray[np.uint8]
    picture: NDArray[np.int64]
    asked: list[str]
    answers: list[str]
    sources: list[str]
    group: NDArray[np.int64]
    noise: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    tail: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.asked)

    def take(self, rows: NDArray[np.int64]) -> "Questions":
        """Some rows."""
        return Questions(
            self.pictures,
            self.picture[rows],
            *([values[row] for row in rows] for values in (self.asked, self.answers, self.sources)),
            self.group[rows],
            self.noise[rows],
            self.wrong[rows],
            self.tail[rows],
        )


def make_pool(
    name: str, seed: int, *, rows: int, tests: int, grid: int, place: Path | None
) -> tuple[Questions, Questions]:
    """A pool and its held-out questions.

    Args:
        name: ``world-PERCENT``, ``world-PERCENT-junk``, ``easy-vqa`` or ``folder``.
        seed: Another pool for each seed; the tests of a generated world are the same for all.
        rows: Rows of the pool, at most.
        tests: Held-out questions, at most.
        grid: Cells of a side of a picture.
        place: The wheel of easy-vqa, or the folder of ShareGPT rows.

    Raises:
        SystemExit: There is no such pool, or its data is not given.
    """
    kind, *more = name.split("-")
    if kind == "world" and more and more[0].isdecimal():
        copies, junk = int(more[0]) / 100, _JUNK_SHARE if "junk" in more else 0.0
        return (
            world(rows, 1000 + seed, grid, copies=copies, junk=junk),
            world(tests, _TEST_SEED, grid, copies=0.0, balanced=True),
        )
    if name not in {"easy-vqa", "folder"}:
        raise SystemExit(f"no pool {name!r}: name world-PERCENT, world-PERCENT-junk, easy-vqa or folder")
    if place is None or not place.exists():
        raise SystemExit(f"the pool {name} needs its data, and {place} is not there: give --{name} PLACE")
    rng = np.random.default_rng(seed)
    if name == "easy-vqa":
        pool, test = (_easy_vqa(place, part, grid * CELL) for part in ("train", "test"))
    else:
        pool, test = _folder(place, grid * CELL)
    asked = np.random.default_rng(0).permutation(len(test))[:tests]
    return pool.take(np.sort(rng.permutation(len(pool))[:rows])), test.take(np.sort(asked))


def world(
    n: int, seed: int, grid: int, *, copies: float, junk: float = 0.0, balanced: bool = False
) -> Questions:
    """Questions about scenes: n rows, of which a share repeats other rows; ``balanced`` asks skills alike."""
    rng = np.random.default_rng([seed, n, int(balanced)])
    n_groups = max(len(SKILLS), round(n * (1 - copies)))
    skills = rng.choice(len(SKILLS), n_groups, p=None if balanced else SKILL_SHARES)
    groups = [_scene_and_question(rng, SKILLS[skill], grid, balanced=balanced) for skill in skills]
    # How often a scene is repeated is very unequal, as in scraped pools.
    weights = rng.pareto(1.2, n_groups) + 0.05
    repeated = rng.choice(n_groups, n - n_groups, p=weights / weights.sum())
    group = rng.permutation(np.concatenate([np.arange(n_groups), repeated]))
    worthless = rng.random(n) < junk
    noise = worthless & (rng.random(n) < 0.5)
    answers_of_all = sorted({answer for _, (_, answer) in groups})
    pictures, asked, answers, tail = [], [], [], []
    for row, number in enumerate(group.tolist()):
        scene, (words, answer) = groups[number]
        skill = SKILLS[skills[number]]
        picture = render(scene, rng)
        if noise[row]:
            picture = rng.integers(0, 256, picture.shape, dtype=np.uint8)
        elif worthless[row]:
            answer = answers_of_all[int(rng.integers(len(answers_of_all)))]
        pictures.append(picture)
        asked.append(WORDINGS[skill][int(rng.integers(len(WORDINGS[skill])))].format(*words))
        answers.append(answer)
        tail.append(skill in RARE_SKILLS or bool(RARE & {*words, answer}))
    sources = [SKILLS[skills[number]] for number in group]
    wrong = worthless & ~noise
    rare = np.array(tail, np.bool_)
    return Questions(np.stack(pictures), np.arange(n), asked, answers, sources, group, noise, wrong, rare)


def alignment(n: int, grid: int, *, terse: float, per_picture: int = 4) -> Questions:
    """What the base model is made on: captions, and a share ``terse`` of questions in words of their own."""
    rng = np.random.default_rng(_BASE_SEED)
    pictures, said = [], []
    for _ in range(-(-n // per_picture)):
        scene = draw_scene(rng, grid, tail=0.0, sign=bool(rng.integers(2)))
        pictures.append(render(scene, rng))
        for _ in range(per_picture):
            skill = SKILLS[int(rng.integers(len(SKILLS)))]
            found = ask(rng, scene, skill) if rng.random() < terse else None
            if found is None:
                said.append(caption(rng, scene))
            else:
                said.append((TERSE_WORDINGS[skill].format(*found[0]), found[1]))
    picture = np.repeat(np.arange(len(pictures)), per_picture)
    return _plain(np.stack(pictures), picture, said, ["base"] * len(said), np.arange(len(said)))


def _scene_and_question(
    rng: np.random.Generator, skill: str, grid: int, *, balanced: bool
) -> tuple[DrawnScene, Asked]:
    for _ in range(_TRIES):
        sign = skill == "read" or rng.random() < 0.3
        scene = draw_scene(rng, grid, tail=0.0 if balanced else 1.0, sign=sign)
        if (found := ask(rng, scene, skill)) is not None:
            return scene, found
    raise RuntimeError(f"no scene of {grid} x {grid} cells has a question of the skill {skill!r}")


def _plain(
    pictures: NDArray[np.uint8],
    picture: NDArray[np.int64],
    said: Sequence[tuple[str, str]],
    sources: list[str],
    group: NDArray[np.int64],
) -> Questions:
    """Rows of which nothing is known to be junk or rare."""
    none = np.zeros(len(said), np.bool_)
    asked, answers = [one for one, _ in said], [one for _, one in said]
    return Questions(pictures, picture, asked, answers, sources, group, none, none, none)


def _easy_vqa(wheel: Path, part: str, side: int) -> Questions:
    """The published questions of easy-VQA in its wheel."""
    with zipfile.ZipFile(wheel) as files:
        rows = json.loads(files.read(f"easy_vqa/data/{part}/questions.json"))
        pictures = np.stack(
            [
                _small(files.read(f"easy_vqa/data/{part}/images/{number}.png"), side)
                for number in range(1 + max(number for *_, number in rows))
            ]
        )
    picture = np.array([number for *_, number in rows])
    said = [(asked, answer) for asked, answer, _ in rows]
    return _plain(pictures, picture, said, [_kind(*one) for one in said], picture)


def _kind(asked: str, answer: str) -> str:
    about = "shape" if any(shape in asked for shape in _SHAPES_OF_EASY_VQA) else "colour"
    if answer in _TRUTHS:
        return f"{'no ' if ' not ' in asked else 'is '}{about}?"
    return "shape" if answer in _SHAPES_OF_EASY_VQA else "colour"


def _folder(folder: Path, side: int) -> tuple[Questions, Questions]:
    """Rows of one picture and one question from ShareGPT files; no question text is in pool and test."""
    pictures, said, sources = [], [], []
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            sample = parse_row(line, number).sample
            if sample is None or len(sample.images) != 1:
                continue
            pictures.append(_small((file.parent / sample.images[0]).read_bytes(), side))
            texts = sample.conversation.texts
            said.append((_text(texts("user")), _text(texts("assistant"))))
            sources.append(str(json.loads(line).get("source", file.stem)))
    if not said:
        raise SystemExit(f"{folder} has no .jsonl file with rows of one picture each")
    group = np.unique([asked for asked, _ in said], return_inverse=True)[1]
    everything = _plain(np.stack(pictures), np.arange(len(said)), said, sources, group)
    held_out = group % _HELD_OUT == 0
    return everything.take(np.flatnonzero(~held_out)), everything.take(np.flatnonzero(held_out))


def _text(parts: Iterable[str]) -> str:
    return " ".join(" ".join(parts).lower().split())


def _small(content: bytes, side: int) -> NDArray[np.uint8]:
    """A picture made square and small, with white beside it."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    square = Image.new("RGB", (max(image.size),) * 2, (255, 255, 255))
    square.paste(image, (0, 0))
    return np.asarray(square.resize((side, side), Image.Resampling.BOX), np.uint8)
