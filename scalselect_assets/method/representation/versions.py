"""The oldest versions of the libraries that the representation depends on."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Final

OLDEST: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {"transformers": (5, 23), "torch": (2, 6), "tokenizers": (0, 22)}
)
"""The same versions as in `pyproject.toml`. A machine with only torch and Transformers
did not install from that file."""


def outdated_library() -> str | None:
    """A message that names a library that is too old and the version to install; None if there is none."""
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
