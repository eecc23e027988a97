"""The dominant vision tokens of each sample: step 2 of the method, for a whole batch on its device."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Dominant:
    """The vision tokens of each sample whose share of the attention exceeds a threshold.

    Attributes:
        places: (B, V) int64: places of the sample's vision tokens; first the kept ones, by descending
            attention with ties in token order, then the others.
        n: (B,) int64: number of kept tokens.
    """

    places: torch.Tensor
    n: torch.Tensor


def dominant(attention: torch.Tensor, n_vision: torch.Tensor, attention_mass: float) -> Dominant:
    """The fewest vision tokens of each sample whose share of the attention exceeds ``attention_mass``.

    Args:
        attention: (B, V) non-negative attention received by the vision tokens; the padding is not read.
        n_vision: (B,) int64 number of vision tokens of each sample.
        attention_mass: Threshold in (0, 1]; the token that crosses it is kept, and at 1.0 all tokens are.
            Shares are uniform where the attention sums to zero.
    """
    n = n_vision[:, None]
    real = torch.arange(attention.shape[1], device=attention.device) < n
    share = torch.where(real, attention.double(), 0.0)
    total = share.sum(1, keepdim=True)
    share = torch.where(total > 0, share / total, 1 / n)
    # The padding comes last.
    falling, places = torch.where(real, share, -1.0).sort(dim=1, descending=True, stable=True)
    if attention_mass >= 1:
        return Dominant(places, n_vision)  # a rounded sum may exceed it before tokens without attention
    crossed = ((falling.cumsum(1) <= attention_mass) & real).sum(1)
    return Dominant(places, (crossed + 1).minimum(n_vision))


def dominant_tokens(attention: torch.Tensor, attention_mass: float) -> torch.Tensor:
    """The places of the dominant tokens of one sample: (n_vision,) attention → (m,) int64."""
    found = dominant(attention[None], torch.tensor([len(attention)], device=attention.device), attention_mass)
    return found.places[0, : int(found.n)]
