"""Attention by rows: what the instruction pays to the image, and what only the wanted tokens read.

Transformers hands a decoder layer's own queries, keys, values, mask and scaling to a registered attention
function. Ours takes them out (``AtAttention``) and leaves the layer there: ``method.first_layer`` goes on
with the few rows that the method needs.

The samples of a batch are computed together: those of like sizes are filled up to the largest of them, so
that the number of kernels depends on how many sizes there are and hardly on how many samples. Masks stay
functions of positions and are only ever evaluated for a block of rows, so that nothing of size S × S exists,
let alone heads × S × S.
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

_BLOCK_BYTES = {  # of the softmax rows that are held at once
    "cpu": 2 * 2**20,  # fits its caches, which saves more than fewer calls do
    "cuda": 256 * 2**20,  # some dozens of samples a kernel, and small against any model that fits the device
}
_MASK_BYTES = 16 * 2**20  # of a block's mask, one byte a position
_FILLED = 2.0  # a block is at most so many times as large as its samples


@dataclass(frozen=True, slots=True, eq=False)
class RowMask:
    """An attention mask as the function that defines it, evaluated for the rows that are asked for.

    Attributes:
        allowed: Transformers' mask function: (batch, head, query, key) index tensors that broadcast → bool.
        causal: The function is plain causality: no token sees a later one, all see the earlier ones.
    """

    allowed: Callable[..., torch.Tensor]
    causal: bool

    def of(self, samples: torch.Tensor, rows: torch.Tensor, n_keys: int) -> torch.Tensor:
        """The mask of some rows of some samples.

        Args:
            samples: (n,) int64 places in the batch that the mask was made for.
            rows: (n, r) int64 positions in the sample.
            n_keys: Keys from the sample's beginning.

        Returns:
            (n, r, n_keys) bool, true where a row may attend.
        """
        keys = torch.arange(n_keys, device=rows.device)
        if self.causal:
            return keys <= rows[..., None]
        batch = samples[:, None, None, None]
        allowed = self.allowed(batch, torch.zeros_like(batch), rows[:, None, :, None], keys[None, None, None])
        return allowed.expand(len(rows), 1, rows.shape[1], n_keys)[:, 0]


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


# What is computed together


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some tokens of each sample of a batch, as a rectangle that any tokens of the sample fill up.

    Attributes:
        positions: (B, R) int64 positions in the sample.
        n: (B,) int64: how many of a sample's positions are meant, which are the first ones.
        counts: The same on the host.
    """

    positions: torch.Tensor
    n: torch.Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, positions: Sequence[torch.Tensor], transfers: Transfers) -> "Rows":
        """From each sample's positions, on the host."""
        counts = tuple(map(len, positions))
        filled = transfers.to_device(rectangle([one.numpy() for one in positions]))
        return cls(filled, transfers.to_device(torch.tensor(counts)), counts)


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Queries, keys and values of the samples of a batch, end to end.

    Attributes:
        query: (T, heads, head_dim).
        key: (T, kv_heads, head_dim); heads is a multiple of kv_heads.
        value: As ``key``.
        scaling: Factor on the dot products.
        lengths: Tokens by sample, summing to T.
        starts: (B,) int64: where each sample begins.
        ends: (B,) int64: where each sample ends.
        transfers: To where all that is.
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
        """What a layer was left with."""
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
        """Heads of the queries."""
        return self.query.shape[1]

    def rows(self, part: torch.Tensor, samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(n, heads, r, head_dim) of one part, at (n, r) positions in ``samples``."""
        return _taken(part, self.starts[samples, None] + positions)

    def beginnings(self, part: torch.Tensor, samples: torch.Tensor, length: int) -> torch.Tensor:
        """(n, heads, length, head_dim) of one part; a shorter sample is filled up with its last token."""
        tokens = self.starts[samples, None] + torch.arange(length, device=part.device)
        return _taken(part, tokens.minimum(self.ends[samples, None] - 1))


def _taken(part: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    taken = part.index_select(0, tokens.flatten())
    return taken.reshape(*tokens.shape, *taken.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Block:
    """Samples that are computed together, and those of their rows that are.

    Attributes:
        samples: Places in the batch.
        rows: The same for each sample.
        n_keys: Keys from the beginning that suffice for all.
    """

    samples: list[int]
    rows: slice
    n_keys: int


def _blocks(n_rows: Sequence[int], n_keys: Sequence[int], most: int) -> Iterator[_Block]:
    """Samples of like sizes together, and a sample that is too large by itself in parts.

    Args:
        n_rows: By sample.
        n_keys: By sample.
        most: Pairs of a row and a key in a block.
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
    """Pairs of a row and a key in a block whose logits and mask are held."""
    return max(1, min(_BLOCK_BYTES[heads.query.device.type] // (4 * heads.n_heads), _MASK_BYTES))


# The instruction's attention


def instruction_attention(heads: Heads, mask: RowMask, instruction: Rows, wanted: Rows) -> torch.Tensor:
    """Softmax attention averaged over heads and over the rows of the instruction, by sample.

    Args:
        heads: Of all tokens.
        mask: What each row may attend to.
        instruction: The rows; a sample without any pays no attention.
        wanted: The tokens whose attention is wanted.

    Returns:
        (B, W) float32: per wanted token the mean attention that it receives; undefined where ``wanted`` is
        filled up. Time O(heads · u · S · head_dim) a sample, memory O(S) and a fixed block.
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
        if not mask.causal:  # a causal row of the sample sees nothing that is filled up
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


# What the kept tokens read


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The tokens that are kept, of all samples of a batch one after the other, in token order.

    Attributes:
        rows: The same as a rectangle.
        samples: (M,) int64: whose they are.
        starts: (B,) int64: where each sample's begin.
        numbers: (M,) int64: their places among the sample's kept tokens.
        positions: (M,) int64: their positions in the sample.
    """

    rows: Rows
    samples: torch.Tensor
    starts: torch.Tensor
    numbers: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, rows: Rows) -> "Kept":
        """From the rectangle; the host's counts spare it to wait for the device's."""
        total, device = sum(rows.counts), rows.n.device
        samples = torch.repeat_interleave(rows.n, output_size=total)
        starts = rows.n.cumsum(0) - rows.n
        numbers = torch.arange(total, device=device) - starts[samples]
        return cls(rows, samples, starts, numbers, rows.positions[samples, numbers])


def attend(heads: Heads, mask: RowMask, kept: Kept, furthest: Sequence[int]) -> torch.Tensor:
    """The attention output of the kept tokens.

    Under a causal mask all tokens up to the last one of vision attend, which one kernel without a mask does
    faster than a masked one does the kept tokens alone.

    Args:
        heads: Of all tokens.
        mask: What each row may attend to.
        kept: The tokens.
        furthest: By sample, a number of tokens from the beginning that holds all kept ones.

    Returns:
        (M, heads · head_dim) in the dtype of the values. Memory O(S + M) and a fixed block.
    """
    if mask.causal:
        outputs, begins = _attend_from_the_beginning(heads, furthest)
        return outputs[begins[kept.samples] + kept.positions]
    outputs, begins = _attend_by_rows(heads, mask, kept.rows)
    return outputs[begins[kept.samples] + kept.numbers]


def _attend_from_the_beginning(heads: Heads, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of output, and where those of each sample begin."""
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
    """Rows of output for any mask, of the given rows alone, and where those of each sample begin."""
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
    """Attention outputs of blocks of samples, one after the other."""

    def __init__(self, n_samples: int, transfers: Transfers) -> None:
        self._parts: list[torch.Tensor] = []
        self._begins: list[int | None] = [None] * n_samples
        self._total, self._transfers = 0, transfers

    def add(self, samples: Sequence[int], attended: torch.Tensor) -> None:
        """Rows of output, (n, heads, r, head_dim); those of a sample that has some already follow them."""
        n_rows = attended.shape[2]
        for number, sample in enumerate(samples):
            if self._begins[sample] is None:
                self._begins[sample] = self._total + number * n_rows
        self._parts.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        self._total += len(samples) * n_rows

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows, (r, heads · head_dim), and where those of each sample begin."""
        begins = torch.tensor([begin or 0 for begin in self._begins])
        return torch.cat(self._parts), self._transfers.to_device(begins)


def _for_each_head(heads: Heads, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values by head of the queries: not every kernel takes fewer."""
    times = heads.n_heads // heads.key.shape[1]
    return parts if times == 1 else tuple(part.repeat_interleave(times, 1) for part in parts)
