"""The attention that the instruction pays to the image in the first language-model layer (paper, section 3).

Transformers hands the layer's own queries, keys, mask and scaling to a registered attention function. Ours
takes the attention of the instruction rows from them and leaves the layer's output to the SDPA kernel, so
that no heads × S × S tensor ever exists: per sample only ``heads × block × S`` values, whatever S is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

PROBED_ATTENTION = "scalselect_probed_sdpa"
"""The name under which the probing attention function is registered with Transformers."""

_BLOCK_BYTES = 64 * 2**20  # softmax rows held at once; small against any model that fits the device


@dataclass(slots=True, eq=False)
class AttentionProbe:
    """What the probe looks for, and what it finds in one forward pass.

    Attributes:
        instruction: (batch, S) bool, true at instruction tokens.
        attention: (batch, S) float32, attention paid to each token, averaged over heads and instruction
            tokens; ``None`` until the layer has run.
    """

    instruction: torch.Tensor
    attention: torch.Tensor | None = None


_PROBE: ContextVar[AttentionProbe | None] = ContextVar("scalselect_attention_probe", default=None)


@contextmanager
def probing(probe: AttentionProbe) -> Iterator[AttentionProbe]:
    """Make ``probe`` the one that the next forward pass fills."""
    token = _PROBE.set(probe)
    try:
        yield probe
    finally:
        _PROBE.reset(token)


def register_probed_attention() -> str:
    """Register the probing attention function with Transformers (idempotent) and return its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(PROBED_ATTENTION, _probed_sdpa)
    AttentionMaskInterface.register(PROBED_ATTENTION, sdpa_mask)
    return PROBED_ATTENTION


def _probed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (probe := _PROBE.get()) is not None:
        probe.attention = instruction_attention(
            query,
            key,
            attention_mask,
            probe.instruction,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            causal=attention_mask is None and getattr(module, "is_causal", True),
        )
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


def instruction_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    instruction: torch.Tensor,
    *,
    scaling: float,
    causal: bool,
    block_bytes: int = _BLOCK_BYTES,
) -> torch.Tensor:
    """Softmax attention averaged over heads and instruction rows, in blocks of rows.

    Args:
        query: (batch, heads, S, head_dim), rotary position already applied.
        key: (batch, kv_heads, S, head_dim); heads is a multiple of kv_heads (grouped-query attention).
        attention_mask: ``None``, or (batch, 1 or heads, S, S): bool (true = attend) or additive.
        instruction: (batch, S) bool; a sample without a true entry gets zeros.
        scaling: Factor on the dot products.
        causal: Mask the future where ``attention_mask`` is ``None``.
        block_bytes: Bound on the float32 softmax rows held at once.

    Returns:
        (batch, S) float32: per token the mean attention that it receives. Time is
        O(heads · |instruction| · S · head_dim), memory O(S + block_bytes).
    """
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    attention = torch.zeros(batch, length, dtype=torch.float32, device=query.device)
    rows_per_block = max(1, block_bytes // (4 * heads * length))
    positions = torch.arange(length, device=query.device)
    for sample in range(batch):
        rows = instruction[sample].nonzero().squeeze(1)
        for block in torch.split(rows, rows_per_block):
            grouped = query[sample, :, block].reshape(kv_heads, -1, query.shape[-1])
            logits = (grouped @ key[sample].transpose(1, 2)).float().mul_(scaling)
            logits = logits.view(heads, len(block), length)
            if attention_mask is not None:
                mask = attention_mask[sample, :, block]
                logits = logits.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            elif causal:
                logits.masked_fill_(positions > block[:, None], -torch.inf)
            attention[sample] += logits.softmax(-1).sum((0, 1))
        attention[sample] /= max(1, heads * len(rows))
    return attention


def dominant_tokens(attention: torch.Tensor, attention_mass: float) -> torch.Tensor:
    """The fewest vision tokens whose share of the attention exceeds ``attention_mass``.

    Args:
        attention: (n_vision,) non-negative attention received by the vision tokens.
        attention_mass: Threshold in (0, 1]; the token that crosses it is kept, and at 1.0 all tokens are.

    Returns:
        (m,) int64 indices, by attention descending, ties in token order. Shares are uniform where the
        attention sums to zero.
    """
    share = attention.double()
    total = share.sum()
    share = share / total if total > 0 else torch.full_like(share, 1 / len(share))
    order = share.argsort(descending=True, stable=True)
    crossed = int((share[order].cumsum(0) <= attention_mass).sum())
    return order[: crossed + 1]
