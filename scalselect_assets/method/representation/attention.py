"""Attention by rows: what the instruction pays to the image, and what only the wanted tokens read.

Transformers hands a decoder layer's own queries, keys, values, mask and scaling to a registered attention
function. Ours takes them out (``Queries``) and leaves the layer there: ``method.first_layer`` goes on with
the few rows that the method needs. Masks stay functions of positions and are only ever evaluated for a block
of rows, so that nothing of size S × S exists, let alone heads × S × S.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from scalselect_assets.method.representation.families import UnsupportedModelError

ROWS_ATTENTION = "scalselect_rows"
"""The name under which the attention and mask functions are registered with Transformers."""

_BLOCK_BYTES = 64 * 2**20  # softmax rows held at once; small against any model that fits the device
_MASK_BYTES = 16 * 2**20  # of a block's mask, one byte a position


@dataclass(frozen=True, slots=True, eq=False)
class RowMask:
    """An attention mask as the function that defines it, evaluated for the rows that are asked for.

    Attributes:
        allowed: Transformers' mask function: (batch, head, query, key) index tensors that broadcast → bool.
        causal: The function is plain causality: no token sees a later one, all see the earlier ones.
    """

    allowed: Callable[..., torch.Tensor]
    causal: bool

    def of(self, sample: int, rows: torch.Tensor, n_keys: int) -> torch.Tensor:
        """(len(rows), n_keys) bool, true where a row may attend."""
        keys = torch.arange(n_keys, device=rows.device)
        if self.causal:
            return keys <= rows[:, None]
        batch = torch.full((1, 1), sample, device=rows.device)
        allowed = self.allowed(batch, torch.zeros_like(batch), rows[:, None], keys[None])
        return allowed.expand(len(rows), n_keys)


class AtAttention(Exception):  # noqa: N818 - leaves the layer, which is no error
    """Leaves a decoder layer where it would attend, with all that attending takes.

    Attributes:
        module: The attention module.
        query: (1, heads, T, head_dim), rotary position applied.
        key: (1, kv_heads, T, head_dim); heads is a multiple of kv_heads (grouped-query attention).
        value: As ``key``.
        scaling: Factor on the dot products.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> None:
        super().__init__()
        self.module, self.query, self.key, self.value, self.scaling = module, query, key, value, scaling


def register_rows_attention() -> str:
    """Register the attention and the mask function with Transformers (idempotent) and return their name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ROWS_ATTENTION, _stop_at_attention)
    AttentionMaskInterface.register(ROWS_ATTENTION, _row_mask)
    return ROWS_ATTENTION


def _stop_at_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: Any = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if odd := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise UnsupportedModelError(f"the first layer's attention has {odd[0]!r}, which is not supported")
    raise AtAttention(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _row_mask(*, mask_function: Callable[..., torch.Tensor], **_kwargs: Any) -> RowMask:
    from transformers.masking_utils import causal_mask_function

    return RowMask(mask_function, causal=mask_function is causal_mask_function)


def _blocks(
    rows: torch.Tensor, mask: RowMask, sample: int, n_keys: int, bytes_per_row: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of ``rows`` with their masks; what a block may take is bounded for its logits and its mask."""
    size = max(1, min(_BLOCK_BYTES // bytes_per_row, _MASK_BYTES // n_keys))
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        yield block, mask.of(sample, rows[block], n_keys)


def instruction_attention(
    query: torch.Tensor, key: torch.Tensor, mask: RowMask, sample: int, rows: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Softmax attention of one sample, averaged over heads and over the rows of the instruction.

    Args:
        query: (heads, S, head_dim).
        key: (kv_heads, S, head_dim).
        mask: What each row may attend to.
        sample: The sample's place in the batch that ``mask`` was made for.
        rows: (u,) int64 positions of the instruction tokens; without any, the attention is zero.
        scaling: Factor on the dot products.

    Returns:
        (S,) float32: per token the mean attention that it receives. Time O(heads · u · S · head_dim), memory
        O(S) and a fixed block.
    """
    heads, length, _ = query.shape
    attention = torch.zeros(length, dtype=torch.float32, device=query.device)
    for block, allowed in _blocks(rows, mask, sample, length, 4 * heads * length):
        grouped = query[:, rows[block]].reshape(key.shape[0], -1, query.shape[-1])
        logits = (grouped @ key.transpose(1, 2)).float().mul_(scaling).view(heads, -1, length)
        attention += logits.masked_fill_(~allowed, -torch.inf).softmax(-1).sum((0, 1))
    return attention.div_(max(1, heads * len(rows)))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RowMask,
    sample: int,
    rows: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The attention output of some rows of one sample.

    Args:
        query: (heads, S, head_dim).
        key: (kv_heads, S, head_dim).
        value: (kv_heads, S, head_dim).
        mask: What each row may attend to.
        sample: The sample's place in the batch that ``mask`` was made for.
        rows: (m,) int64 positions.
        scaling: Factor on the dot products.

    Returns:
        (m, heads · head_dim) in the dtype of ``value``. Memory O(S + m) and a fixed block.
    """
    heads, length, _ = query.shape
    # Not every kernel takes grouped-query heads together with a mask.
    key, value = (x.repeat_interleave(heads // x.shape[0], 0)[None] for x in (key, value))
    outputs = [
        scaled_dot_product_attention(
            query[None, :, rows[block]], key, value, attn_mask=allowed[None, None], scale=scaling
        )[0].transpose(0, 1)
        for block, allowed in _blocks(rows, mask, sample, length, 4 * heads * length)
    ]
    return torch.cat(outputs).flatten(1)


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
    if attention_mass >= 1:
        return order  # no share exceeds it, but a rounded sum may, before tokens without attention
    crossed = int((share[order].cumsum(0) <= attention_mass).sum())
    return order[: crossed + 1]
