"""Samples of different lengths lose their filling, and nothing else is touched."""

import numpy as np
import torch

from scalselect_assets.method.representation.packing import Packing, rectangle
from scalselect_assets.method.transfers import Transfers

HERE = Transfers(torch.device("cpu"))
LENGTHS = [2, 4, 1]


def test_a_rectangle_is_filled_up_at_the_end() -> None:
    rows = [np.arange(1, length + 1, dtype=np.int32) for length in LENGTHS]
    filled = rectangle(rows, fill=7)
    assert filled.dtype == torch.int32
    assert filled.tolist() == [[1, 2, 7, 7], [1, 2, 3, 4], [1, 7, 7, 7]]


def test_samples_stand_end_to_end_without_their_filling() -> None:
    packing = Packing(LENGTHS, HERE)
    value = torch.arange(3 * 4 * 2).view(3, 4, 2)
    expected = torch.cat([value[place, :length] for place, length in enumerate(LENGTHS)])
    assert torch.equal(packing.packed(value), expected[None])
    several = torch.stack([value, -value])
    assert torch.equal(packing.packed(several), torch.stack([expected, -expected])[:, None])


def test_what_all_samples_share_is_repeated_for_each() -> None:
    shared = torch.arange(4 * 2).view(1, 4, 2)
    expected = torch.cat([shared[0, :length] for length in LENGTHS])
    assert torch.equal(Packing(LENGTHS, HERE).packed(shared), expected[None])


def test_pairs_are_packed_and_anything_else_stays_as_it_is() -> None:
    packing = Packing(LENGTHS, HERE)
    value = torch.zeros(3, 4, 2)
    first, second = packing.packed((value, value + 1))
    assert first.shape == second.shape == (1, sum(LENGTHS), 2)
    others = ("causal", None, torch.zeros(3, 4), torch.zeros(3, 5, 2), torch.zeros(2, 4, 2))
    for other in others:
        assert packing.packed(other) is other
