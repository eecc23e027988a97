"""Attention by rows against plain softmax attention, and what it never allocates."""

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    sliding_window_causal_mask_function,
)

from scalselect_assets.method.representation import attention
from scalselect_assets.method.representation.attention import (
    ROWS_ATTENTION,
    AtAttention,
    Heads,
    Kept,
    RowMask,
    Rows,
    attend,
    instruction_attention,
    register_rows_attention,
)
from scalselect_assets.method.representation.families import UnsupportedModelError
from scalselect_assets.method.transfers import Transfers
from tests.method.memory import LargestTensor

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HEADS, LENGTH, HEAD_DIM, SAMPLES = 4, 23, 8, 3
SCALING = 0.7
LENGTHS = (LENGTH, 20, 9)  # of the samples
HERE = Transfers(torch.device("cpu"))

# Of three samples: text is -1, every image a number of its own; no two samples are alike.
BLOCKS = torch.full((SAMPLES, LENGTH), -1)
BLOCKS[0, 2:6] = 0
BLOCKS[1, 1:9], BLOCKS[1, 12:20] = 0, 1
BLOCKS[2, 15:] = 0

MASKS: dict[str, RowMask] = {
    "causal": RowMask(causal_mask_function, causal=True),
    "causal, by the function": RowMask(causal_mask_function, causal=False),
    "sliding window": RowMask(sliding_window_causal_mask_function(5), causal=False),
    "bidirectional": RowMask(bidirectional_mask_function, causal=False),
    "causal with bidirectional images": RowMask(
        or_masks(causal_mask_function, blockwise_overlay(BLOCKS)), causal=False
    ),
    "sliding window with bidirectional images": RowMask(
        or_masks(sliding_window_causal_mask_function(5), blockwise_overlay(BLOCKS)), causal=False
    ),
    "causal within a window that is a mask of its own": RowMask(
        and_masks(causal_mask_function, lambda _batch, _head, row, key: key > row - 7), causal=False
    ),
}


@pytest.fixture(params=MASKS)
def mask(request: pytest.FixtureRequest) -> RowMask:
    return MASKS[request.param]


def states(
    kv_heads: int, length: int = LENGTH, heads: int = HEADS, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of one sample."""
    generator = torch.Generator().manual_seed(10 * kv_heads + seed)
    return (
        torch.randn(heads, length, HEAD_DIM, generator=generator),
        torch.randn(kv_heads, length, HEAD_DIM, generator=generator),
        torch.randn(kv_heads, length, HEAD_DIM, generator=generator),
    )


def samples_of(
    kv_heads: int, lengths: Sequence[int] = LENGTHS
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Query, key and value of several samples."""
    return [states(kv_heads, length, seed=seed) for seed, length in enumerate(lengths)]


def end_to_end(samples: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Heads:
    """As a layer is left with them."""
    query, key, value = (torch.cat(parts, dim=1)[None] for parts in zip(*samples, strict=True))
    at = AtAttention(torch.nn.Identity(), query, key, value, SCALING)
    return Heads.of(at, [one[0].shape[1] for one in samples], HERE)


def rows_of(positions: Sequence[Sequence[int]]) -> Rows:
    return Rows.of([torch.tensor(one, dtype=torch.int64) for one in positions], HERE)


def all_tokens(lengths: Sequence[int]) -> Rows:
    return rows_of([range(length) for length in lengths])


@cache
def allowed_pairs(mask: RowMask, sample: int, length: int = LENGTH) -> torch.Tensor:
    """(length, length) bool, asked of the mask's function pair by pair."""
    pairs = [
        bool(mask.allowed(torch.tensor(sample), torch.tensor(0), torch.tensor(row), torch.tensor(key)))
        for row in range(length)
        for key in range(length)
    ]
    return torch.tensor(pairs).view(length, length)


def probabilities(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """(heads, S, S), as eager attention computes them."""
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits = query @ key.transpose(1, 2) * SCALING
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1)


@pytest.fixture(params=["one row at a time", "a few rows at a time", "all rows at once"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows are held at once."""
    block_bytes, mask_bytes = {
        "one row at a time": (1, 1),
        "a few rows at a time": (4 * HEADS * LENGTH * 3, LENGTH * 3),
        "all rows at once": (2**30, 2**30),
    }[request.param]
    monkeypatch.setattr(attention, "_BLOCK_BYTES", {"cpu": block_bytes})
    monkeypatch.setattr(attention, "_MASK_BYTES", mask_bytes)


# What a row may attend to


def test_a_mask_of_rows_is_what_its_function_says_pair_by_pair(mask: RowMask) -> None:
    samples = torch.tensor([2, 0, 1])
    rows = torch.tensor([[0, 22, 7], [16, 15, 0], [3, 3, 12]])
    got = mask.of(samples, rows, LENGTH)
    assert got.dtype == torch.bool
    for sample, own, allowed in zip(samples.tolist(), rows, got, strict=True):
        assert torch.equal(allowed, allowed_pairs(mask, sample)[own])


def test_the_masks_here_differ_from_each_other_and_between_samples() -> None:
    """Otherwise the tests above and below would hold for a mask that is ignored."""
    pairs = {name: allowed_pairs(mask, 1) for name, mask in MASKS.items() if "by the function" not in name}
    assert len({tuple(allowed.flatten().tolist()) for allowed in pairs.values()}) == len(pairs)
    images = MASKS["causal with bidirectional images"]
    assert not torch.equal(allowed_pairs(images, 0), allowed_pairs(images, 1))


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
@pytest.mark.parametrize("blocks_of", [None, BLOCKS], ids=["text", "images"])
def test_the_mask_that_transformers_hands_over_is_the_one_that_it_would_build(
    create: Callable[..., Any], blocks_of: torch.Tensor | None
) -> None:
    def made_for(implementation: str) -> Any:
        config = LlamaConfig(sliding_window=5, attn_implementation=implementation)
        embeddings = torch.zeros(SAMPLES, LENGTH, 8)
        real = torch.ones(SAMPLES, LENGTH, dtype=torch.int64)
        real[0, -4:] = 0  # padding, on the right
        more = {} if blocks_of is None else {"block_sequence_ids": blocks_of}
        return create(config, embeddings, real, past_key_values=None, **more)

    by_rows, built = made_for(register_rows_attention()), made_for("eager") == 0
    assert isinstance(by_rows, RowMask)
    assert by_rows.causal == (create is create_causal_mask and blocks_of is None)
    for sample, length in enumerate((LENGTH - 4, LENGTH, LENGTH)):
        (allowed,) = by_rows.of(torch.tensor([sample]), torch.arange(length)[None], length)
        assert torch.equal(allowed, built[sample, 0, :length, :length])


# Attention


INSTRUCTION = ((0, 3, 4, 9, 17, 18, 22), (19,), (0, 1, 2, 3, 4, 5, 6, 7, 8))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_instructions_attention_is_the_mean_of_plain_attention(mask: RowMask, kv_heads: int) -> None:
    samples = samples_of(kv_heads)
    got = instruction_attention(
        end_to_end(samples), mask, rows_of(INSTRUCTION), rows_of([range(length) for length in LENGTHS])
    )
    assert got.dtype == torch.float32
    for sample, ((query, key, _), rows, length) in enumerate(zip(samples, INSTRUCTION, LENGTHS, strict=True)):
        plain = probabilities(query, key, allowed_pairs(mask, sample, length))
        expected = plain[:, list(rows)].mean((0, 1))
        torch.testing.assert_close(got[sample, :length], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("blocks")
def test_the_attention_on_the_wanted_tokens_comes_in_their_order(mask: RowMask) -> None:
    heads, wanted = end_to_end(samples_of(2)), [(5, 2, 22), (0,), (8, 3)]
    on_all = instruction_attention(heads, mask, rows_of(INSTRUCTION), all_tokens(LENGTHS))
    got = instruction_attention(heads, mask, rows_of(INSTRUCTION), rows_of(wanted))
    for sample, tokens in enumerate(wanted):
        torch.testing.assert_close(got[sample, : len(tokens)], on_all[sample, list(tokens)])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_kept_tokens_attend_as_in_plain_attention(mask: RowMask, kv_heads: int) -> None:
    samples, kept = samples_of(kv_heads), [(1, 2, 8, 13, 19, 21), (0, 4, 19), (8,)]
    got = attend(end_to_end(samples), mask, Kept.of(rows_of(kept)), [22, 20, 9])
    expected = []
    for sample, ((query, key, value), rows, length) in enumerate(zip(samples, kept, LENGTHS, strict=True)):
        each_head = value.repeat_interleave(HEADS // kv_heads, dim=0)
        heads = probabilities(query, key, allowed_pairs(mask, sample, length)) @ each_head
        # As a layer concatenates its heads for the output projection.
        expected.append(heads.transpose(0, 1).flatten(1)[list(rows)])
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-6, rtol=1e-5)


def test_without_rows_of_an_instruction_the_attention_is_zero(mask: RowMask) -> None:
    samples = samples_of(2)
    none = rows_of([(), (), ()])
    assert torch.equal(
        instruction_attention(end_to_end(samples), mask, none, all_tokens(LENGTHS)),
        torch.zeros(SAMPLES, LENGTH),
    )
    some = instruction_attention(end_to_end(samples), mask, rows_of([(3,), (), (4, 5)]), all_tokens(LENGTHS))
    assert torch.equal(some[1], torch.zeros(LENGTH))
    assert some[0].sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("bad", range(SAMPLES))
def test_a_sample_that_is_not_finite_does_not_touch_the_others(mask: RowMask, bad: int) -> None:
    samples = samples_of(2)
    kept = rows_of([(1, 8), (0, 19), (3, 8)])
    before = (
        instruction_attention(end_to_end(samples), mask, rows_of(INSTRUCTION), all_tokens(LENGTHS)),
        attend(end_to_end(samples), mask, Kept.of(kept), LENGTHS).view(SAMPLES, 2, -1),
    )
    samples[bad] = tuple(torch.full_like(part, torch.nan) for part in samples[bad])  # type: ignore[call-overload]
    after = (
        instruction_attention(end_to_end(samples), mask, rows_of(INSTRUCTION), all_tokens(LENGTHS)),
        attend(end_to_end(samples), mask, Kept.of(kept), LENGTHS).view(SAMPLES, 2, -1),
    )
    for clean, touched in zip(before, after, strict=True):
        assert touched[bad].isnan().any()
        for sample in {*range(SAMPLES)} - {bad}:
            torch.testing.assert_close(touched[sample], clean[sample], atol=1e-6, rtol=1e-5)


def test_half_precision_is_summed_in_single_precision() -> None:
    samples = [tuple(part.to(torch.bfloat16) for part in states(2))]
    heads, rows, mask = end_to_end(samples), all_tokens([LENGTH]), MASKS["causal"]  # type: ignore[arg-type]
    attention_received = instruction_attention(heads, mask, rows, rows)
    assert attention_received.dtype == torch.float32
    assert attention_received.sum() == pytest.approx(1.0, abs=1e-5)
    assert attend(heads, mask, Kept.of(rows), [LENGTH]).dtype == torch.bfloat16


# What is computed together


SIZES = [(7, 23), (1, 20), (9, 9), (0, 12), (8, 21), (300, 900), (7, 22), (1, 1), (310, 905), (0, 1)]


@pytest.mark.parametrize("most", [1, 50, 700, 10**6])
def test_every_row_of_every_sample_is_in_one_block_and_no_block_is_mostly_filling(most: int) -> None:
    n_rows, n_keys = zip(*SIZES, strict=True)
    blocks = list(attention._blocks(n_rows, n_keys, most))
    rows = sorted(
        (sample, row) for block in blocks for sample in block.samples for row in range(1000)[block.rows]
    )
    wanted = sorted((sample, row) for sample, n in enumerate(n_rows) for row in range(n))
    assert [one for one in rows if one[1] < n_rows[one[0]]] == wanted
    for block in blocks:
        n = block.rows.stop - block.rows.start
        assert block.n_keys >= max(n_keys[sample] for sample in block.samples)
        if len(block.samples) > 1:
            assert len(block.samples) * n * block.n_keys <= most
            needed = sum(n_rows[sample] * n_keys[sample] for sample in block.samples)
            assert len(block.samples) * n * block.n_keys <= 2 * needed
        else:
            assert n == 1 or n * block.n_keys <= most


def test_samples_of_like_sizes_share_a_block_however_many_they_are() -> None:
    def n_blocks(times: int) -> int:
        n_rows, n_keys = zip(*(SIZES * times), strict=True)
        return len(list(attention._blocks(n_rows, n_keys, 10**9)))

    assert n_blocks(50) == n_blocks(100) <= len(set(SIZES))


# Memory


@pytest.mark.parametrize(
    "long_mask",
    [MASKS["causal"], MASKS["sliding window"], MASKS["bidirectional"]],
    ids=["causal", "sliding window", "bidirectional"],
)
@pytest.mark.parametrize("of", ["instruction_attention", "attend"])
def test_memory_grows_with_the_length_and_not_with_its_square(
    of: str, long_mask: RowMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(attention, "_MASK_BYTES", 2**18)

    def largest(length: int) -> int:
        heads, rows = end_to_end([states(2, length)]), all_tokens([length])
        with LargestTensor() as seen:
            if of == "attend":
                attend(heads, long_mask, Kept.of(rows), [length])
            else:
                instruction_attention(heads, long_mask, rows, rows)
        return seen.bytes

    short, long = largest(2048), largest(4096)
    assert short < 2048 * 2048  # one byte for every pair of tokens, in one head
    assert long <= 2 * short


def test_the_memory_test_sees_what_plain_attention_allocates() -> None:
    query, key, _ = states(2)
    with LargestTensor() as seen:
        probabilities(query, key, allowed_pairs(MASKS["causal"], 0))
    assert seen.bytes >= 4 * HEADS * LENGTH * LENGTH


# Leaving a layer


def test_the_registered_attention_leaves_the_layer_with_what_it_was_given() -> None:
    from transformers import AttentionInterface

    module = torch.nn.Linear(1, 1)
    query, key, value = (part[None] for part in states(2))
    with pytest.raises(AtAttention) as left:
        AttentionInterface()[register_rows_attention()](module, query, key, value, None, scaling=SCALING)
    at = left.value
    assert (at.module, at.query, at.key, at.value, at.scaling) == (module, query, key, value, SCALING)
    with pytest.raises(AtAttention) as left:
        AttentionInterface()[ROWS_ATTENTION](module, query, key, value, None)
    assert left.value.scaling == HEAD_DIM**-0.5


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_with_more_to_it_than_softmax_is_refused(name: str) -> None:
    query, key, value = (part[None] for part in states(2))
    module: Any = SimpleNamespace()
    with pytest.raises(UnsupportedModelError, match=f"'{name}', which is not supported"):
        attention._stop_at_attention(module, query, key, value, None, **{name: 50.0})
    with pytest.raises(AtAttention):
        attention._stop_at_attention(module, query, key, value, None, **{name: None})
