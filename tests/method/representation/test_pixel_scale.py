"""Bytes are passed on only where scaling them later gives what the model's own processor gives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from scalselect_assets.method.representation import preparation
from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.method.representation.pixel_scale import LEFT_OUT, PixelScale, as_bytes, pixel_scale
from scalselect_assets.method.representation.preparation import Prepared, Preparer
from tests.method.samples import SAMPLES, assert_equal, read_image, represent

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SCALE = PixelScale(1 / 255, (0.5, 0.25, 0.1), (0.5, 0.2, 0.3))


class Processor:
    """An image processor that gives the first pixels of each picture, and what a test does to them."""

    do_rescale = do_normalize = True
    rescale_factor = SCALE.factor
    image_mean, image_std = SCALE.mean, SCALE.deviation

    def __init__(
        self, change: Callable[[torch.Tensor, bool], torch.Tensor] = lambda values, _: values
    ) -> None:
        self._change = change

    def __call__(self, pictures: list[Any], **options: Any) -> dict[str, torch.Tensor]:
        assert options.pop("return_tensors") == "pt"
        pixels = torch.stack(
            [torch.from_numpy(np.array(one)).reshape(-1, 3)[:16].T.reshape(3, 4, 4) for one in pictures]
        )
        raw = options == LEFT_OUT
        values = pixels.to(torch.uint8) if raw else SCALE.applied(pixels.to(torch.uint8))
        return {"pixel_values": self._change(values, raw)}


def test_scaling_is_by_channel_in_images_and_in_patches() -> None:
    pixels = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    expected = torch.stack(
        [(pixels[:, channel] / 255 - SCALE.mean[channel]) / SCALE.deviation[channel] for channel in range(3)],
        1,
    )
    torch.testing.assert_close(SCALE.applied(pixels), expected)
    torch.testing.assert_close(SCALE.applied(pixels[None]), expected[None])  # tiles of an image
    torch.testing.assert_close(SCALE.applied(pixels.view(2, 12)), expected.view(2, 12))
    assert SCALE.applied(pixels).dtype == torch.float32


def test_whole_numbers_become_bytes_and_others_stay() -> None:
    assert torch.equal(as_bytes(torch.tensor([0.0, 255.0])), torch.tensor([0, 255], dtype=torch.uint8))
    for other in ([0.5, 1.0], [256.0], [-1.0], [torch.nan]):
        assert as_bytes(torch.tensor(other)).dtype == torch.float32
    assert as_bytes(None) is None


def test_a_processor_that_only_scales_at_its_end_is_asked_for_bytes() -> None:
    assert pixel_scale(Processor()) == SCALE
    assert pixel_scale(Processor(lambda values, raw: values.float() if raw else values)) == SCALE


@pytest.mark.parametrize(
    "change",
    [
        lambda values, raw: values if raw else values + 1e-3,
        lambda values, raw: values + 0.5 if raw else values,
        # Filled up with zeros after scaling, where there are several pictures.
        lambda values, _raw: values if len(values) == 1 else values.index_fill(2, torch.tensor([3]), 0),
        lambda values, raw: values[:, :, :2] if raw else values,
    ],
    ids=["another value", "no bytes", "zeros among several", "another shape"],
)
def test_a_processor_that_does_more_is_not(change: Callable[[torch.Tensor, bool], torch.Tensor]) -> None:
    assert pixel_scale(Processor(change)) is None


@pytest.mark.parametrize(
    ("setting", "value"), [("do_rescale", False), ("do_normalize", None), ("image_mean", (0.5,))]
)
def test_a_processor_with_other_steps_is_not(setting: str, value: Any) -> None:
    processor = Processor()
    setattr(processor, setting, value)
    assert pixel_scale(processor) is None


def test_a_processor_that_refuses_the_options_is_not() -> None:
    class Strict(Processor):
        def __call__(self, pictures: list[Any], **options: Any) -> dict[str, torch.Tensor]:
            if "do_rescale" in options:
                raise TypeError("unexpected keyword argument")
            return super().__call__(pictures, **options)

    assert pixel_scale(Strict()) is None


# Real processors


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "internvl", "gemma3", "idefics3"])
def test_bytes_and_values_give_the_same_representation(
    family: str,
    tiny_encoder: Callable[[str], VlmEncoder],
    tiny_preparer: Callable[..., Preparer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, sample = tiny_encoder(family), SAMPLES["a wide image"]
    (prepared,) = tiny_preparer(family).prepare(sample.images, [sample.conversation], read_image)
    assert isinstance(prepared, Prepared)
    assert {one.inputs["pixel_values"].dtype for one in prepared.model_input.images} == {torch.uint8}
    by_bytes = represent(encoder, list(SAMPLES.values()))
    monkeypatch.setattr(preparation, "pixel_scale", lambda _: None)
    plain = tiny_preparer(family)
    (prepared,) = plain.prepare(sample.images, [sample.conversation], read_image)
    assert isinstance(prepared, Prepared)
    assert {one.inputs["pixel_values"].dtype for one in prepared.model_input.images} == {torch.float32}
    monkeypatch.setattr(encoder.preparer, "_pixel_scale", None)
    assert_equal(represent(encoder, list(SAMPLES.values())), by_bytes)
