"""Which of torch's kernels compute the representation: only such as take any shape at no further cost.

No two samples of a real pool have the same shape, so a kernel that is planned or tuned for each new shape is
planned for each sample. cuDNN's attention, which torch prefers on a Hopper GPU, builds an execution plan for
each shape: 72 ms, where the whole sample takes less than one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_ATTENTION: Final = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@contextmanager
def without_costs_per_shape() -> Iterator[None]:
    """Within, torch attends without cuDNN and tries out no convolutions.

    These are settings of the process; they are as before afterwards.
    """
    tries_convolutions = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with sdpa_kernel(list(_ATTENTION)):
            yield
    finally:
        torch.backends.cudnn.benchmark = tries_convolutions
