"""The questions that the demo pool asks about a scene."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np

from scalselect_assets.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    EN_NUMBERS,
    KO_NUMBERS,
    SHAPES,
    Look,
    Pair,
    Scene,
    Source,
    pick,
)

_Question: TypeAlias = Callable[[Scene, bool, np.random.Generator], Pair]


def _ask_count(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    kind = pick(rng, scene.kinds)
    n = scene.count(kind)
    if ko:
        question = pick(
            rng,
            (
                f"{kind.ko}은 모두 몇 개인가요?",
                f"그림에 {kind.ko}이 몇 개 있나요?",
                f"{kind.ko}의 개수를 세어 주세요.",
            ),
        )
        return question, pick(
            rng, (f"{KO_NUMBERS[n]} 개입니다.", f"{kind.ko}이 {KO_NUMBERS[n]} 개 있습니다.")
        )
    question = pick(
        rng,
        (
            f"How many {kind.en}s are there?",
            f"How many {kind.en}s can you see in the picture?",
            f"Count the {kind.en}s.",
        ),
    )
    sentence = f"There {'are' if n > 1 else 'is'} {kind.counted_en(n)}."
    return question, pick(rng, (EN_NUMBERS[n].capitalize(), sentence))


def _ask_which_count(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    kind = pick(rng, scene.kinds)
    n = scene.count(kind)
    low = n if n == 1 or rng.random() < 0.5 else n - 1
    if ko:
        question = f"{kind.ko}은 {KO_NUMBERS[low]} 개인가요, {KO_NUMBERS[low + 1]} 개인가요?"
        return question, f"{KO_NUMBERS[n]} 개"
    first, second = EN_NUMBERS[low].capitalize(), EN_NUMBERS[low + 1].capitalize()
    question = f"How many {kind.en}s are in the picture? Answer {first} or {second}."
    return question, EN_NUMBERS[n].capitalize()


def _ask_any(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    others = [kind for s in SHAPES for c in COLOURS if (kind := Look(s, c)) not in scene.kinds]
    kind = pick(rng, scene.kinds) if rng.random() < 0.5 else pick(rng, others)
    there = kind in scene.kinds
    if ko:
        question = pick(
            rng,
            (
                f"{kind.ko}이 있나요? 네 또는 아니요로 답하세요.",
                f"이 그림에서 {kind.ko}을 찾을 수 있나요? 네 또는 아니요로만 답해 주세요.",
            ),
        )
        return question, "네" if there else "아니요"
    question = pick(
        rng,
        (
            f"Are there any {kind.en}s? Answer Yes or No.",
            f"Yes or No: does the picture contain any {kind.en}s?",
        ),
    )
    return question, "Yes" if there else "No"


def _ask_total(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    n = len(scene.things)
    if ko:
        question = pick(rng, ("도형은 모두 몇 개인가요?", "그림에 있는 도형을 모두 합하면 몇 개인가요?"))
        return question, f"모두 {KO_NUMBERS[n]} 개입니다."
    question = pick(rng, ("How many shapes are there in total?", "What is the total number of shapes?"))
    sentence = f"There {'are' if n > 1 else 'is'} {EN_NUMBERS[n]} shape{'s' if n > 1 else ''} in total."
    return question, pick(rng, (EN_NUMBERS[n].capitalize(), sentence))


def _ask_background(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    if ko:
        question = pick(
            rng, ("배경은 단색인가요, 격자무늬인가요?", "배경이 격자무늬인가요, 아니면 단색인가요?")
        )
        return question, "격자무늬입니다." if scene.gridded else "단색입니다."
    question = pick(rng, ("Is the background plain or gridded?", "Gridded or plain: how is the background?"))
    return question, "gridded" if scene.gridded else "plain"


def _ask_background_colour(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    colour = BACKGROUNDS[scene.background]
    if ko:
        question = pick(rng, ("배경은 무슨 색인가요?", "그림의 배경색을 알려 주세요."))
        return question, f"배경은 {colour.ko}입니다."
    question = pick(rng, ("What colour is the background?", "Name the colour behind the shapes."))
    return question, pick(rng, (colour.en.capitalize(), f"The background is {colour.en}."))


def _ask_colour(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    kind = pick(rng, scene.kinds)
    shape, colour = SHAPES[kind.shape], COLOURS[kind.colour]
    if ko:
        question = pick(rng, (f"{shape.ko}은 무슨 색인가요?", f"{shape.ko}의 색을 말해 주세요."))
        return question, pick(rng, (f"{colour.ko}입니다.", f"{shape.ko}은 {colour.ko}입니다."))
    question = pick(
        rng, (f"What colour is the {shape.en}?", f"Which colour does the {shape.en} in this drawing have?")
    )
    return question, pick(rng, (colour.en.capitalize(), f"The {shape.en} is {colour.en}."))


def _ask_which_colour(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    kind = pick(rng, scene.kinds)
    options = [COLOURS[kind.colour], pick(rng, [c for n, c in COLOURS.items() if n != kind.colour])]
    if rng.random() < 0.5:
        options.reverse()
    first, second = options
    shape = SHAPES[kind.shape]
    if ko:
        return f"{shape.ko}은 {first.ko}인가요, {second.ko}인가요?", COLOURS[kind.colour].ko
    return f"Is the {shape.en} {first.en} or {second.en}?", kind.colour


def _ask_side(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    i, j = (int(x) for x in rng.permutation(len(scene.things))[:2])
    one, other = scene.things[i], scene.things[j]
    a, b, left = SHAPES[one.kind.shape], SHAPES[other.kind.shape], one.x < other.x
    if ko:
        side = "왼쪽" if left else "오른쪽"
        question = f"{a.ko}은 {b.ko}의 왼쪽에 있나요, 오른쪽에 있나요?"
        return question, pick(rng, (side, f"{a.ko}은 {b.ko}의 {side}에 있습니다."))
    side = "left" if left else "right"
    question = pick(
        rng,
        (
            f"Is the {a.en} to the left or to the right of the {b.en}?",
            f"On which side of the {b.en} is the {a.en}, left or right?",
        ),
    )
    return question, pick(rng, (side, f"The {a.en} is to the {side} of the {b.en}."))


def _ask_size(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    largest = rng.random() < 0.6
    kind = (max if largest else min)(scene.things, key=lambda thing: thing.radius).kind
    if ko:
        question = pick(
            rng,
            (
                f"가장 {'큰' if largest else '작은'} 도형은 무엇인가요?",
                f"어떤 도형이 가장 {'큰가요' if largest else '작은가요'}?",
            ),
        )
        return question, pick(
            rng, (f"{kind.ko}입니다.", f"{kind.ko}이 가장 {'큽니다' if largest else '작습니다'}.")
        )
    word = "largest" if largest else "smallest"
    question = pick(rng, (f"Which shape is the {word}?", f"What is the {word} thing in the picture?"))
    return question, pick(rng, (f"The {kind.en}.", f"The {kind.en} is the {word}."))


def _ask_description(scene: Scene, ko: bool, rng: np.random.Generator) -> Pair:
    background = BACKGROUNDS[scene.background]
    counts = [(kind, scene.count(kind)) for kind in scene.kinds]
    if ko:
        question = pick(rng, ("이 그림을 한 문장으로 설명해 주세요.", "무엇이 보이는지 짧게 적어 주세요."))
        place = f"{'격자무늬가 있는 ' if scene.gridded else ''}{background.ko} 배경"
        things = [f"{kind.ko} {KO_NUMBERS[n]} 개" for kind, n in counts]
        listing = things[0] if len(things) == 1 else f"{', '.join(things[:-1])}와 {things[-1]}"
        return question, f"{place}에 {listing}가 있습니다."
    question = pick(
        rng, ("Describe the picture in one sentence.", "What do you see here? Give a short caption.")
    )
    things = [kind.counted_en(n) for kind, n in counts]
    listing = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    texture = "gridded" if scene.gridded else "plain"
    return question, f"{listing.capitalize()} on a {texture} {background.en} background."


QUESTIONS: Final[Mapping[Source, tuple[_Question, ...]]] = MappingProxyType(
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
