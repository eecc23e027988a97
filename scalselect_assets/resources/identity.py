"""One way to hash what identifies things, so that equal inputs give equal versions everywhere."""

import hashlib
import json
from typing import Any


def digest(*parts: Any) -> str:
    """SHA-256 of the canonical JSON of ``parts``, as 32 hexadecimal digits.

    Raises:
        TypeError: A part is not made of JSON values.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
