"""The choice of torch's kernels: only kernels that take a new shape at no extra cost are used.

No two samples of a real pool have the same shape, so a kernel that plans or tunes itself for each new shape
does so for each sample. cuDNN's attention, which torch prefers on a Hopper GPU, builds an execution plan for
each shape. That takes 72 ms, and the whole sample takes less than 1 ms.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_ATTENTION: Final = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@contextmanager
def without_costs_per_shape() -> Iterator[None]:
    """Within the block, torch computes attention without cuDNN and does not benchmark convolutions.

    Both are settings of the whole process; they are restored at the end of the block.
    """
    tries_convolutions = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with sdpa_kernel(list(_ATTENTION)):
            yield
    finally:
        torch.backends.cudnn.benchmark = tries_convolutions
