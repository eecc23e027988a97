"""What a selection asks of the image processor reaches the model, and what that does not know is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.method.representation.families import UnsupportedModelError
from scalselect_assets.method.representation.image_size import ImageSize, ask_for
from scalselect_assets.method.representation.loading import load_encoder
from tests.method import zoo
from tests.method.samples import question, represent

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BOUNDS = {"image_size", "min_pixels", "max_pixels", "max_tiles"}
KNOWN = {
    "qwen2_vl": {"min_pixels", "max_pixels"},
    "qwen2_5_vl": {"min_pixels", "max_pixels"},
    "qwen3_vl": {"min_pixels", "max_pixels"},
    "internvl": {"max_tiles"},
    "idefics3": {"image_size"},
    "smolvlm": {"image_size"},
}
FAMILIES = [family for family in zoo.FAMILIES if family != "paligemma"]


def load(path: Path, **wanted: int) -> VlmEncoder:
    return load_encoder(str(path), device="cpu", image_size=ImageSize(**wanted))


def n_vision_tokens(encoder: VlmEncoder, size: str) -> int:
    return represent(encoder, [question("What is it?", f"1:{size}")])[0].n_vision_tokens


@pytest.mark.parametrize(
    ("family", "wanted", "size", "own", "then"),
    [
        # Merged patches of 14 pixels: 4 x 6 of them, scaled to 2 x 3.
        ("qwen2_vl", {"max_pixels": 28 * 42}, "90x60", 4 * 6, 2 * 3),
        ("qwen2_5_vl", {"max_pixels": 28 * 42}, "90x60", 4 * 6, 2 * 3),
        ("qwen2_vl", {"min_pixels": 70 * 70}, "28x28", 2 * 2, 5 * 5),
        ("qwen3_vl", {"min_pixels": 64 * 64, "max_pixels": 64 * 64}, "32x32", 2 * 2, 4 * 4),  # of 16 pixels
        ("internvl", {"max_tiles": 2}, "90x60", 7 * 9, 3 * 9),  # two tiles and the whole image
        ("internvl", {"max_tiles": 1}, "90x60", 7 * 9, 9),
        ("idefics3", {"image_size": 56}, "90x60", 13 * 4, 5 * 4),  # 2 x 2 tiles and the whole image
        ("smolvlm", {"image_size": 112}, "90x60", 7 * 4, 5 * 4),
    ],
)
def test_images_have_the_size_that_is_asked_for(
    family: str,
    wanted: dict[str, int],
    size: str,
    own: int,
    then: int,
    tiny_vlm: Callable[[str], Path],
    tiny_encoder: Callable[[str], VlmEncoder],
) -> None:
    bounded = load(tiny_vlm(family), **wanted)
    assert n_vision_tokens(tiny_encoder(family), size) == own
    assert n_vision_tokens(bounded, size) == then
    assert bounded.card.fingerprint != tiny_encoder(family).card.fingerprint
    assert bounded.card.image_size == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bound_that_the_family_does_not_know_is_refused_with_those_that_it_knows(
    family: str, tiny_preparer: Callable[..., Any]
) -> None:
    processor, known = tiny_preparer(family).image_processor, KNOWN.get(family, set())
    for bound in BOUNDS - known:
        with pytest.raises(UnsupportedModelError, match=f"does not know {bound}; it knows") as refusal:
            ask_for(processor, ImageSize(**{bound: 100}))
        assert all(name in str(refusal.value) for name in known)
        assert known or "no such bound" in str(refusal.value)


@pytest.mark.parametrize("family", KNOWN)
def test_the_processors_own_bounds_leave_the_fingerprint_as_it_is(
    family: str, tiny_vlm: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    own = tiny_encoder(family).preparer.image_processor
    asked = {
        "min_pixels": own.size.get("shortest_edge"),
        "max_pixels": own.size.get("longest_edge"),
        "image_size": own.size.get("longest_edge"),
        "max_tiles": getattr(own, "max_patches", None),
    }
    same = load(tiny_vlm(family), **{name: asked[name] for name in KNOWN[family]})
    assert same.card.fingerprint == tiny_encoder(family).card.fingerprint


def test_a_processor_whose_sizes_are_plain_keeps_them_plain() -> None:
    class Processor:
        valid_kwargs = type("Kwargs", (), {"__annotations__": {"max_pixels": int}})

        def __init__(self) -> None:
            self.size = {"shortest_edge": 4, "longest_edge": 100}

    processor = Processor()
    ask_for(processor, ImageSize(max_pixels=50))
    assert processor.size == {"shortest_edge": 4, "longest_edge": 50}


@pytest.mark.parametrize(("least", "most"), [({"min_pixels": 10**6}, "7056"), ({"max_pixels": 9}, "784")])
def test_a_bound_beyond_the_processors_own_other_one_is_refused_with_both(
    least: dict[str, int], most: str, tiny_preparer: Callable[..., Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{most}.*set both"):
        ask_for(tiny_preparer("qwen2_vl").image_processor, ImageSize(**least))


@pytest.mark.parametrize("bound", sorted(BOUNDS))
def test_a_bound_below_one_is_refused(bound: str) -> None:
    with pytest.raises(ValueError, match=f"Got {bound} 0; allowed is 1 or more"):
        ImageSize(**{bound: 0})


def test_a_lower_bound_above_the_upper_one_is_refused() -> None:
    with pytest.raises(ValueError, match="Got min_pixels 10 above max_pixels 9"):
        ImageSize(min_pixels=10, max_pixels=9)
    ImageSize(min_pixels=9, max_pixels=9)
