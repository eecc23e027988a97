"""The oldest versions of the libraries whose own code the representation runs."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Final

OLDEST: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {"transformers": (5, 23), "torch": (2, 6), "tokenizers": (0, 22)}
)
"""As `pyproject.toml` has them; a machine with nothing but torch and Transformers has not installed by it."""


def outdated_library() -> str | None:
    """Which library is too old and what to install; None where all will do."""
    for name, oldest in OLDEST.items():
        installed = version(name)
        release = tuple(int(part) for part in re.findall(r"\d+", installed)[: len(oldest)])
        if release < oldest:
            wanted = ".".join(map(str, oldest))
            return (
                f"{name} {installed} is installed, which is too old: {wanted} or newer is needed; install it "
                f"with: pip install -U '{name}>={wanted}'"
            )
    return None
