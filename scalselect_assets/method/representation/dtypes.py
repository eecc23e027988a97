"""The dtypes that a model can be computed in, and the choice of one for a checkpoint."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args

import torch

DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
DtypeChoice: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
"""``auto`` depends on the checkpoint and never on the machine: the dtype is part of a model's fingerprint."""

SELF_CHECK_TOLERANCE: Final[Mapping[DtypeName, float]] = MappingProxyType(
    {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.01}
)
"""The largest tolerated difference, as a share of a vector's largest component. In half precision, two ways
to compute the same vector differ by up to 0.4 % in bfloat16 and 0.03 % in float16 on the tested families."""


class DtypeError(ValueError):
    """The representation cannot be computed in the checkpoint's dtype."""


def automatic_dtype(own: torch.dtype) -> DtypeName:
    """The dtype to compute a checkpoint in if the user requests none.

    It is float32 for a checkpoint in float32 and bfloat16 for one in half precision. Float16 becomes
    bfloat16, too: outliers of hidden states overflow float16, and CPUs take many times as long for it as for
    float32.

    Args:
        own: The checkpoint's own dtype.

    Raises:
        DtypeError: The checkpoint's weights have another dtype.
    """
    if own in (torch.float32, torch.float64):
        return "float32"
    if own in (torch.bfloat16, torch.float16):
        return "bfloat16"
    raise DtypeError(
        f"its weights are {str(own).removeprefix('torch.')}, for which there is no automatic dtype; declare "
        f"dtype as one of {', '.join(get_args(DtypeName))}"
    )


def slow_here(dtype: DtypeName, device: torch.device) -> str | None:
    """A warning if a long run in ``dtype`` on ``device`` would be slow; None if no dtype is faster."""
    if device.type != "cpu" or dtype == "float32":
        return None
    how_slow = {
        "bfloat16": "without units for bfloat16 it takes longer than in float32",
        "float16": "there it takes many times as long as in float32",
    }[dtype]
    return (
        f"the model is computed in {dtype} on a CPU: {how_slow}. Where the whole pool is embedded on CPUs, "
        "declare dtype float32 (another dtype is another fingerprint, so that everything is embedded again)"
    )
