"""Questions about generated scenes by skill, with several wordings each, and captions."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np

from benchmarks.quality.drawn_scenes import COLOURS, SHAPES, DrawnScene, DrawnThing, place_of

SKILLS: Final = ("colour", "shape", "exist", "count", "where", "relation", "size", "compare", "read")
SKILL_SHARES: Final = (0.30, 0.20, 0.14, 0.12, 0.09, 0.06, 0.045, 0.025, 0.02)
"""How often a pool asks for each skill; the last three are rare."""

RARE_SKILLS: Final = frozenset(SKILLS[-3:])

WORDINGS: Final = {
    "colour": (
        "what colour is the {0}?",
        "which colour does the {0} have?",
        "name the colour of the {0} that you see.",
    ),
    "shape": (
        "what shape is the {0} thing?",
        "which shape does the {0} object have?",
        "name the shape that is {0}.",
    ),
    "exist": (
        "is there a {0} {1}?",
        "can you see a {0} {1}?",
        "does the picture show any {0} {1} at all?",
    ),
    "count": (
        "how many {0} are there?",
        "count the {0}.",
        "what is the number of {0} in the picture?",
    ),
    "where": (
        "where is the {0} {1}?",
        "in which part is the {0} {1}?",
        "find the {0} {1} and say where it is.",
    ),
    "relation": (
        "is the {0} {1} {2} the {3} {4}?",
        "would you say the {0} {1} is {2} the {3} {4}?",
        "look at the {0} {1}: is it {2} the {3} {4}?",
    ),
    "size": (
        "is the {0} {1} small or large?",
        "how big is the {0} {1}?",
        "what size does the {0} {1} have?",
    ),
    "compare": (
        "are there more {0} than {1}?",
        "do the {0} outnumber the {1}?",
        "compare the {0} with the {1}: are there more of the first?",
    ),
    "read": (
        "what does the sign say?",
        "which character is on the sign?",
        "read the sign.",
    ),
}
TERSE_WORDINGS: Final = {
    "colour": "{0} colour?",
    "shape": "{0} shape?",
    "exist": "any {0} {1}?",
    "count": "number of {0}?",
    "where": "place of the {0} {1}?",
    "relation": "{0} {1} {2} the {3} {4}?",
    "size": "{0} {1} size?",
    "compare": "more {0} than {1}?",
    "read": "sign?",
}
"""What the base model learns to answer; no pool asks in these words."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_ASPECTS = ("describe the picture.", "what is shown here?", "say what you see.")
_PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
_RELATIONS: dict[str, Callable[[DrawnThing, DrawnThing], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
T = TypeVar("T")
Asked = tuple[tuple[str, ...], str]
"""The words that fill a wording, and the answer."""


def ask(rng: np.random.Generator, scene: DrawnScene, skill: str) -> Asked | None:
    """A question of a skill about a scene; None where the scene has none."""
    asked: Asked | None = _ASKERS[skill](rng, scene)
    return asked


def caption(rng: np.random.Generator, scene: DrawnScene) -> tuple[str, str]:
    """A request to describe a scene and an aspect of it in words."""
    things = [scene.things[place] for place in rng.permutation(len(scene.things))]
    match int(rng.integers(5)):
        case 0 | 1:
            said = ", ".join(
                f"a {thing.size} {thing.colour} {thing.shape} at the {place_of(scene, thing)}"
                for thing in things[:2]
            )
        case 2 if len(things) > 1:
            a, b = things[:2]
            said = f"the {a.colour} {a.shape} is {_pick(rng, _holding(a, b))} the {b.colour} {b.shape}"
        case 3:
            counted = Counter(thing.colour if rng.integers(2) else thing.shape for thing in things)
            said = ", ".join(f"{_NUMBERS[n]} {_plural(kind)}" for kind, n in sorted(counted.items()))
        case 4 if scene.glyph:
            said = f"the sign says {scene.glyph}"
        case _:
            said = ", ".join(f"the {thing.shape} is {thing.colour}" for thing in things[:3])
    return _pick(rng, _ASPECTS), f"{said}."


def _ask_colour(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:
    counted = Counter(thing.shape for thing in scene.things)
    single = [thing for thing in scene.things if counted[thing.shape] == 1]
    return ((thing.shape,), thing.colour) if single and (thing := _pick(rng, single)) else None


def _ask_shape(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:
    counted = Counter(thing.colour for thing in scene.things)
    single = [thing for thing in scene.things if counted[thing.colour] == 1]
    return ((thing.colour,), thing.shape) if single and (thing := _pick(rng, single)) else None


def _ask_exist(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:
    present = {(thing.colour, thing.shape) for thing in scene.things}
    thing = _pick(rng, scene.things)
    if rng.random() < 0.5:
        return (thing.colour, thing.shape), "yes"
    # Half of what is asked for in vain is there in another shape or colour.
    absent = [
        pair
        for pair in (
            *((thing.colour, shape) for shape in SHAPES),
            *((colour, thing.shape) for colour in COLOURS),
            (_pick(rng, tuple(COLOURS)), _pick(rng, SHAPES)),
        )
        if pair not in present
    ]
    return _pick(rng, absent), "no"


def _ask_count(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:
    counted = Counter(kind for thing in scene.things for kind in (thing.colour, thing.shape))
    kinds = list(counted) if rng.random() < 0.85 else [*COLOURS, *SHAPES]
    kind = _pick(rng, kinds)
    return (_plural(kind),), _NUMBERS[counted[kind]]


def _ask_where(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:
    thing = _pick(rng, scene.things)
    return (thing.colour, thing.shape), place_of(scene, thing)


def _ask_relation(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:
    if len(scene.things) < 2:
        return None
    a, b = (scene.things[place] for place in rng.permutation(len(scene.things))[:2])
    true = bool(rng.integers(2))
    name = _pick(rng, _holding(a, b) if true else _holding(b, a))
    return (a.colour, a.shape, name, b.colour, b.shape), "yes" if true else "no"


def _ask_size(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:
    thing = _pick(rng, scene.things)
    return (thing.colour, thing.shape), thing.size


def _ask_compare(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:
    by_colour = bool(rng.integers(2))
    counted = Counter(thing.colour if by_colour else thing.shape for thing in scene.things)
    if len(counted) < 2:
        return None
    a, b = (list(counted)[place] for place in rng.permutation(len(counted))[:2])
    if counted[a] == counted[b]:
        return None
    return (_plural(a), _plural(b)), "yes" if counted[a] > counted[b] else "no"


def _ask_read(rng: np.random.Generator, scene: DrawnScene) -> Asked | None:  # noqa: ARG001
    return ((), scene.glyph) if scene.glyph else None


_ASKERS: dict[str, Callable[[np.random.Generator, DrawnScene], Asked | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "exist": _ask_exist,
    "count": _ask_count,
    "where": _ask_where,
    "relation": _ask_relation,
    "size": _ask_size,
    "compare": _ask_compare,
    "read": _ask_read,
}


def _holding(a: DrawnThing, b: DrawnThing) -> list[str]:
    return [name for name, holds in _RELATIONS.items() if holds(a, b)]


def _plural(kind: str) -> str:
    return f"{kind} things" if kind in COLOURS else _PLURALS[kind]


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]
