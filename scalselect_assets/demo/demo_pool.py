"""The demo pool: drawn scenes with questions and correct answers, and rows that must be rejected.

Most scenes are near-identical variants of a few templates, as in real instruction pools; about 3 % form a
rare tail that looks and reads differently. A third of the conversations is Korean. ``DEMO_REJECTIONS`` lists
the planned faults, so that a run over the pool can be checked to the row.

The pool needs only NumPy and Pillow; it takes less than a second and less than 1 MB.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np

from scalselect_assets.demo.drawing import CUT_PICTURE, NOT_A_PICTURE, draw, png
from scalselect_assets.demo.questions import QUESTIONS
from scalselect_assets.demo.scenes import (
    COLOURS,
    EN_NUMBERS,
    SCENES,
    SHAPES,
    Pair,
    Picture,
    RareKind,
    RarePicture,
    Scene,
    Source,
    pick,
)
from scalselect_assets.method.representation.rejection import RejectionReason

N_SHARDS: Final = 8
DEMO_REJECTIONS: Final[Mapping[RejectionReason, int]] = MappingProxyType(
    {
        RejectionReason.MALFORMED_ROW: 3,
        RejectionReason.DUPLICATE: 2,
        RejectionReason.TEXT_ONLY: 2,
        RejectionReason.IMAGE_COUNT_MISMATCH: 2,
        RejectionReason.NO_INSTRUCTION_TEXT: 2,
        RejectionReason.OUTSIDE_IMAGE_ROOT: 1,
        RejectionReason.MISSING_IMAGE: 2,
        RejectionReason.UNDECODABLE_IMAGE: 2,
        RejectionReason.TOO_LONG: 1,
    }
)
"""Rows of the pool that must be rejected for the demo model, by reason; duplicates are within a shard."""

_N_COMMON_ROWS: Final = 449
_N_SCENES_PER_SOURCE: Final = 60
_MARK: Final = "<image>"
_Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DemoPool:
    """A pool that ``write_demo_pool`` wrote; ``n_rows`` counts every line, including the bad ones."""

    root: Path
    n_shards: int
    n_rows: int
    n_bad_rows: int


def write_demo_pool(root: Path, *, seed: int = 0) -> DemoPool:
    """Write the shards and images under ``root``, except files that already hold the same bytes.

    Other files are neither read nor removed. Names do not depend on the seed, so another seed replaces the
    pool in place.

    Args:
        root: Folder of ``shard-000.jsonl`` and so on, and the image root of the rows.
        seed: Seed of every position, wording and order; the counts stay the same.

    Returns:
        The folder and its counts.
    """
    plan = _plan(seed)
    # Images first: a sensor that watches the folder must never see a shard before its images.
    for reference, content in _image_files(plan.pictures).items():
        _write_if_different(root / reference, content)
    for index, lines in enumerate(plan.shards):
        _write_if_different(root / f"shard-{index:03d}.jsonl", "".join(f"{x}\n" for x in lines).encode())
    return DemoPool(
        root=root,
        n_shards=len(plan.shards),
        n_rows=sum(map(len, plan.shards)),
        n_bad_rows=sum(DEMO_REJECTIONS.values()),
    )


def demo_corpus() -> Iterator[str]:
    """The texts of the good rows of the default pool, without image marks, for training the tokenizer."""
    for row in _plan(0).good_rows:
        for message in row["messages"]:
            yield from filter(None, (piece.strip() for piece in message["content"].split(_MARK)))


_SYSTEM_TEXTS: Final = (
    ("You are a careful observer of drawn scenes.", "당신은 그림을 꼼꼼하게 살펴보는 도우미입니다."),
    ("Answer briefly, and only about what is visible.", "눈에 보이는 것만 짧게 대답하세요."),
)
_RARE_ROWS: Final[tuple[tuple[RareKind, tuple[Pair, ...], tuple[Pair, ...]], ...]] = (
    (
        "noise",
        (
            (
                "Characterise the surface: is any object recognisable, or is it pure static?",
                "Pure static: every grain has an unrelated random hue, and no object is recognisable.",
            ),
        ),
        (
            (
                "화면 전체를 덮고 있는 질감을 묘사해 보세요.",
                "색이 제멋대로 섞인 잡음뿐이고, 알아볼 수 있는 물체는 없습니다.",
            ),
        ),
    ),
    (
        "negative",
        (
            (
                "This looks like a photographic negative. How bright is the backdrop?",
                "Nearly black, because the white ground of the original has been inverted.",
            ),
        ),
        (
            (
                "사진의 음화처럼 보이는데 바탕은 얼마나 밝은가요?",
                "원래의 흰 바탕이 반전되어 거의 검게 보입니다.",
            ),
        ),
    ),
    (
        "sketch",
        (
            (
                "Which building has been sketched, and with what kind of strokes?",
                "A little house with a pitched roof, one door and one window, in thin black strokes.",
            ),
            ("Has any area been filled with paint?", "None, only outlines were drawn."),
        ),
        (
            (
                "가느다란 선으로 어떤 건물을 그렸나요?",
                "뾰족한 지붕에 문과 창문이 하나씩 달린 작은 집을 그렸습니다.",
            ),
        ),
    ),
    (
        "specks",
        (
            (
                "Estimate the population of tiny specks scattered over this slide.",
                "Exactly 240 specks, none of which touches another.",
            ),
        ),
        (("먼지처럼 흩어진 작은 점이 대략 얼마나 되나요?", "정확히 이백사십 개의 점이 흩어져 있습니다."),),
    ),
    (
        "rings",
        (("How many concentric rings surround the bull's-eye?", "Six rings surround the bull's-eye."),),
        (("과녁의 중심을 둘러싼 동심원은 몇 겹인가요?", "여섯 겹의 동심원이 중심을 둘러싸고 있습니다."),),
    ),
    (
        "stripes",
        (
            (
                "Do the zebra stripes run horizontally, vertically or diagonally?",
                "diagonally",
            ),
        ),
        (("얼룩말 같은 줄무늬는 가로, 세로, 대각선 중 어느 방향인가요?", "대각선"),),
    ),
    (
        "gradient",
        (
            (
                "Where does the smooth gradient fade into darkness?",
                "Toward the upper left corner; the lower right corner glows brightest.",
            ),
        ),
        (("부드럽게 번지는 색이 어느 쪽으로 갈수록 어두워지나요?", "왼쪽 위 모서리로 갈수록 어두워집니다."),),
    ),
)


# Plan


@dataclass(frozen=True, slots=True)
class _Plan:
    """The pool before anything is drawn: pictures by reference, and the lines of each shard."""

    pictures: Mapping[str, Picture]
    good_rows: tuple[_Row, ...]
    shards: tuple[tuple[str, ...], ...]


def _plan(seed: int) -> _Plan:
    rng = np.random.default_rng(seed)
    pictures: dict[str, Picture] = {}
    rows = _common_rows(pictures, rng)
    rows += _rare_rows(pictures, seed)
    rows = [rows[int(i)] for i in rng.permutation(len(rows))]
    bounds = [round(i * len(rows) / N_SHARDS) for i in range(N_SHARDS + 1)]
    shards = [[_line(row) for row in rows[a:b]] for a, b in itertools.pairwise(bounds)]
    # A duplicate is in the shard of its original, because duplicates are only found within a shard.
    for index, (shard, copied) in enumerate(((2, 5), (6, 11))):
        row = rows[bounds[shard] + copied]
        # Another field than the id would make it another row.
        shards[shard].insert(30 + index, _line({**row, "id": f"bad-{RejectionReason.DUPLICATE}-{index}"}))
    for index, line in enumerate(_bad_lines(sorted(pictures), rng)):
        shard_lines = shards[index % N_SHARDS]
        shard_lines.insert(int(rng.integers(len(shard_lines) + 1)), line)
    return _Plan(pictures, tuple(rows), tuple(map(tuple, shards)))


def _common_rows(pictures: dict[str, Picture], rng: np.random.Generator) -> list[_Row]:
    """Rows over the templated scenes; adds the scenes to ``pictures``."""
    scenes: list[tuple[Source, str, Scene]] = []
    for variant in range(_N_SCENES_PER_SOURCE):
        for source, make in SCENES.items():
            scene = make(variant, rng)
            reference = f"images/{source}-{variant:03d}.png"
            pictures[reference] = scene
            scenes.append((source, reference, scene))
    rows: list[_Row] = []
    seen: set[str] = set()
    while len(rows) < _N_COMMON_ROWS:
        index = len(rows)
        source, reference, scene = scenes[index % len(scenes)]
        second = pick(rng, scenes) if index % 37 == 5 else None
        messages = _messages(
            source, scene, rng, second=second[2] if second else None, marked=index % 110 != 9
        )
        row = {"source": source, "messages": messages, "images": [reference]}
        if second:
            row["images"] = [reference, second[1]]
        content = json.dumps([[m["content"] for m in messages], row["images"]])
        if content in seen:
            continue
        seen.add(content)
        rows.append({**_row_id(source, index, reference), **row})
    return rows


def _row_id(source: Source, index: int, reference: str) -> _Row:
    """Ids of the kinds in real pools: integers, strings shared by the conversations of an image, none."""
    if source == "counting":
        return {"id": 1000 + index}
    if source == "colour":
        return {"id": Path(reference).stem}
    return {} if index % 4 == 0 else {"id": f"layout/{index}"}


def _messages(
    source: Source, scene: Scene, rng: np.random.Generator, *, second: Scene | None, marked: bool
) -> list[dict[str, str]]:
    ko = rng.random() < 0.35
    asks = [QUESTIONS[source][int(i)] for i in rng.permutation(len(QUESTIONS[source]))]
    pairs = [ask(scene, ko, rng) for ask in asks[: int(rng.choice((1, 2, 3), p=(0.45, 0.35, 0.2)))]]
    if marked:
        question, answer = pairs[0]
        mark_last = rng.random() < 0.1
        pairs[0] = (f"{question}\n{_MARK}" if mark_last else f"{_MARK}\n{question}", answer)
    if second:
        pairs = [*pairs[:2], _compare(scene, second, ko)]
    user, assistant = ("human", "gpt") if rng.random() < 0.15 else ("user", "assistant")
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip((user, assistant), pair, strict=True)
    ]
    if rng.random() < 0.1:
        messages.insert(0, {"role": "system", "content": pick(rng, _SYSTEM_TEXTS)[ko]})
    return messages


def _compare(first: Scene, second: Scene, ko: bool) -> Pair:
    """A later turn that brings its own image, with the mark inside the text."""
    a, b = len(first.things), len(second.things)
    if ko:
        question = f"이번에는 다른 그림입니다. {_MARK}\n첫 번째 그림보다 도형이 더 많은가요?"
        return question, "네, 더 많습니다." if b > a else "아니요, 더 많지 않습니다."
    question = f"Now look at a second picture: {_MARK}\nDoes it show more shapes than the first one?"
    numbers = f"it shows {EN_NUMBERS[b]} and the first one shows {EN_NUMBERS[a]}"
    return question, f"{'Yes' if b > a else 'No'}, {numbers}."


def _rare_rows(pictures: dict[str, Picture], seed: int) -> list[_Row]:
    """Two rows for each rare kind, one English and one Korean, each with its own picture."""
    rows: list[_Row] = []
    for kind, *languages in _RARE_ROWS:
        for variant, pairs in enumerate(languages):
            reference = f"images/rare-{kind}-{variant}.png"
            pictures[reference] = RarePicture(kind, variant, seed)
            messages = [
                {"role": role, "content": text}
                for pair in pairs
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            messages[0]["content"] = f"{_MARK}\n{messages[0]['content']}"
            rows.append(
                {
                    "id": f"rare-{kind}-{variant}",
                    "source": "rare",
                    "messages": messages,
                    "images": [reference],
                }
            )
    return rows


def _line(row: _Row) -> str:
    return json.dumps(row, ensure_ascii=False)


def _bad(row: _Row, reason: RejectionReason) -> _Row:
    """The row, with a note that it is planned to fail for ``reason``."""
    return {**row, "source": "bad", "expected_rejection": reason.value}


def _bad_lines(references: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The faulty lines except the duplicates; each has one fault and is otherwise a good row."""
    images = [references[int(i)] for i in rng.choice(len(references), size=8, replace=False)]

    def row(reason: RejectionReason, question: str, images: list[str], n: int) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "A drawn scene."}]
        return _line(_bad({"id": f"bad-{reason}-{n}", "messages": messages, "images": images}, reason))

    broken = row(RejectionReason.MALFORMED_ROW, f"{_MARK}\nWhy does this line end early?", images[:1], 0)
    colours, shapes = list(COLOURS), list(SHAPES)
    inventory = " ".join(f"Item {i} is the {pick(rng, colours)} {pick(rng, shapes)}." for i in range(1, 601))
    text_row = {
        "id": "bad-text_only-1",
        "messages": [
            {"role": "user", "content": "세모와 네모 중에서 변이 더 많은 도형은 무엇인가요?"},
            {"role": "assistant", "content": "네모"},
        ],
    }
    reason = RejectionReason
    return [
        broken[: len(broken) // 2],
        row(reason.MISSING_IMAGE, f"{_MARK}\nWhat is shown?", ["images/never-written.png"], 0),
        row(reason.UNDECODABLE_IMAGE, f"{_MARK}\nWhat is shown?", [NOT_A_PICTURE], 0),
        row(reason.IMAGE_COUNT_MISMATCH, f"{_MARK}\n{_MARK}\nWhat do both show?", images[1:2], 0),
        row(reason.NO_INSTRUCTION_TEXT, _MARK, images[2:3], 0),
        row(reason.TEXT_ONLY, "Which has more corners, a square or a triangle?", [], 0),
        row(reason.OUTSIDE_IMAGE_ROOT, f"{_MARK}\nWhat is shown?", ["images/../../outside.png"], 0),
        row(reason.TOO_LONG, f"{_MARK}\nWhich item of this list is shown? {inventory}", images[3:4], 0),
        _line(_bad({"id": "bad-malformed_row-1", "images": images[4:5]}, reason.MALFORMED_ROW)),
        row(
            reason.MISSING_IMAGE,
            f"{_MARK}\nCompare it with {_MARK}",
            [images[5], "images/lost/second.png"],
            1,
        ),
        row(reason.UNDECODABLE_IMAGE, f"{_MARK}\n무엇이 보이나요?", [CUT_PICTURE], 1),
        row(reason.IMAGE_COUNT_MISMATCH, f"{_MARK}\nWhich of the two is larger?", images[6:8], 1),
        row(reason.NO_INSTRUCTION_TEXT, f" {_MARK}\n ", images[7:8], 1),
        _line(_bad(text_row, reason.TEXT_ONLY)),
        json.dumps(["bad", "a list where a row should be"]),
    ]


def _image_files(pictures: Mapping[str, Picture]) -> dict[str, bytes]:
    """The bytes of every image file that exists, the two undecodable ones included."""
    files = {reference: png(draw(picture)) for reference, picture in pictures.items()}
    whole = files["images/rare-noise-0.png"]
    return {**files, NOT_A_PICTURE: b"This is a text file.\n", CUT_PICTURE: whole[: len(whole) // 2]}


def _write_if_different(path: Path, content: bytes) -> None:
    """Replace ``path`` in one step, unless it holds ``content`` already: a new mtime is a new version."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
