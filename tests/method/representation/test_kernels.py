"""No kernel is chosen that costs something for each new shape, and the process gets its own choice back."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.backends import cuda, cudnn

from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.method.representation.kernels import without_costs_per_shape
from tests.method.samples import SAMPLES, represent

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def settings() -> dict[str, bool]:
    return {
        "cuDNN's attention": cuda.cudnn_sdp_enabled(),
        "flash attention": cuda.flash_sdp_enabled(),
        "memory-efficient attention": cuda.mem_efficient_sdp_enabled(),
        "plain attention": cuda.math_sdp_enabled(),
        "convolutions are tried out": cudnn.benchmark,
    }


WITHIN = {
    "cuDNN's attention": False,
    "flash attention": True,
    "memory-efficient attention": True,
    "plain attention": True,
    "convolutions are tried out": False,
}


@pytest.fixture(params=[True, False], ids=["cuDNN allowed", "cuDNN forbidden"])
def chosen(request: pytest.FixtureRequest) -> Iterator[dict[str, bool]]:
    """The settings of a process, which are torch's own or the opposite."""
    before = settings()
    cuda.enable_cudnn_sdp(request.param)
    cudnn.benchmark = request.param
    yield settings()
    cuda.enable_cudnn_sdp(before["cuDNN's attention"])
    cudnn.benchmark = before["convolutions are tried out"]


def test_the_settings_hold_within_and_are_as_before_afterwards(chosen: dict[str, bool]) -> None:
    with without_costs_per_shape():
        assert settings() == WITHIN
    assert settings() == chosen
    with pytest.raises(ZeroDivisionError), without_costs_per_shape():
        _ = 1 / 0
    assert settings() == chosen


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_every_attention_of_tower_and_layer_runs_under_them(
    family: str,
    chosen: dict[str, bool],
    tiny_encoder: Callable[[str], VlmEncoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = tiny_encoder(family)
    seen: list[dict[str, bool]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments: object, **options: object) -> torch.Tensor:
        seen.append(settings())
        return attend(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(
        "scalselect_assets.method.representation.attention.scaled_dot_product_attention", watched
    )
    represent(encoder, list(SAMPLES.values()))
    assert len(seen) > 2  # of the tower's layers and of the first one
    assert all(one == WITHIN for one in seen)
    assert settings() == chosen
