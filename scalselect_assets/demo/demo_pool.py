"""The demo pool: drawn scenes with questions whose answers are true of the drawing, and rows that must fail.

Most scenes are near-identical variants of a few templates, as in real instruction pools; about 3 % form a
rare tail that looks and reads differently. A third of the conversations is Korean. The planned faults are
listed in ``DEMO_REJECTIONS``, so a run over the pool can be checked to the row.

Needs only NumPy and Pillow. Costs less than a second and less than 1 MB.
"""

import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from scalselect_assets.method.rejection import RejectionReason

IMAGE_SIDE: Final = 112
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
"""How many rows of the pool the demo model's deployment must reject, by reason; duplicates are in-shard."""

_N_COMMON_ROWS: Final = 449
_N_SCENES_PER_SOURCE: Final = 60
_MARK: Final = "<image>"

_Rgb: TypeAlias = tuple[int, int, int]
_Row: TypeAlias = dict[str, Any]
_Pair: TypeAlias = tuple[str, str]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DemoPool:
    """What ``write_demo_pool`` left on disk; ``n_rows`` counts every line, the bad ones included."""

    root: Path
    n_shards: int
    n_rows: int
    n_bad_rows: int


def write_demo_pool(root: Path, *, seed: int = 0) -> DemoPool:
    """Write the shards and images under ``root``; files that already hold the same bytes stay untouched.

    Files that the pool does not own are neither read nor removed. Names do not depend on the seed, so
    another seed replaces the pool in place.

    Args:
        root: Folder of ``shard-000.jsonl`` and so on, and the image root of the rows.
        seed: Decides every position, wording and order; the counts stay the same.

    Returns:
        The folder and its counts.
    """
    plan = _plan(seed)
    # Images first: a sensor that watches the folder must never see a shard before what it names.
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
    """Every text piece of the good rows of the default pool, without image marks, for tokenizer training."""
    for row in _plan(0).good_rows:
        for message in row["messages"]:
            yield from filter(None, (piece.strip() for piece in message["content"].split(_MARK)))


# ---------------------------------------------------------------------------------------------- vocabulary


@dataclass(frozen=True, slots=True)
class _Colour:
    rgb: _Rgb
    en: str
    ko: str
    ko_adjective: str


@dataclass(frozen=True, slots=True)
class _Shape:
    en: str
    ko: str


# Each Korean shape ends in a consonant, so the particles 은, 이, 과 fit all of them.
_SHAPES: Final = {
    "circle": _Shape("circle", "원"),
    "square": _Shape("square", "정사각형"),
    "triangle": _Shape("triangle", "삼각형"),
    "star": _Shape("star", "별"),
}
_COLOURS: Final = {
    "red": _Colour((214, 40, 40), "red", "빨간색", "빨간"),
    "blue": _Colour((38, 84, 200), "blue", "파란색", "파란"),
    "green": _Colour((34, 139, 74), "green", "초록색", "초록색"),
    "yellow": _Colour((240, 196, 25), "yellow", "노란색", "노란"),
    "purple": _Colour((122, 60, 170), "purple", "보라색", "보라색"),
    "orange": _Colour((243, 120, 20), "orange", "주황색", "주황색"),
}
_BACKGROUNDS: Final = {
    "white": _Colour((252, 252, 252), "white", "흰색", "흰색"),
    "grey": _Colour((206, 208, 212), "light grey", "연한 회색", "연한 회색"),
    "beige": _Colour((240, 230, 206), "beige", "베이지색", "베이지색"),
    "sky": _Colour((204, 226, 246), "pale blue", "연한 하늘색", "연한 하늘색"),
}
_EN_NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_KO_NUMBERS: Final = ("영", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉")


# -------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True, slots=True)
class _Kind:
    """One sort of thing: its shape and its colour."""

    shape: str
    colour: str

    @property
    def en(self) -> str:
        return f"{_COLOURS[self.colour].en} {_SHAPES[self.shape].en}"

    @property
    def ko(self) -> str:
        return f"{_COLOURS[self.colour].ko_adjective} {_SHAPES[self.shape].ko}"

    def counted_en(self, n: int) -> str:
        return f"{_EN_NUMBERS[n]} {self.en}{'s' if n > 1 else ''}"


@dataclass(frozen=True, slots=True)
class _Thing:
    kind: _Kind
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class _Scene:
    """Things on a background; all of its questions are answered from these fields."""

    background: str
    gridded: bool
    things: tuple[_Thing, ...]

    @property
    def kinds(self) -> tuple[_Kind, ...]:
        return tuple(dict.fromkeys(thing.kind for thing in self.things))

    def count(self, kind: _Kind) -> int:
        return sum(thing.kind == kind for thing in self.things)


@dataclass(frozen=True, slots=True)
class _RarePicture:
    """One picture of the rare tail; ``variant`` is 0 or 1 and also seeds its noise."""

    kind: "_RareKind"
    variant: int
    seed: int


_Source: TypeAlias = Literal["counting", "colour", "layout"]
_RareKind: TypeAlias = Literal["noise", "negative", "sketch", "specks", "rings", "stripes", "gradient"]
_Picture: TypeAlias = _Scene | _RarePicture


def _pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def _jitter(rng: np.random.Generator, reach: float) -> float:
    return float(rng.uniform(-reach, reach))


def _counting_scene(variant: int, rng: np.random.Generator) -> _Scene:
    """One to six equal things, in some templates one odd thing, in the cells of a 3 x 3 board."""
    background, gridded, main, odd = (
        ("grey", False, _Kind("circle", "red"), _Kind("square", "blue")),
        ("white", True, _Kind("star", "yellow"), None),
        ("beige", False, _Kind("triangle", "green"), _Kind("circle", "orange")),
        ("sky", True, _Kind("square", "purple"), None),
    )[variant % 4]
    kinds = [*([odd] if odd else []), *[main] * int(rng.integers(1, 7))]
    # A fixed order of cells keeps scenes with the same count near-identical up to the jitter.
    cells = (4, 0, 8, 2, 6, 1, 7)
    return _Scene(
        background,
        gridded,
        tuple(
            _Thing(kind, 19 + 37 * (cell % 3) + _jitter(rng, 3), 20 + 37 * (cell // 3) + _jitter(rng, 3), 8)
            for kind, cell in zip(kinds, cells, strict=False)
        ),
    )


def _colour_scene(variant: int, rng: np.random.Generator) -> _Scene:
    """Two large things of different shape and colour, side by side."""
    background, gridded, shapes, palette = (
        ("white", False, ("circle", "star"), ("red", "blue")),
        ("grey", True, ("square", "triangle"), ("green", "yellow")),
        ("sky", False, ("triangle", "circle"), ("orange", "purple")),
        ("beige", True, ("star", "square"), ("blue", "red")),
    )[variant % 4]
    if rng.random() < 0.25:
        palette = palette[::-1]
    return _Scene(
        background,
        gridded,
        tuple(
            _Thing(_Kind(shape, colour), x + _jitter(rng, 4), 58 + _jitter(rng, 10), 14)
            for shape, colour, x in zip(shapes, palette, (31, 82), strict=True)
        ),
    )


def _layout_scene(variant: int, rng: np.random.Generator) -> _Scene:
    """Three things of clearly different size in a row, sometimes mirrored."""
    background, gridded, kinds = (
        ("white", False, (_Kind("circle", "blue"), _Kind("star", "red"), _Kind("square", "green"))),
        ("beige", False, (_Kind("triangle", "purple"), _Kind("circle", "yellow"), _Kind("star", "blue"))),
        ("grey", True, (_Kind("square", "orange"), _Kind("triangle", "blue"), _Kind("circle", "green"))),
        ("sky", True, (_Kind("star", "purple"), _Kind("square", "red"), _Kind("triangle", "orange"))),
    )[variant % 4]
    columns = (19, 56, 93) if rng.random() < 0.7 else (93, 56, 19)
    return _Scene(
        background,
        gridded,
        tuple(
            _Thing(kind, x + _jitter(rng, 2), 58 + _jitter(rng, 20), radius)
            for kind, x, radius in zip(kinds, columns, (12, 7, 9), strict=True)
        ),
    )


# ----------------------------------------------------------------------------------- questions and answers

_Question: TypeAlias = Callable[[_Scene, bool, np.random.Generator], _Pair]


def _ask_count(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    kind = _pick(rng, scene.kinds)
    n = scene.count(kind)
    if ko:
        question = _pick(
            rng,
            (
                f"{kind.ko}은 모두 몇 개인가요?",
                f"그림에 {kind.ko}이 몇 개 있나요?",
                f"{kind.ko}의 개수를 세어 주세요.",
            ),
        )
        return question, _pick(
            rng, (f"{_KO_NUMBERS[n]} 개입니다.", f"{kind.ko}이 {_KO_NUMBERS[n]} 개 있습니다.")
        )
    question = _pick(
        rng,
        (
            f"How many {kind.en}s are there?",
            f"How many {kind.en}s can you see in the picture?",
            f"Count the {kind.en}s.",
        ),
    )
    sentence = f"There {'are' if n > 1 else 'is'} {kind.counted_en(n)}."
    return question, _pick(rng, (_EN_NUMBERS[n].capitalize(), sentence))


def _ask_which_count(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    kind = _pick(rng, scene.kinds)
    n = scene.count(kind)
    low = n if n == 1 or rng.random() < 0.5 else n - 1
    if ko:
        question = f"{kind.ko}은 {_KO_NUMBERS[low]} 개인가요, {_KO_NUMBERS[low + 1]} 개인가요?"
        return question, f"{_KO_NUMBERS[n]} 개"
    first, second = _EN_NUMBERS[low].capitalize(), _EN_NUMBERS[low + 1].capitalize()
    question = f"How many {kind.en}s are in the picture? Answer {first} or {second}."
    return question, _EN_NUMBERS[n].capitalize()


def _ask_any(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    others = [kind for s in _SHAPES for c in _COLOURS if (kind := _Kind(s, c)) not in scene.kinds]
    kind = _pick(rng, scene.kinds) if rng.random() < 0.5 else _pick(rng, others)
    there = kind in scene.kinds
    if ko:
        question = _pick(
            rng,
            (
                f"{kind.ko}이 있나요? 네 또는 아니요로 답하세요.",
                f"이 그림에서 {kind.ko}을 찾을 수 있나요? 네 또는 아니요로만 답해 주세요.",
            ),
        )
        return question, "네" if there else "아니요"
    question = _pick(
        rng,
        (
            f"Are there any {kind.en}s? Answer Yes or No.",
            f"Yes or No: does the picture contain any {kind.en}s?",
        ),
    )
    return question, "Yes" if there else "No"


def _ask_total(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    n = len(scene.things)
    if ko:
        question = _pick(rng, ("도형은 모두 몇 개인가요?", "그림에 있는 도형을 모두 합하면 몇 개인가요?"))
        return question, f"모두 {_KO_NUMBERS[n]} 개입니다."
    question = _pick(rng, ("How many shapes are there in total?", "What is the total number of shapes?"))
    sentence = f"There {'are' if n > 1 else 'is'} {_EN_NUMBERS[n]} shape{'s' if n > 1 else ''} in total."
    return question, _pick(rng, (_EN_NUMBERS[n].capitalize(), sentence))


def _ask_background(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    if ko:
        question = _pick(
            rng, ("배경은 단색인가요, 격자무늬인가요?", "배경이 격자무늬인가요, 아니면 단색인가요?")
        )
        return question, "격자무늬입니다." if scene.gridded else "단색입니다."
    question = _pick(rng, ("Is the background plain or gridded?", "Gridded or plain: how is the background?"))
    return question, "gridded" if scene.gridded else "plain"


def _ask_background_colour(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    colour = _BACKGROUNDS[scene.background]
    if ko:
        question = _pick(rng, ("배경은 무슨 색인가요?", "그림의 배경색을 알려 주세요."))
        return question, f"배경은 {colour.ko}입니다."
    question = _pick(rng, ("What colour is the background?", "Name the colour behind the shapes."))
    return question, _pick(rng, (colour.en.capitalize(), f"The background is {colour.en}."))


def _ask_colour(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    kind = _pick(rng, scene.kinds)
    shape, colour = _SHAPES[kind.shape], _COLOURS[kind.colour]
    if ko:
        question = _pick(rng, (f"{shape.ko}은 무슨 색인가요?", f"{shape.ko}의 색을 말해 주세요."))
        return question, _pick(rng, (f"{colour.ko}입니다.", f"{shape.ko}은 {colour.ko}입니다."))
    question = _pick(
        rng, (f"What colour is the {shape.en}?", f"Which colour does the {shape.en} in this drawing have?")
    )
    return question, _pick(rng, (colour.en.capitalize(), f"The {shape.en} is {colour.en}."))


def _ask_which_colour(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    kind = _pick(rng, scene.kinds)
    options = [_COLOURS[kind.colour], _pick(rng, [c for n, c in _COLOURS.items() if n != kind.colour])]
    if rng.random() < 0.5:
        options.reverse()
    first, second = options
    shape = _SHAPES[kind.shape]
    if ko:
        return f"{shape.ko}은 {first.ko}인가요, {second.ko}인가요?", _COLOURS[kind.colour].ko
    return f"Is the {shape.en} {first.en} or {second.en}?", kind.colour


def _ask_side(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    i, j = (int(x) for x in rng.permutation(len(scene.things))[:2])
    one, other = scene.things[i], scene.things[j]
    a, b, left = _SHAPES[one.kind.shape], _SHAPES[other.kind.shape], one.x < other.x
    if ko:
        side = "왼쪽" if left else "오른쪽"
        question = f"{a.ko}은 {b.ko}의 왼쪽에 있나요, 오른쪽에 있나요?"
        return question, _pick(rng, (side, f"{a.ko}은 {b.ko}의 {side}에 있습니다."))
    side = "left" if left else "right"
    question = _pick(
        rng,
        (
            f"Is the {a.en} to the left or to the right of the {b.en}?",
            f"On which side of the {b.en} is the {a.en}, left or right?",
        ),
    )
    return question, _pick(rng, (side, f"The {a.en} is to the {side} of the {b.en}."))


def _ask_size(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    largest = rng.random() < 0.6
    kind = (max if largest else min)(scene.things, key=lambda thing: thing.radius).kind
    if ko:
        question = _pick(
            rng,
            (
                f"가장 {'큰' if largest else '작은'} 도형은 무엇인가요?",
                f"어떤 도형이 가장 {'큰가요' if largest else '작은가요'}?",
            ),
        )
        return question, _pick(
            rng, (f"{kind.ko}입니다.", f"{kind.ko}이 가장 {'큽니다' if largest else '작습니다'}.")
        )
    word = "largest" if largest else "smallest"
    question = _pick(rng, (f"Which shape is the {word}?", f"What is the {word} thing in the picture?"))
    return question, _pick(rng, (f"The {kind.en}.", f"The {kind.en} is the {word}."))


def _ask_description(scene: _Scene, ko: bool, rng: np.random.Generator) -> _Pair:
    background = _BACKGROUNDS[scene.background]
    counts = [(kind, scene.count(kind)) for kind in scene.kinds]
    if ko:
        question = _pick(rng, ("이 그림을 한 문장으로 설명해 주세요.", "무엇이 보이는지 짧게 적어 주세요."))
        place = f"{'격자무늬가 있는 ' if scene.gridded else ''}{background.ko} 배경"
        things = [f"{kind.ko} {_KO_NUMBERS[n]} 개" for kind, n in counts]
        listing = things[0] if len(things) == 1 else f"{', '.join(things[:-1])}와 {things[-1]}"
        return question, f"{place}에 {listing}가 있습니다."
    question = _pick(
        rng, ("Describe the picture in one sentence.", "What do you see here? Give a short caption.")
    )
    things = [kind.counted_en(n) for kind, n in counts]
    listing = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    texture = "gridded" if scene.gridded else "plain"
    return question, f"{listing.capitalize()} on a {texture} {background.en} background."


_SCENES: Final[Mapping[_Source, Callable[[int, np.random.Generator], _Scene]]] = MappingProxyType(
    {"counting": _counting_scene, "colour": _colour_scene, "layout": _layout_scene}
)
_QUESTIONS: Final[Mapping[_Source, tuple[_Question, ...]]] = MappingProxyType(
    {
        "counting": (
            _ask_count,
            _ask_which_count,
            _ask_any,
            _ask_total,
            _ask_background,
            _ask_description,
        ),
        "colour": (
            _ask_colour,
            _ask_which_colour,
            _ask_any,
            _ask_side,
            _ask_background_colour,
            _ask_description,
        ),
        "layout": (_ask_side, _ask_size, _ask_colour, _ask_any, _ask_background, _ask_description),
    }
)
_SYSTEM_TEXTS: Final = (
    ("You are a careful observer of drawn scenes.", "당신은 그림을 꼼꼼하게 살펴보는 도우미입니다."),
    ("Answer briefly, and only about what is visible.", "눈에 보이는 것만 짧게 대답하세요."),
)
_RARE_ROWS: Final[tuple[tuple[_RareKind, tuple[_Pair, ...], tuple[_Pair, ...]], ...]] = (
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


# ---------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True)
class _Plan:
    """The pool before anything is drawn: pictures by reference, and the lines of each shard."""

    pictures: Mapping[str, _Picture]
    good_rows: tuple[_Row, ...]
    shards: tuple[tuple[str, ...], ...]


def _plan(seed: int) -> _Plan:
    rng = np.random.default_rng(seed)
    pictures: dict[str, _Picture] = {}
    rows = _common_rows(pictures, rng)
    rows += _rare_rows(pictures, seed)
    rows = [rows[int(i)] for i in rng.permutation(len(rows))]
    bounds = [round(i * len(rows) / N_SHARDS) for i in range(N_SHARDS + 1)]
    shards = [[_line(row) for row in rows[a:b]] for a, b in itertools.pairwise(bounds)]
    # A duplicate stands in the shard of its original, which is where a shard-wise reader can see it.
    for index, (shard, copied) in enumerate(((2, 5), (6, 11))):
        row = rows[bounds[shard] + copied]
        shards[shard].insert(30 + index, _line(_bad(row, RejectionReason.DUPLICATE)))
    for index, line in enumerate(_bad_lines(sorted(pictures), rng)):
        shard_lines = shards[index % N_SHARDS]
        shard_lines.insert(int(rng.integers(len(shard_lines) + 1)), line)
    return _Plan(pictures, tuple(rows), tuple(map(tuple, shards)))


def _common_rows(pictures: dict[str, _Picture], rng: np.random.Generator) -> list[_Row]:
    """Rows over the templated scenes; adds the scenes to ``pictures``."""
    scenes: list[tuple[_Source, str, _Scene]] = []
    for variant in range(_N_SCENES_PER_SOURCE):
        for source, make in _SCENES.items():
            scene = make(variant, rng)
            reference = f"images/{source}-{variant:03d}.png"
            pictures[reference] = scene
            scenes.append((source, reference, scene))
    rows: list[_Row] = []
    seen: set[str] = set()
    while len(rows) < _N_COMMON_ROWS:
        index = len(rows)
        source, reference, scene = scenes[index % len(scenes)]
        second = _pick(rng, scenes) if index % 37 == 5 else None
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


def _row_id(source: _Source, index: int, reference: str) -> _Row:
    """Ids as real pools have them: integers, strings repeated for each conversation of an image, none."""
    if source == "counting":
        return {"id": 1000 + index}
    if source == "colour":
        return {"id": Path(reference).stem}
    return {} if index % 4 == 0 else {"id": f"layout/{index}"}


def _messages(
    source: _Source, scene: _Scene, rng: np.random.Generator, *, second: _Scene | None, marked: bool
) -> list[dict[str, str]]:
    ko = rng.random() < 0.35
    asks = [_QUESTIONS[source][int(i)] for i in rng.permutation(len(_QUESTIONS[source]))]
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
        messages.insert(0, {"role": "system", "content": _pick(rng, _SYSTEM_TEXTS)[ko]})
    return messages


def _compare(first: _Scene, second: _Scene, ko: bool) -> _Pair:
    """A later turn that brings its own image, with the mark inside the text."""
    a, b = len(first.things), len(second.things)
    if ko:
        question = f"이번에는 다른 그림입니다. {_MARK}\n첫 번째 그림보다 도형이 더 많은가요?"
        return question, "네, 더 많습니다." if b > a else "아니요, 더 많지 않습니다."
    question = f"Now look at a second picture: {_MARK}\nDoes it show more shapes than the first one?"
    numbers = f"it shows {_EN_NUMBERS[b]} and the first one shows {_EN_NUMBERS[a]}"
    return question, f"{'Yes' if b > a else 'No'}, {numbers}."


def _rare_rows(pictures: dict[str, _Picture], seed: int) -> list[_Row]:
    """Two rows for each rare kind, one English and one Korean, each with its own picture."""
    rows: list[_Row] = []
    for kind, *languages in _RARE_ROWS:
        for variant, pairs in enumerate(languages):
            reference = f"images/rare-{kind}-{variant}.png"
            pictures[reference] = _RarePicture(kind, variant, seed)
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
    """The row, marked as planned to fail for ``reason``."""
    return {**row, "source": "bad", "expected_rejection": reason.value}


def _bad_lines(references: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The faulty lines except the duplicates; each has one fault and is otherwise a good row."""
    images = [references[int(i)] for i in rng.choice(len(references), size=8, replace=False)]

    def row(reason: RejectionReason, question: str, images: list[str], n: int) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "A drawn scene."}]
        return _line(_bad({"id": f"bad-{reason}-{n}", "messages": messages, "images": images}, reason))

    broken = row(RejectionReason.MALFORMED_ROW, f"{_MARK}\nWhy does this line end early?", images[:1], 0)
    colours, shapes = list(_COLOURS), list(_SHAPES)
    inventory = " ".join(
        f"Item {i} is the {_pick(rng, colours)} {_pick(rng, shapes)}." for i in range(1, 601)
    )
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
        row(reason.UNDECODABLE_IMAGE, f"{_MARK}\nWhat is shown?", [_NOT_A_PICTURE], 0),
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
        row(reason.UNDECODABLE_IMAGE, f"{_MARK}\n무엇이 보이나요?", [_CUT_PICTURE], 1),
        row(reason.IMAGE_COUNT_MISMATCH, f"{_MARK}\nWhich of the two is larger?", images[6:8], 1),
        row(reason.NO_INSTRUCTION_TEXT, f" {_MARK}\n ", images[7:8], 1),
        _line(_bad(text_row, reason.TEXT_ONLY)),
        json.dumps(["bad", "a list where a row should be"]),
    ]


# ------------------------------------------------------------------------------------------------- drawing

_NOT_A_PICTURE: Final = "images/bad-not-a-picture.png"
_CUT_PICTURE: Final = "images/bad-cut-short.png"


def _image_files(pictures: Mapping[str, _Picture]) -> dict[str, bytes]:
    """The bytes of every image file that exists, the two undecodable ones included."""
    files = {reference: _png(_draw(picture)) for reference, picture in pictures.items()}
    whole = files["images/rare-noise-0.png"]
    return {**files, _NOT_A_PICTURE: b"This is a text file.\n", _CUT_PICTURE: whole[: len(whole) // 2]}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _draw(picture: _Picture) -> Image.Image:
    return _draw_scene(picture) if isinstance(picture, _Scene) else _draw_rare(picture)


def _draw_scene(scene: _Scene) -> Image.Image:
    background = _BACKGROUNDS[scene.background].rgb
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), background)
    draw = ImageDraw.Draw(image)
    if scene.gridded:
        line = (background[0] - 36, background[1] - 36, background[2] - 36)
        for at in range(7, IMAGE_SIDE, 14):
            draw.line((at, 0, at, IMAGE_SIDE), fill=line)
            draw.line((0, at, IMAGE_SIDE, at), fill=line)
    for thing in scene.things:
        _draw_thing(draw, thing)
    return image


def _draw_thing(draw: ImageDraw.ImageDraw, thing: _Thing) -> None:
    """Draw with the area of a circle of the thing's radius, so that its radius alone decides its size."""
    x, y, fill = thing.x, thing.y, _COLOURS[thing.kind.colour].rgb
    if thing.kind.shape == "circle":
        r = thing.radius
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        return
    n_corners, inner = {"square": (4, None), "triangle": (3, None), "star": (5, 0.5)}[thing.kind.shape]
    n = n_corners if inner is None else 2 * n_corners
    # The polygon is n triangles with two circumradii (one of them the inner one for a star) as sides.
    unit_area = n / 2 * (inner or 1.0) * math.sin(2 * math.pi / n)
    outer = thing.radius * math.sqrt(math.pi / unit_area)
    turn = math.pi / 4 if thing.kind.shape == "square" else 0.0
    corners = []
    for i in range(n):
        reach = outer * (inner if inner is not None and i % 2 else 1.0)
        angle = turn + 2 * math.pi * i / n - math.pi / 2
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    draw.polygon(corners, fill=fill)


def _draw_rare(picture: _RarePicture) -> Image.Image:
    side, variant = IMAGE_SIDE, picture.variant
    rng = np.random.default_rng([picture.seed, variant])
    image = Image.new("RGB", (side, side), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    match picture.kind:
        case "noise":
            # Two-pixel grains: as loud as single pixels for the patches, at a quarter of the bytes.
            grains = rng.integers(0, 256, size=(side // 2, side // 2, 3), dtype=np.uint8)
            image = Image.fromarray(grains.repeat(2, axis=0).repeat(2, axis=1))
        case "negative":
            things = tuple(
                _Thing(_Kind(_pick(rng, list(_SHAPES)), _pick(rng, list(_COLOURS))), x, y, 10)
                for x in (24, 56, 88)
                for y in (30, 80)
            )
            image = ImageOps.invert(_draw_scene(_Scene("white", False, things)))
        case "sketch":
            left, top = 24 + 6 * variant, 46 - 4 * variant
            draw.rectangle((left, top, left + 60, 100), outline=0)
            draw.line((left - 6, top, left + 30, top - 30, left + 66, top), fill=0)
            draw.rectangle((left + 10, 70, left + 24, 100), outline=0)
            draw.rectangle((left + 36, 62, left + 50, 76), outline=0)
        case "specks":
            for cell in rng.choice(28 * 28, size=240, replace=False):
                x, y = 4 * (int(cell) % 28), 4 * (int(cell) // 28)
                draw.rectangle((x + 1, y + 1, x + 2, y + 2), fill=(20, 60 + 60 * variant, 20))
        case "rings":
            for radius in range(54, 0, -8):
                draw.ellipse(
                    (56 - radius, 56 - radius, 56 + radius, 56 + radius),
                    fill=(0, 90, 140) if radius == 6 else None,
                    outline=(160 * variant, 0, 60),
                    width=3,
                )
        case "stripes":
            ramp = (
                np.add.outer(np.arange(side), np.arange(side))
                if variant
                else np.subtract.outer(np.arange(side), np.arange(side))
            )
            image = Image.fromarray(np.where(ramp % 16 < 8, 0, 255).astype(np.uint8)).convert("RGB")
        case "gradient":
            ramp = np.add.outer(np.arange(side), np.arange(side)) / (2 * side - 2)
            tint = np.array(((255, 120, 200), (110, 255, 160))[variant])
            image = Image.fromarray((ramp[..., None] * tint).astype(np.uint8))
    return image


def _write_if_different(path: Path, content: bytes) -> None:
    """Replace ``path`` in one step, unless it holds ``content`` already: its mtime is part of its version."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
