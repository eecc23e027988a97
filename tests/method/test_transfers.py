"""What passes to a device and back is what was sent, whenever the host looks at it."""

import numpy as np
import pytest
import torch

from scalselect_assets.method.transfers import Transfers

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
]


@pytest.fixture(params=DEVICES)
def transfers(request: pytest.FixtureRequest) -> Transfers:
    return Transfers(torch.device(request.param))


def test_values_come_back_as_they_went(transfers: Transfers) -> None:
    sent = [
        torch.arange(100_000.0),
        torch.tensor([3, 4]),
        torch.zeros(0),
        torch.ones(2, 3, dtype=torch.uint8),
    ]
    there = [transfers.to_device(value) for value in sent]
    assert {value.device.type for value in there} == {transfers.device.type}
    back = transfers.to_host([value * 2 for value in there])
    del there
    for value, found in zip(sent, back(), strict=True):
        assert found.device.type == "cpu"
        assert torch.equal(found, value * 2)


def test_a_buffer_that_is_filled_passes_as_well(transfers: Transfers) -> None:
    buffer = transfers.empty(2, 3, dtype=torch.int64)
    assert buffer.device.type == "cpu"
    assert buffer.is_pinned() == (transfers.device.type == "cuda")
    buffer.fill_(5)
    assert transfers.to_device(buffer).cpu().tolist() == [[5] * 3] * 2


@pytest.mark.parametrize("n_rows", [0, 1, 5, 4_001])
@pytest.mark.parametrize(
    ("own", "wanted"), [("float16", "float32"), ("float32", "float32"), ("int64", "float64")]
)
def test_an_array_is_copied_whole_and_as_other_numbers(
    n_rows: int, own: str, wanted: str, transfers: Transfers
) -> None:
    x = np.random.default_rng(0).integers(-1000, 1000, (n_rows, 300)).astype(own)
    x.setflags(write=False)  # as what comes from a table is
    copy = transfers.copied(x, wanted)
    assert copy.dtype == getattr(torch, wanted)
    np.testing.assert_array_equal(copy.numpy(), x)
