"""Attention by rows: the instruction's attention to the image, and the attention output of the kept tokens.

Transformers passes a decoder layer's own queries, keys, values, mask and scaling to a registered attention
function. The function registered here raises them out of the layer (``AtAttention``), and the layer stops at
that point. ``method.first_layer`` continues with the few rows that the method needs.

The samples of a batch are computed together: samples of similar sizes are padded to the largest of them, so
that the number of kernels depends on the number of sizes and hardly on the number of samples. Masks stay
functions of positions and are evaluated only for a block of rows, so that no tensor of size S × S or
heads × S × S ever exists.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from scalselect_assets.method.representation.families import UnsupportedModelError
from scalselect_assets.method.representation.packing import rectangle
from scalselect_assets.method.transfers import Transfers

ROWS_ATTENTION = "scalselect_rows"
"""The name under which the attention and mask functions are registered with Transformers."""

_BLOCK_BYTES = {  # memory for the softmax rows that are held at once
    "cpu": 2 * 2**20,  # fits the CPU's caches, which saves more time than fewer calls would
    "cuda": 256 * 2**20,  # dozens of samples per kernel, and little next to the model itself
}
_MASK_BYTES = 16 * 2**20  # memory for a block's mask, one byte per position
_FILLED = 2.0  # a block has at most this many times the pairs of its samples


@dataclass(frozen=True, slots=True, eq=False)
class RowMask:
    """An attention mask kept as the function that defines it, and evaluated only for requested rows.

    Attributes:
        allowed: Transformers' mask function: (batch, head, query, key) index tensors that broadcast → bool.
        causal: Whether the mask is plain causality: a token sees all earlier tokens and no later one.
    """

    allowed: Callable[..., torch.Tensor]
    causal: bool

    def of(self, samples: torch.Tensor, rows: torch.Tensor, n_keys: int) -> torch.Tensor:
        """The mask of some rows of some samples.

        Args:
            samples: (n,) int64 places in the batch that the mask was made for.
            rows: (n, r) int64 positions in the sample.
            n_keys: Number of keys, counted from the sample's beginning.

        Returns:
            (n, r, n_keys) bool, true where a row may attend.
        """
        keys = torch.arange(n_keys, device=rows.device)
        if self.causal:
            return keys <= rows[..., None]
        batch = samples[:, None, None, None]
        allowed = self.allowed(batch, torch.zeros_like(batch), rows[:, None, :, None], keys[None, None, None])
        return allowed.expand(len(rows), 1, rows.shape[1], n_keys)[:, 0]


class AtAttention(Exception):  # noqa: N818 - leaves the layer and is no error
    """Leaves a decoder layer at its attention, and carries all inputs of the attention.

    Attributes:
        module: The attention module.
        query: (1, heads, T, head_dim), rotary position applied.
        key: (1, kv_heads, T, head_dim); heads is a multiple of kv_heads (grouped-query attention).
        value: Values, of the same shape as ``key``.
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


# Samples that are computed together


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some tokens of each sample of a batch, as a rectangle padded with any tokens of the sample.

    Attributes:
        positions: (B, R) int64 positions in the sample.
        n: (B,) int64: number of valid positions of each sample; they come first, before the padding.
        counts: The same numbers on the host.
    """

    positions: torch.Tensor
    n: torch.Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, positions: Sequence[torch.Tensor], transfers: Transfers) -> "Rows":
        """Build the rows from each sample's positions, which are on the host."""
        counts = tuple(map(len, positions))
        filled = transfers.to_device(rectangle([one.numpy() for one in positions]))
        return cls(filled, transfers.to_device(torch.tensor(counts)), counts)


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Queries, keys and values of all tokens of a batch, with the samples end to end.

    Attributes:
        query: (T, heads, head_dim).
        key: (T, kv_heads, head_dim); heads is a multiple of kv_heads.
        value: Values, of the same shape as ``key``.
        scaling: Factor on the dot products.
        lengths: Number of tokens of each sample; they sum to T.
        starts: (B,) int64: where each sample begins.
        ends: (B,) int64: where each sample ends.
        transfers: Copies to and from the device that holds these tensors.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    lengths: tuple[int, ...]
    starts: torch.Tensor
    ends: torch.Tensor
    transfers: Transfers

    @classmethod
    def of(cls, at: AtAttention, lengths: Sequence[int], transfers: Transfers) -> "Heads":
        """Build the heads from the tensors with which a layer was left."""
        parts = [part[0].transpose(0, 1) for part in (at.query, at.key, at.value)]
        sizes = torch.tensor(lengths)
        ends = transfers.to_device(sizes.cumsum(0))
        return cls(
            parts[0],
            parts[1],
            parts[2],
            at.scaling,
            tuple(lengths),
            ends - transfers.to_device(sizes),
            ends,
            transfers,
        )

    @property
    def n_heads(self) -> int:
        """The number of query heads."""
        return self.query.shape[1]

    def rows(self, part: torch.Tensor, samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One part at (n, r) positions in ``samples``, as (n, heads, r, head_dim)."""
        return _taken(part, self.starts[samples, None] + positions)

    def beginnings(self, part: torch.Tensor, samples: torch.Tensor, length: int) -> torch.Tensor:
        """The beginning of one part, (n, heads, length, head_dim); short samples repeat their last token."""
        tokens = self.starts[samples, None] + torch.arange(length, device=part.device)
        return _taken(part, tokens.minimum(self.ends[samples, None] - 1))


def _taken(part: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    taken = part.index_select(0, tokens.flatten())
    return taken.reshape(*tokens.shape, *taken.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Block:
    """Samples that are computed together, and the range of their rows.

    Attributes:
        samples: Places in the batch.
        rows: The range of rows, the same for each sample.
        n_keys: Number of keys, counted from the beginning, that suffices for all samples.
    """

    samples: list[int]
    rows: slice
    n_keys: int


def _blocks(n_rows: Sequence[int], n_keys: Sequence[int], most: int) -> Iterator[_Block]:
    """Blocks of samples of similar sizes. A sample that is too large for one block is split into several.

    Args:
        n_rows: Number of rows of each sample.
        n_keys: Number of keys of each sample.
        most: Largest number of row-key pairs in a block.
    """
    together: list[int] = []
    rows = keys = needed = 0
    order = sorted(range(len(n_rows)), key=lambda place: (n_rows[place] * n_keys[place], n_keys[place]))
    for place in order:
        rows_then, keys_then = max(rows, n_rows[place]), max(keys, n_keys[place])
        needed_then = needed + n_rows[place] * n_keys[place]
        size = (len(together) + 1) * rows_then * keys_then
        if together and (size > most or size > _FILLED * needed_then):
            yield from _parts(together, rows, keys, most)
            together, needed_then = [], n_rows[place] * n_keys[place]
            rows_then, keys_then = n_rows[place], n_keys[place]
        together.append(place)
        rows, keys, needed = rows_then, keys_then, needed_then
    if together:
        yield from _parts(together, rows, keys, most)


def _parts(samples: list[int], n_rows: int, n_keys: int, most: int) -> Iterator[_Block]:
    step = max(1, most // (len(samples) * n_keys))
    for start in range(0, n_rows, step):
        yield _Block(samples, slice(start, min(start + step, n_rows)), n_keys)


def _most_pairs(heads: Heads) -> int:
    """The largest number of row-key pairs whose logits and mask fit a block's memory."""
    return max(1, min(_BLOCK_BYTES[heads.query.device.type] // (4 * heads.n_heads), _MASK_BYTES))


# The instruction's attention


def instruction_attention(heads: Heads, mask: RowMask, instruction: Rows, wanted: Rows) -> torch.Tensor:
    """Softmax attention averaged over heads and over the rows of the instruction, by sample.

    Args:
        heads: Queries, keys and values of all tokens.
        mask: The mask that says which keys each row may attend to.
        instruction: The instruction tokens; a sample without any pays no attention.
        wanted: The tokens whose attention is wanted.

    Returns:
        (B, W) float32: the mean attention that each wanted token receives; undefined for the padding of
        ``wanted``. Time per sample is O(heads · u · S · head_dim), and memory is O(S) plus a fixed block.
    """
    received = torch.zeros(wanted.positions.shape, dtype=torch.float32, device=heads.query.device)
    n_kv, head_dim = heads.key.shape[1:]
    for block in _blocks(instruction.counts, heads.lengths, _most_pairs(heads)):
        samples = heads.transfers.to_device(torch.tensor(block.samples))
        rows = instruction.positions[samples, block.rows]
        keys = heads.beginnings(heads.key, samples, block.n_keys)
        grouped = heads.rows(heads.query, samples, rows).reshape(len(samples), n_kv, -1, head_dim)
        logits = (grouped @ keys.transpose(2, 3)).float().mul_(heads.scaling)
        logits = logits.view(len(samples), heads.n_heads, -1, block.n_keys)
        allowed = mask.of(samples, rows, block.n_keys)
        if not mask.causal:  # under a causal mask, the sample's rows see no padding
            n_tokens = (heads.ends - heads.starts)[samples, None, None]
            allowed = allowed & (torch.arange(block.n_keys, device=rows.device) < n_tokens)
        shares = logits.masked_fill_(~allowed[:, None], -torch.inf).softmax(-1)
        numbers = torch.arange(block.rows.start, block.rows.stop, device=rows.device)
        n = instruction.n[samples, None]
        weights = (numbers < n).float() / (heads.n_heads * n.clamp(min=1))
        of_heads = weights[:, None].expand(-1, heads.n_heads, -1).flatten(1)[:, None]
        on_tokens = (of_heads @ shares.flatten(1, 2))[:, 0]
        places = wanted.positions[samples].clamp(max=block.n_keys - 1)
        received.index_add_(0, samples, on_tokens.gather(1, places))
    return received


# Attention output of the kept tokens


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The kept tokens of all samples of a batch, sample after sample and in token order.

    Attributes:
        rows: The kept tokens as a rectangle.
        samples: (M,) int64: the sample that each token belongs to.
        starts: (B,) int64: index of each sample's first kept token.
        numbers: (M,) int64: place of each token among its sample's kept tokens.
        positions: (M,) int64: position of each token in its sample.
    """

    rows: Rows
    samples: torch.Tensor
    starts: torch.Tensor
    numbers: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, rows: Rows) -> "Kept":
        """Build from the rectangle. The counts on the host make it unnecessary to wait for the device."""
        total, device = sum(rows.counts), rows.n.device
        samples = torch.repeat_interleave(rows.n, output_size=total)
        starts = rows.n.cumsum(0) - rows.n
        numbers = torch.arange(total, device=device) - starts[samples]
        return cls(rows, samples, starts, numbers, rows.positions[samples, numbers])


def attend(heads: Heads, mask: RowMask, kept: Kept, furthest: Sequence[int]) -> torch.Tensor:
    """The attention output of the kept tokens.

    Under a causal mask, the output is computed for all tokens up to the last vision token: one kernel without
    an explicit mask does that faster than a masked kernel computes the kept tokens alone.

    Args:
        heads: Queries, keys and values of all tokens.
        mask: The mask that says which keys each row may attend to.
        kept: The tokens.
        furthest: For each sample, a number of tokens from its beginning that includes all kept tokens.

    Returns:
        (M, heads · head_dim) in the dtype of the values. Memory is O(S + M) plus a fixed block.
    """
    if mask.causal:
        outputs, begins = _attend_from_the_beginning(heads, furthest)
        return outputs[begins[kept.samples] + kept.positions]
    outputs, begins = _attend_by_rows(heads, mask, kept.rows)
    return outputs[begins[kept.samples] + kept.numbers]


def _attend_from_the_beginning(heads: Heads, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output rows, and the index of each sample's first row."""
    outputs = _Outputs(len(lengths), heads.transfers)
    for block in _blocks(lengths, lengths, sum(lengths) ** 2):
        samples = heads.transfers.to_device(torch.tensor(block.samples))
        query, key, value = (
            heads.beginnings(part, samples, block.n_keys) for part in (heads.query, heads.key, heads.value)
        )
        key, value = _for_each_head(heads, key, value)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=heads.scaling)
        outputs.add(block.samples, attended)
    return outputs.joined()


def _attend_by_rows(heads: Heads, mask: RowMask, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of the given rows under any mask, and the index of each sample's first row."""
    outputs = _Outputs(len(rows.counts), heads.transfers)
    for block in _blocks(rows.counts, heads.lengths, _most_pairs(heads)):
        samples = heads.transfers.to_device(torch.tensor(block.samples))
        positions = rows.positions[samples, block.rows]
        query = heads.rows(heads.query, samples, positions)
        key, value = _for_each_head(
            heads, *(heads.beginnings(part, samples, block.n_keys) for part in (heads.key, heads.value))
        )
        n_tokens = (heads.ends - heads.starts)[samples, None, None]
        allowed = mask.of(samples, positions, block.n_keys)
        allowed = allowed & (torch.arange(block.n_keys, device=positions.device) < n_tokens)
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=allowed[:, None], scale=heads.scaling
        )
        outputs.add(block.samples, attended)
    return outputs.joined()


class _Outputs:
    """The attention outputs of blocks of samples, collected one after the other."""

    def __init__(self, n_samples: int, transfers: Transfers) -> None:
        self._parts: list[torch.Tensor] = []
        self._begins: list[int | None] = [None] * n_samples
        self._total, self._transfers = 0, transfers

    def add(self, samples: Sequence[int], attended: torch.Tensor) -> None:
        """Add output rows, (n, heads, r, head_dim). They follow any earlier rows of the same sample."""
        n_rows = attended.shape[2]
        for number, sample in enumerate(samples):
            if self._begins[sample] is None:
                self._begins[sample] = self._total + number * n_rows
        self._parts.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        self._total += len(samples) * n_rows

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows, (r, heads · head_dim), and the index of each sample's first row."""
        begins = torch.tensor([begin or 0 for begin in self._begins])
        return torch.cat(self._parts), self._transfers.to_device(begins)


def _for_each_head(heads: Heads, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values repeated for each query head, because not every kernel takes fewer heads."""
    times = heads.n_heads // heads.key.shape[1]
    return parts if times == 1 else tuple(part.repeat_interleave(times, 1) for part in parts)
