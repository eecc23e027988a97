"""The fewest tokens whose share exceeds the threshold are kept, in one sample as in many."""

import pytest
import torch

from scalselect_assets.method.representation.dominance import dominant, dominant_tokens


def test_the_token_that_crosses_the_threshold_is_kept() -> None:
    assert dominant_tokens(torch.tensor([0.1, 0.5, 0.25, 0.15]), 0.7).tolist() == [1, 2]
    # A share that reaches the threshold without exceeding it does not end the choice.
    assert dominant_tokens(torch.tensor([0.25, 0.5, 0.25]), 0.75).tolist() == [1, 0, 2]


def test_samples_are_judged_together_as_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    n = torch.tensor([12, 1, 7, 5, 9])
    received = torch.rand(5, 12, generator=generator) ** 4
    received[3] = 0
    received[4, ::2] = received[4, 0].clone()  # ties
    for mass in (0.3, 0.9, 1.0):
        together = dominant(received.masked_fill(torch.arange(12) >= n[:, None], torch.nan), n, mass)
        for row, (places, kept) in enumerate(zip(together.places, together.n, strict=True)):
            alone = dominant_tokens(received[row, : n[row]], mass)
            assert places[:kept].tolist() == alone.tolist()


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
