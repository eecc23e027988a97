"""The flops that a representation takes, and the matrix products that show what the machine can do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine
from benchmarks.two_ways import How
from scalselect_assets.method.representation.encoder import ChatSample, Representation
from scalselect_assets.method.representation.loading import resolve_device


@dataclass(frozen=True, slots=True)
class Work:
    """Flops, of a pool or per sample: a multiplication with its addition counts as two.

    Attributes:
        tower: Vision tower, its used layers, and projector, once per image.
        layer: Of the first layer: queries, keys and values of all tokens, attention of the instruction on
            everything before it, attention, output projection and MLP of the dominant tokens, and of the
            MLP's last projection, which commutes with the mean, one row per sample.
        whole_layer: The first layer for all tokens.
    """

    tower: float
    layer: float
    whole_layer: float

    @property
    def needed(self) -> float:
        """What the representation takes."""
        return self.tower + self.layer

    @property
    def with_whole_layer(self) -> float:
        """What it takes if the layer is run as it is."""
        return self.tower + self.whole_layer


def work_per_sample(
    config: Any, samples: Sequence[ChatSample], representations: Sequence[Representation]
) -> Work:
    """The mean over the samples; the image is taken to stand at the beginning of a prompt."""
    by_image = {
        sample.images: representation.n_vision_tokens
        for sample, representation in zip(samples, representations, strict=True)
    }
    towers = sum(_tower_flops(config, n_vision) for n_vision in by_image.values())
    layers = [_layer_flops(config.get_text_config(), one) for one in representations]
    n = len(representations)
    return Work(towers / n, sum(part for part, _ in layers) / n, sum(whole for _, whole in layers) / n)


def _tower_flops(config: Any, n_vision: int) -> float:
    tower = config.vision_config
    width, mlp, out = tower.hidden_size, tower.intermediate_size, config.get_text_config().hidden_size
    values = 3 * tower.patch_size**2
    if config.model_type == "llava":
        patches, tokens = n_vision, n_vision + 1
        layers = tower.num_hidden_layers + config.vision_feature_layer + 1
        projector = width * out + out * out
    else:
        patches = tokens = n_vision * tower.spatial_merge_size**2
        layers = tower.depth
        values *= tower.temporal_patch_size
        merged = width * tower.spatial_merge_size**2
        projector = merged * merged + merged * out
    per_layer = 2 * tokens * (4 * width * width + 2 * width * mlp) + 4 * tokens**2 * width
    return float(2 * patches * values * width + layers * per_layer + 2 * n_vision * projector)


def _layer_flops(text: Any, of: Representation) -> tuple[float, float]:
    """Of one sample: as far as needed, and for all tokens."""
    width, mlp, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    queries, keys = heads * head, text.num_key_value_heads * head
    n, n_vision, n_dominant = of.n_tokens, of.n_vision_tokens, of.n_dominant_tokens
    projections = 2 * n * width * (queries + 2 * keys)
    per_token = 2 * (queries * width + 2 * width * mlp)
    back = 2 * width * mlp  # linear up to the mean, so once per sample
    seen_by_instruction = of.n_instruction_tokens * (n_vision + (n - n_vision) / 2)
    attention = queries * (2 * seen_by_instruction + 4 * n_dominant * n_vision / 2)
    whole = projections + n * (per_token + back) + 4 * queries * n * (n + 1) / 2
    return projections + attention + n_dominant * per_token + back, whole


def matmul_workloads(config: Any, how: How) -> list[machine.Workload]:
    """Products of the sizes at hand; the fastest is what the machine can do."""
    device, dtype = resolve_device(how.device), getattr(torch, how.dtype)
    text, tower = config.get_text_config(), config.vision_config
    rows, times = (16384, 10) if device.type == "cuda" else (4096, 1)
    side = 8192 if device.type == "cuda" else 2048
    shapes = {
        (rows, text.hidden_size, text.intermediate_size),
        (rows, text.intermediate_size, text.hidden_size),
        (rows, text.hidden_size, text.hidden_size),
        (rows, tower.hidden_size, tower.intermediate_size),
        (side, side, side),
    }
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                left @ right
            how.synchronise()

        return run

    return [
        machine.Workload(
            f"({m:,}, {k:,}) × ({k:,}, {n:,})",
            "GFLOP/s",
            2.0 * m * k * n * times,
            # As a linear layer holds its weight: transposed.
            product(random(m, k), random(n, k).T),
        )
        for m, k, n in sorted(shapes)
    ]
