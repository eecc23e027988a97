"""Text from data, made safe for a terminal, a log or a message: it has no active characters and no secrets.

File names, ids and answers come from others. A terminal obeys escape sequences in them, a reader is misled
by characters that turn the direction of writing, and a URI may carry a password.
"""

import re
import unicodedata

_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s'\"]*@|[^/@\s'\"]*:(?!\d*(?:[/\s'\"]|$))[^@\s'\"]*@)")
_ACTS = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, line and paragraph separators
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_QUIET = re.compile(r"[\x20-\x7e\n]*")


def shown(text: str) -> str:
    """Text with every active character written as its escape, and credentials masked; new lines stay."""
    text = masked(text)
    if _QUIET.fullmatch(text):
        return text
    return "".join(_escaped(character) if _acts(character) else character for character in text)


def masked(text: str) -> str:
    """Text in which URIs hold no user name and no password."""
    return _CREDENTIALS.sub("***@", text)


def has_credentials(uri: str) -> bool:
    """Whether a URI names a user or a password."""
    return _CREDENTIALS.search(uri) is not None


def json_shown(text: str) -> str:
    """A JSON text in which every active character is written as JSON's own escape."""
    if _QUIET.fullmatch(text):
        return text
    return "".join(f"\\u{ord(one):04x}" if _acts(one) and one != "\n" else one for one in text)


def _acts(character: str) -> bool:
    return character != "\n" and (character in _TURNS or unicodedata.category(character) in _ACTS)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
