"""The attention map is that of the vector, its tokens lie where it says, and the drawing shows it."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scalselect_assets.method.representation import token_layout
from scalselect_assets.method.representation.attention_map import (
    AttentionMap,
    ImageAttention,
    attention_map,
    overlay,
    overlay_png,
)
from scalselect_assets.method.representation.conversation import IMAGE
from scalselect_assets.method.representation.encoder import ChatSample, VlmEncoder
from scalselect_assets.method.representation.loading import load_encoder
from scalselect_assets.method.representation.preparation import Prepared
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.method.representation.token_layout import Grid, ImageLayout
from tests.method import zoo
from tests.method.samples import SAMPLES, chat, pixels, question, read_image, read_image_or_fail, represent
from tests.method.zoo import Reference

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FAMILIES = [family for family in zoo.FAMILIES if family != "paligemma"]
THREE_IMAGES = SAMPLES["three images of different shapes in one turn"]
WIDE, TALL, SQUARE = (360, 120), (160, 440), (280, 280)


@pytest.fixture(scope="module")
def demo(demo_vlm: Path) -> VlmEncoder:
    return load_encoder(str(demo_vlm), device="cpu")


def seen_by(encoder: VlmEncoder, sample: ChatSample) -> AttentionMap:
    found = attention_map(encoder, sample, read_image)
    assert isinstance(found, AttentionMap), found
    return found


def together(images: Sequence[ImageAttention], name: str) -> np.ndarray:
    return np.concatenate([getattr(image, name) for image in images])


# It is the attention that the vector was made from


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vector_is_the_whole_models_mean_over_the_kept_tokens(
    family: str, tiny_encoder: Callable[[str], VlmEncoder], tiny_vlm: Callable[[str], Path]
) -> None:
    reference, encoder = Reference(tiny_vlm(family)), tiny_encoder(family)
    for sample in (SAMPLES["a tall image"], THREE_IMAGES):
        seen = seen_by(encoder, sample)
        states, share = whole_model(reference, sample)
        kept = together(seen.images, "kept")
        assert kept.sum() == seen.representation.n_dominant_tokens < len(kept)
        np.testing.assert_allclose(states[kept].mean(0), seen.representation.vector, atol=2e-6, rtol=0)
        np.testing.assert_allclose(together(seen.images, "attention"), share, atol=1e-6, rtol=0)


def whole_model(reference: Reference, sample: ChatSample) -> tuple[np.ndarray, np.ndarray]:
    """States after the first layer, and p_j, of the vision tokens, by the model's plain eager forward."""
    inputs = reference.inputs(sample.conversation, [pixels(image) for image in sample.images])
    starts, ends = inputs.pop("offset_mapping")[0].unbind(-1)
    vision = inputs["input_ids"][0] == reference.model.config.image_token_id
    answer = torch.zeros_like(vision)
    for begin, end in reference._answer_spans(sample.conversation):
        answer |= (starts < end) & (ends > begin)
    with torch.inference_mode():
        output = reference.model(**inputs, output_hidden_states=True, output_attentions=True)
    share = output.attentions[0][0].double().mean(0)[~vision & ~answer][:, vision].mean(0)
    return output.hidden_states[1][0][vision].double().numpy(), (share / share.sum()).numpy()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_map_of_the_demo_model_is_the_one_of_its_representation(name: str, demo: VlmEncoder) -> None:
    (expected,) = represent(demo, [SAMPLES[name]])
    seen = seen_by(demo, SAMPLES[name])
    attention, kept = together(seen.images, "attention"), together(seen.images, "kept")
    assert len(attention) == expected.n_vision_tokens
    assert attention.sum() == pytest.approx(1, abs=1e-12)
    assert (attention >= 0).all()
    assert kept.sum() == expected.n_dominant_tokens
    np.testing.assert_allclose(seen.representation.vector, expected.vector, atol=1e-6, rtol=0)
    assert seen.representation.vision_attention == pytest.approx(expected.vision_attention, abs=1e-6)
    # The kept ones are the strongest, and just enough of them.
    assert attention[kept].min() >= attention[~kept].max()
    assert attention[kept].sum() > 0.9 >= attention[kept].sum() - attention[kept].min()


def test_a_sample_that_is_rejected_has_its_rejection_for_a_map(demo: VlmEncoder) -> None:
    found = attention_map(demo, question("What?", "broken"), read_image_or_fail)
    assert isinstance(found, Rejection)
    assert found.reason is RejectionReason.UNDECODABLE_IMAGE


# The tokens lie where it says


@pytest.mark.parametrize("family", FAMILIES)
def test_every_vision_token_has_one_place(family: str, tiny_encoder: Callable[[str], VlmEncoder]) -> None:
    encoder = tiny_encoder(family)
    for image in [image for sample in SAMPLES.values() for image in seen_by(encoder, sample).images]:
        tokens = [part.ravel() for grid in image.layout.grids for part in (grid.tokens, grid.line_ends)]
        assert sorted(np.concatenate(tokens)) == list(range(image.layout.n_tokens))
        assert all(grid.box is not None for grid in image.layout.grids), image.layout.note
        assert sum(grid.attention.sum() + grid.line_ends.sum() for grid in image.grids) == pytest.approx(
            image.share
        )


@pytest.fixture
def patch_by_patch(
    tiny_encoder: Callable[[str], VlmEncoder], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], VlmEncoder]:
    """A model whose vision tower looks at each patch by itself, so that a token tells of its patch only."""

    def make(family: str) -> VlmEncoder:
        encoder, n_layers = tiny_encoder(family), 0
        for name, module in encoder.base_model.named_modules():
            if isinstance(module, torch.nn.ModuleList) and name.startswith("vis"):
                for layer in module:
                    monkeypatch.setattr(layer, "forward", lambda hidden, *_args, **_kwargs: hidden)
                    n_layers += 1
        assert n_layers
        return encoder

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(WIDE,), (SQUARE, TALL)], ids=["one image", "two images"])
def test_what_is_painted_where_a_token_is_said_to_look_changes_that_token_most(
    family: str, sizes: tuple[tuple[int, int], ...], patch_by_patch: Callable[[str], VlmEncoder]
) -> None:
    encoder = patch_by_patch(family)
    sample = chat(
        ("user", (*[IMAGE] * len(sizes), "What is this?")),
        ("assistant", ("This.",)),
        images=tuple(map(str, range(len(sizes)))),
    )
    plain = [Image.new("RGB", size, (100, 90, 80)) for size in sizes]
    before = features(encoder, sample, plain)
    layouts = token_layout.image_layouts(encoder.base_model, encoder.preparer, sample.conversation, sizes)
    generator = np.random.default_rng(0)
    n_painted, start = 0, 0
    for place, layout in enumerate(layouts):
        for number in generator.permutation(len(layout.grids))[:3]:
            grid = layout.grids[number]
            for row, column in a_corner_and_another(grid.tokens.shape, generator):
                painted = [image.copy() for image in plain]
                if not paint(painted[place], grid, row, column):
                    continue
                change = np.linalg.norm(features(encoder, sample, painted) - before, axis=1)
                own = change[start : start + layout.n_tokens]
                assert np.unravel_index(own[grid.tokens].argmax(), grid.tokens.shape) == (row, column)
                assert own[grid.tokens].max() > 0.1
                np.testing.assert_allclose(own[grid.line_ends], 0, atol=1e-6)
                # Nothing of it shows in another image.
                assert np.delete(change, np.s_[start : start + layout.n_tokens]).max(initial=0) < 1e-6
                n_painted += 1
        start += layout.n_tokens
    assert n_painted >= 2 * len(sizes) - 1  # one place may be padding


def a_corner_and_another(shape: tuple[int, ...], generator: np.random.Generator) -> list[tuple[int, int]]:
    rows, columns = shape
    return [(rows - 1, 0), (int(generator.integers(rows)), int(generator.integers(columns)))]


def paint(image: Image.Image, grid: Grid, row: int, column: int) -> bool:
    """Make what a token is said to show white; not where most of it lies outside the image."""
    assert grid.box is not None
    left, top, right, bottom = grid.box
    width, height = (right - left) / grid.tokens.shape[1], (bottom - top) / grid.tokens.shape[0]
    box = (
        max(0, round(left + column * width)),
        max(0, round(top + row * height)),
        min(image.width, round(left + (column + 1) * width)),
        min(image.height, round(top + (row + 1) * height)),
    )
    if (box[2] - box[0]) * (box[3] - box[1]) < 0.6 * width * height or box[2] <= box[0] or box[3] <= box[1]:
        return False
    image.paste((255, 255, 255), box)
    return True


def features(encoder: VlmEncoder, sample: ChatSample, images: Sequence[Image.Image]) -> np.ndarray:
    """What the vision tower and the projector make of images, (n_tokens, d)."""
    encoded = {}
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded[str(number)] = buffer.getvalue()
    (prepared,) = encoder.preparer.prepare(sample.images, [sample.conversation], encoded.__getitem__)
    assert isinstance(prepared, Prepared), prepared
    parts = [encoder._first_layer.image_features([image])[0] for image in prepared.model_input.images]
    return torch.cat(parts).double().numpy()


def test_llavas_centre_crop_leaves_the_margins_out(tiny_encoder: Callable[[str], VlmEncoder]) -> None:
    (layout,) = layouts_of(tiny_encoder("llava"), WIDE)
    np.testing.assert_allclose(layout.grids[0].box, (120, 0, 240, 120), atol=1)


def test_tiles_cover_the_image_once_and_the_last_grid_is_all_of_it(
    tiny_encoder: Callable[[str], VlmEncoder],
) -> None:
    for family in ("internvl", "idefics3", "smolvlm"):
        (layout,) = layouts_of(tiny_encoder(family), WIDE)
        boxes = [grid.box for grid in layout.grids if grid.box]
        np.testing.assert_allclose(boxes[-1], (0, 0, *WIDE), atol=1.5)
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
        assert sum(areas[:-1]) == pytest.approx(WIDE[0] * WIDE[1], rel=0.02)


def layouts_of(encoder: VlmEncoder, *sizes: tuple[int, int]) -> list[ImageLayout]:
    sample = question("What is this?")
    return token_layout.image_layouts(encoder.base_model, encoder.preparer, sample.conversation, sizes)


def test_the_tokens_of_an_unknown_model_are_a_strip_that_says_so(
    demo: VlmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_layout, "_FAMILIES", {})
    seen = seen_by(demo, THREE_IMAGES)
    for image, reference in zip(seen.images, THREE_IMAGES.images, strict=True):
        (grid,) = image.layout.grids
        assert grid.tokens.tolist() == [list(range(image.layout.n_tokens))]
        assert grid.box is None
        assert re.search(r"model of type llava lays out .* not over the image", image.layout.note)
        drawn = np.asarray(overlay(pixels(reference), image, max_side=200))
        assert drawn.shape == (50, 200, 3)
        # Below the tokens, a white line under those that are kept.
        at = (np.arange(image.layout.n_tokens) + 0.5) * 200 / image.layout.n_tokens
        assert ((drawn[-2, at.astype(int)] == 255).all(axis=1) == image.kept).mean() > 0.9
    assert together(seen.images, "attention").sum() == pytest.approx(1)


def test_a_layout_of_another_number_of_tokens_is_not_believed(
    demo: VlmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_short = Grid(np.arange(15)[None], (0, 0, 1, 1), np.empty(0, np.int64))
    monkeypatch.setattr(token_layout, "_FAMILIES", {"llava": lambda _sample: [[one_short]]})
    (image,) = seen_by(demo, question("What is this?")).images
    assert image.layout.grids[0].box is None


@pytest.mark.parametrize("changed", ["mirrored", "turned", "in other colours"])
def test_a_tile_that_shows_something_else_has_no_place(
    changed: str, demo: VlmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = token_layout._picture_of_coordinates
    change: dict[str, Callable[[Image.Image], Any]] = {
        "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90).resize(image.size),
        "in other colours": lambda image: image.convert("L").convert("RGB"),
    }
    monkeypatch.setattr(
        token_layout, "_picture_of_coordinates", lambda *size: change[changed](original(*size))
    )
    (layout,) = layouts_of(demo, SQUARE)
    assert layout.grids[0].box is None
    assert "could not be measured" in layout.note


# The drawing


def drawn_map(
    shape: tuple[int, int], box: tuple[float, float, float, float], size: tuple[int, int]
) -> ImageAttention:
    """One grid, all attention on its first token, which alone is kept."""
    n_tokens = shape[0] * shape[1]
    grid = Grid(np.arange(n_tokens).reshape(shape), box, np.empty(0, np.int64))
    attention = np.zeros(n_tokens)
    attention[0] = 1
    return ImageAttention(ImageLayout(size, n_tokens, (grid,), ""), attention, attention > 0)


def test_heat_lies_on_the_token_with_the_attention_and_white_around_the_kept_one() -> None:
    image = Image.new("RGB", (80, 40), (128, 128, 128))
    drawn = np.asarray(overlay(image, drawn_map((2, 4), (0, 0, 80, 40), (80, 40)), max_side=80)).astype(int)
    assert max(drawn.shape) <= 80
    side = drawn.shape[1] // 4
    inner = drawn[side // 2, side // 2]
    other = drawn[side // 2, 3 * side]
    assert inner.sum() > other.sum() + 150  # yellow against dark blue
    assert inner[0] > inner[2]
    assert other[2] > other[0]
    assert (drawn[0, :side] == 255).all()
    assert (drawn[:side, 0] == 255).all()
    assert not (drawn[-1] == 255).all(axis=1).any()


def test_margins_that_no_token_shows_are_dark_and_padding_is_plain() -> None:
    image = Image.new("RGB", (100, 50), (200, 200, 200))
    cropped = np.asarray(overlay(image, drawn_map((1, 2), (25, 0, 75, 50), (100, 50)), max_side=101))
    assert cropped.shape[1] / cropped.shape[0] == pytest.approx(2, abs=0.05)
    assert (cropped[:, 2] == round(0.35 * 200)).all()
    padded = np.asarray(overlay(image, drawn_map((2, 2), (0, -25, 100, 75), (100, 50)), max_side=101))
    assert padded.shape[0] == pytest.approx(padded.shape[1], abs=1)  # the tokens' area is square
    # Below the heat lies the image in the middle, and grey above and below it.
    assert len(np.unique(padded[90, 60:95].reshape(-1, 3), axis=0)) == 1
    assert padded[40, 80].sum() > padded[90, 80].sum()


@pytest.mark.parametrize("max_side", [64, 200, 768])
@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "qwen2_vl"])
def test_a_drawing_is_a_png_of_the_size_that_is_asked_for_and_the_same_each_time(
    family: str, max_side: int, tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    sample = question("What is this?", "4:300x140")
    (seen,) = seen_by(tiny_encoder(family), sample).images
    png = overlay_png(pixels("4:300x140"), seen, max_side=max_side)
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    assert max_side - 10 <= max(picture.size) <= max_side
    assert png == overlay_png(pixels("4:300x140"), seen, max_side=max_side)


def test_tiles_and_the_whole_image_are_drawn_side_by_side(tiny_encoder: Callable[[str], VlmEncoder]) -> None:
    sample = question("What is this?", "4:140x300")
    sizes = {}
    for family in ("llava", "llava_next", "internvl", "idefics3"):
        (seen,) = seen_by(tiny_encoder(family), sample).images
        drawn = overlay(pixels("4:140x300"), seen, max_side=400)
        sizes[family] = round(drawn.width / drawn.height / (140 / 300))
    assert sizes == {"llava": 1, "llava_next": 2, "internvl": 2, "idefics3": 2}


def test_another_image_than_the_one_that_was_looked_at_is_refused() -> None:
    seen = drawn_map((1, 1), (0, 0, 80, 40), (80, 40))
    with pytest.raises(ValueError, match="80 × 40"):
        overlay(Image.new("RGB", (40, 80)), seen)
    with pytest.raises(ValueError, match="32 or more"):
        overlay(Image.new("RGB", (80, 40)), seen, max_side=31)
