"""The tiny models of the zoo, each written once per session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from scalselect_assets.method.representation.encoder import VlmEncoder
    from scalselect_assets.method.representation.preparation import Preparer


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model; copy it before changing it."""
    from tests.method.zoo import write_tiny_vlm  # takes seconds, and half of the modules here need no model

    root = tmp_path_factory.mktemp("zoo")
    return cache(lambda family: write_tiny_vlm(family, root / family))


@pytest.fixture(scope="session")
def tiny_encoder(tiny_vlm: Callable[[str], Path]) -> Callable[[str], "VlmEncoder"]:
    """The loaded encoder of a family."""
    from scalselect_assets.method.representation.loading import load_encoder

    return cache(lambda family: load_encoder(str(tiny_vlm(family)), device="cpu"))


@pytest.fixture(scope="session")
def tiny_preparer(tiny_vlm: Callable[[str], Path]) -> Callable[..., "Preparer"]:
    """A preparer of a family's tiny model; options are those of ``Preparer``."""
    from transformers import AutoConfig

    from scalselect_assets.method.representation.families import image_token_id
    from scalselect_assets.method.representation.preparation import Preparer
    from scalselect_assets.method.representation.processors import load_processor

    def make(family: str, **options: int) -> Preparer:
        path = str(tiny_vlm(family))
        config = AutoConfig.from_pretrained(path)
        limits = {"max_tokens": 2048, "max_pixels": 1_000_000, **options}
        return Preparer(load_processor(path, None, config), image_token_id=image_token_id(config), **limits)

    return make
