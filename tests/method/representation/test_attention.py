"""Attention by rows against plain softmax attention, and what it never allocates."""

from collections.abc import Callable
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
    RowMask,
    attend,
    dominant_tokens,
    instruction_attention,
    register_rows_attention,
)
from scalselect_assets.method.representation.families import UnsupportedModelError
from tests.method.memory import LargestTensor

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HEADS, LENGTH, HEAD_DIM, SAMPLES = 4, 23, 8, 3
SCALING = 0.7

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
    kv_heads: int, length: int = LENGTH, heads: int = HEADS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of one sample."""
    generator = torch.Generator().manual_seed(kv_heads)
    return (
        torch.randn(heads, length, HEAD_DIM, generator=generator),
        torch.randn(kv_heads, length, HEAD_DIM, generator=generator),
        torch.randn(kv_heads, length, HEAD_DIM, generator=generator),
    )


@cache
def allowed_pairs(mask: RowMask, sample: int) -> torch.Tensor:
    """(LENGTH, LENGTH) bool, asked of the mask's function pair by pair."""
    pairs = [
        bool(mask.allowed(torch.tensor(sample), torch.tensor(0), torch.tensor(row), torch.tensor(key)))
        for row in range(LENGTH)
        for key in range(LENGTH)
    ]
    return torch.tensor(pairs).view(LENGTH, LENGTH)


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
    monkeypatch.setattr(attention, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(attention, "_MASK_BYTES", mask_bytes)


# What a row may attend to


@pytest.mark.parametrize("sample", range(SAMPLES))
def test_a_mask_of_rows_is_what_its_function_says_pair_by_pair(mask: RowMask, sample: int) -> None:
    rows = torch.tensor([0, 22, 7, 16, 15])
    got = mask.of(sample, rows, LENGTH)
    assert got.dtype == torch.bool
    assert torch.equal(got, allowed_pairs(mask, sample)[rows])


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
        assert torch.equal(
            by_rows.of(sample, torch.arange(length), length), built[sample, 0, :length, :length]
        )


# Attention


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_instructions_attention_is_the_mean_of_plain_attention(mask: RowMask, kv_heads: int) -> None:
    query, key, _ = states(kv_heads)
    rows = torch.tensor([0, 3, 4, 9, 17, 18, 22])
    for sample in range(SAMPLES):
        got = instruction_attention(query, key, mask, sample, rows, SCALING)
        expected = probabilities(query, key, allowed_pairs(mask, sample))[:, rows].mean((0, 1))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        assert got.sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_attend_as_in_plain_attention(mask: RowMask, kv_heads: int) -> None:
    query, key, value = states(kv_heads)
    rows = torch.tensor([1, 2, 8, 13, 19, 21])
    each_head = value.repeat_interleave(HEADS // kv_heads, dim=0)
    for sample in range(SAMPLES):
        got = attend(query, key, value, mask, sample, rows, SCALING)
        heads = probabilities(query, key, allowed_pairs(mask, sample)) @ each_head
        # As a layer concatenates its heads for the output projection.
        torch.testing.assert_close(got, heads.transpose(0, 1).flatten(1)[rows], atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("blocks")
def test_rows_come_back_in_the_order_in_which_they_are_asked_for(mask: RowMask) -> None:
    query, key, value = states(2)
    rows = torch.tensor([5, 20, 1, 11])
    there = attend(query, key, value, mask, 0, rows, SCALING)
    back = attend(query, key, value, mask, 0, rows.flip(0), SCALING)
    torch.testing.assert_close(there, back.flip(0))


def test_without_rows_of_an_instruction_the_attention_is_zero(mask: RowMask) -> None:
    query, key, _ = states(2)
    got = instruction_attention(query, key, mask, 0, torch.tensor([], dtype=torch.int64), SCALING)
    assert torch.equal(got, torch.zeros(LENGTH))


def test_half_precision_is_summed_in_single_precision() -> None:
    query, key, value = (part.to(torch.bfloat16) for part in states(2))
    rows = torch.arange(LENGTH)
    mask = MASKS["causal"]
    attention_received = instruction_attention(query, key, mask, 0, rows, SCALING)
    assert attention_received.dtype == torch.float32
    assert attention_received.sum() == pytest.approx(1.0, abs=1e-5)
    assert attend(query, key, value, mask, 0, rows, SCALING).dtype == torch.bfloat16


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
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 2**20)
    monkeypatch.setattr(attention, "_MASK_BYTES", 2**18)

    def largest(length: int) -> int:
        query, key, value = states(2, length)
        rows = torch.arange(length)
        with LargestTensor() as seen:
            if of == "attend":
                attend(query, key, value, long_mask, 0, rows, SCALING)
            else:
                instruction_attention(query, key, long_mask, 0, rows, SCALING)
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


# Dominant tokens


def test_the_token_that_crosses_the_threshold_is_kept() -> None:
    assert dominant_tokens(torch.tensor([0.1, 0.5, 0.25, 0.15]), 0.7).tolist() == [1, 2]
    # A share that reaches the threshold without exceeding it does not end the choice.
    assert dominant_tokens(torch.tensor([0.25, 0.5, 0.25]), 0.75).tolist() == [1, 0, 2]


def test_only_shares_matter_and_ties_keep_token_order() -> None:
    shares = torch.tensor([2.0, 1.0, 2.0, 1.0])
    assert dominant_tokens(shares, 0.5).tolist() == dominant_tokens(shares / 7, 0.5).tolist() == [0, 2]


def test_attention_that_is_zero_everywhere_is_taken_as_uniform() -> None:
    assert dominant_tokens(torch.zeros(4), 0.6).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_a_threshold_of_one_keeps_every_token_also_those_without_attention(seed: int) -> None:
    """Rounded, the sum of the others' shares is above one for some of the seeds."""
    attention = torch.rand(50, generator=torch.Generator().manual_seed(seed))
    attention[[3, 30]] = 0.0
    assert sorted(dominant_tokens(attention, 1.0).tolist()) == list(range(50))
