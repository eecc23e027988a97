"""Pictures of noise and of one colour are found, and nothing that shows something, however rare."""

import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scalselect_assets.choice import contentless_pictures
from scalselect_assets.choice.contentless_pictures import find, verdict
from scalselect_assets.demo.drawing import draw
from scalselect_assets.demo.scenes import RarePicture
from scalselect_assets.pool import raw_samples
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.storage import StorageResource

RNG = np.random.default_rng(0)


def noise(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_jpeg(image: Image.Image, quality: int = 85) -> Image.Image:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=quality)
    return Image.open(stored).convert("RGB")


@pytest.mark.parametrize(
    "image",
    [
        noise(),
        noise(32, 32),
        noise(1200, 900),
        noise().resize((192, 128), Image.Resampling.NEAREST),
        as_jpeg(noise()),
        Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8)).convert("RGB"),
    ],
    ids=["small", "tiny", "large", "enlarged", "jpeg", "grey"],
)
def test_noise_is_found(image: Image.Image) -> None:
    assert verdict(image) == "noise"


def test_one_colour_is_found_also_when_compressed() -> None:
    assert verdict(Image.new("RGB", (80, 60), (200, 30, 30))) == "one colour"
    assert verdict(as_jpeg(Image.new("RGB", (80, 60), (20, 30, 30)))) == "one colour"


def text_page() -> Image.Image:
    page = Image.new("RGB", (300, 400), "white")
    for line in range(20):
        ImageDraw.Draw(page).text((10, 20 * line), "The quick brown fox jumps over it " * 2, fill="black")
    return page


def pattern(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    "image",
    [
        text_page(),
        pattern(np.add.outer(np.arange(64), np.arange(64)) % 2 * 255.0),
        pattern(np.broadcast_to(np.arange(64) % 2 * 255.0, (64, 64))),
        pattern(np.broadcast_to(np.linspace(100, 120, 64), (64, 64))),
        pattern(60 * np.sin(np.arange(64) / 3)[:, None] + 128 + 20 * RNG.normal(size=(64, 64))),
    ],
    ids=["text", "checkerboard", "fine stripes", "faint gradient", "noisy waves"],
)
def test_what_shows_something_stays(image: Image.Image) -> None:
    assert verdict(image) is None


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("kind", ["negative", "sketch", "specks", "rings", "stripes", "gradient"])
def test_the_demos_rare_pictures_stay_and_its_noise_is_found(kind: str, variant: int) -> None:
    assert verdict(draw(RarePicture(kind, variant, 0))) is None  # type: ignore[arg-type]
    assert verdict(draw(RarePicture("noise", variant, 0))) == "noise"


def store(folder: Path, images: list[list[str]], version: str = "1") -> ArtifactStore:
    """A store with the raw samples of one shard, as far as they are read here."""
    artifacts = StorageResource().artifacts(str(folder))
    frame = pl.DataFrame(
        {
            "row": range(len(images)),
            "sample_key": [f"k{row}" for row in range(len(images))],
            "reason": [None] * len(images),
            "images": images,
        },
        schema_overrides={"reason": pl.String},
    )
    artifacts.write_frame(raw_samples.NAME, frame, {"data_version": version}, "s")
    return artifacts


def test_a_sample_goes_where_all_its_pictures_show_nothing_and_verdicts_are_remembered(
    tmp_path: Path,
) -> None:
    files = {"noise.png": noise(), "red.png": Image.new("RGB", (40, 40), "red"), "page.png": text_page()}
    opened: list[str] = []

    def open_image(name: str) -> bytes:
        opened.append(name)
        if name not in files:
            raise FileNotFoundError(name)
        stored = io.BytesIO()
        files[name].save(stored, "PNG")
        return stored.getvalue()

    images = [["noise.png"], ["noise.png", "page.png"], ["red.png", "noise.png"], ["gone.png"], ["page.png"]]
    artifacts = store(tmp_path, images)
    found = find(artifacts, ["s"], open_image)
    assert found["row"].to_list() == [0, 2]
    assert found["detail"].to_list() == ["noise", "noise, one colour"]
    assert set(found["reason"]) == {contentless_pictures.REASON}
    n_opened = len(opened)
    assert n_opened == 4
    assert find(artifacts, ["s"], open_image).equals(found)
    assert len(opened) == n_opened
    assert find(store(tmp_path, images[1:], "2"), ["s"], open_image)["row"].to_list() == [1]
