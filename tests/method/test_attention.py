"""The attention probe against plain softmax attention."""

import pytest
import torch

from scalselect_assets.method.attention import dominant_tokens, instruction_attention


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """(batch, heads, S, S) probabilities, the way eager attention computes them."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(2, 3) * scaling
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


def example(heads: int = 4, kv_heads: int = 2, length: int = 11) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, length, 8, generator=generator)
    key = torch.randn(3, kv_heads, length, 8, generator=generator)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(3, 1, length, length)
    instruction = torch.rand(3, length, generator=generator) > 0.5
    return query, key, causal, instruction


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block_bytes", [1, 4 * 4 * 11 * 2, 2**20])
def test_the_blocked_mean_equals_the_mean_of_plain_attention(kv_heads: int, block_bytes: int) -> None:
    query, key, causal, instruction = example(kv_heads=kv_heads)
    probabilities = plain_attention(query, key, causal, 0.3).mean(1)
    got = instruction_attention(
        query, key, None, instruction, scaling=0.3, causal=True, block_bytes=block_bytes
    )
    for sample in range(3):
        expected = probabilities[sample][instruction[sample]].mean(0)
        torch.testing.assert_close(got[sample], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_is_obeyed_whether_boolean_or_additive(additive: bool) -> None:
    query, key, causal, instruction = example()
    mask = causal.clone()
    mask[1, :, :, :4] = False  # left padding
    mask |= torch.eye(11, dtype=torch.bool)
    instruction[1, :4] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, -1e30) if additive else mask
    got = instruction_attention(query, key, given, instruction, scaling=0.3, causal=False)
    expected = plain_attention(query, key, mask, 0.3).mean(1)[1][instruction[1]].mean(0)
    torch.testing.assert_close(got[1], expected, atol=1e-6, rtol=1e-5)
    assert (got[1, :4] == 0).all()


def test_a_sample_without_instruction_tokens_gets_zeros() -> None:
    query, key, _, instruction = example()
    instruction[2] = False
    got = instruction_attention(query, key, None, instruction, scaling=0.3, causal=True)
    assert (got[2] == 0).all()
    assert got[0].sum() == pytest.approx(1.0)


def test_the_token_that_crosses_the_threshold_is_kept() -> None:
    assert dominant_tokens(torch.tensor([0.1, 0.5, 0.25, 0.15]), 0.7).tolist() == [1, 2]
    # A share that reaches the threshold without exceeding it does not end the choice.
    assert dominant_tokens(torch.tensor([0.25, 0.5, 0.25]), 0.75).tolist() == [1, 0, 2]


def test_only_shares_matter_and_ties_keep_token_order() -> None:
    attention = torch.tensor([2.0, 1.0, 2.0, 1.0])
    assert dominant_tokens(attention, 0.5).tolist() == dominant_tokens(attention / 7, 0.5).tolist() == [0, 2]


def test_attention_that_is_zero_everywhere_is_taken_as_uniform() -> None:
    assert dominant_tokens(torch.zeros(4), 0.6).tolist() == [0, 1, 2]


def test_a_threshold_of_one_keeps_every_token() -> None:
    assert sorted(dominant_tokens(torch.rand(50), 1.0).tolist()) == list(range(50))
