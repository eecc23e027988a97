"""The part of a decoder layer after its attention, computed for the mean of each sample's kept tokens.

The layer's own modules and its own ``forward`` compute this part; only the attention module is replaced. If
the MLP ends in a linear projection, that projection is applied once to each sample's mean, not to each token.
"""

import copy
from typing import Any

import torch
from torch.nn.functional import embedding_bag

from scalselect_assets.method.representation.attention import Kept
from scalselect_assets.method.representation.families import UnsupportedModelError


class AfterAttention:
    """The part of a decoder layer after its attention, run by the layer's own modules and ``forward``."""

    def __init__(self, layer: torch.nn.Module) -> None:
        names = [name for name, child in layer.named_children() if hasattr(child, "o_proj")]
        if len(names) != 1:
            raise UnsupportedModelError(
                f"{type(layer).__name__} has {len(names)} attention modules with an output projection named "
                "o_proj; exactly one is expected"
            )
        (attention,) = names
        self._attended = _Attended(layer.get_submodule(f"{attention}.o_proj"))
        self._layer = copy.copy(layer)
        self._layer._modules = {**layer._modules, attention: self._attended}
        self._mean_first: _MeanFirst | None = None
        usual = {attention, "mlp", "input_layernorm", "post_attention_layernorm"}
        mlp = layer._modules.get("mlp")
        projection = getattr(mlp, "down_proj", None)
        if set(layer._modules) == usual and mlp is not None and isinstance(projection, torch.nn.Linear):
            # Only the residual connection follows this projection, so everything from here on is linear.
            self._mean_first = _MeanFirst(projection)
            pooled = copy.copy(mlp)
            pooled._modules = {**mlp._modules, "down_proj": self._mean_first}
            self._layer._modules["mlp"] = pooled

    def __call__(
        self, tokens: torch.Tensor, attended: torch.Tensor, kept: Kept, layer_inputs: dict[str, Any]
    ) -> torch.Tensor:
        """The mean of the layer's output over each sample's kept tokens.

        Args:
            tokens: (M, d) inputs of the layer.
            attended: (M, heads · head_dim) outputs of its attention before the projection.
            kept: The kept tokens and the sample that each belongs to.
            layer_inputs: The other arguments of the layer's call.

        Returns:
            (B, d) float32.
        """
        self._attended.attended = attended[None]
        if self._mean_first is not None:
            self._mean_first.kept = kept
        try:
            output = self._layer(tokens[None], **layer_inputs)
        finally:
            del self._attended.attended
            if self._mean_first is not None:
                del self._mean_first.kept
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return _means(states[0].float(), kept)


class _Attended(torch.nn.Module):
    """Replaces a layer's attention module; it projects attention outputs that were computed before."""

    attended: torch.Tensor

    def __init__(self, projection: torch.nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, *_args: Any, **_kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.projection(self.attended), None


class _MeanFirst(torch.nn.Module):
    """Replaces an MLP's last projection: projects each sample's mean instead of each of its tokens."""

    kept: Kept

    def __init__(self, projection: torch.nn.Linear) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        means: torch.Tensor = self.projection(_means(states[0], self.kept))
        return means[self.kept.samples][None]


def _means(states: torch.Tensor, kept: Kept) -> torch.Tensor:
    """(M, d) → (B, d): the mean over each sample's tokens, summed in float32 and in token order."""
    numbers = torch.arange(len(states), device=states.device)
    return embedding_bag(numbers, states, kept.starts, mode="mean")
