"""Descriptions of bytes that are not an image although one is expected, with a remedy."""

import re

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the image: the repository was cloned without its large files; run `git lfs "
        "pull` in it",
    ),
    (b"%PDF-", "a PDF document; render its pages to PNG"),
    (b"%!PS", "a PostScript document, not an image of a known format; render it to PNG"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"\x1f\x8b", "gzip-compressed data; unpack it"),
)
_SVG = re.compile(rb"<svg[\s>]", re.IGNORECASE)
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE)


def describe(data: bytes) -> str:
    """A description of bytes that Pillow does not recognise, with a remedy if there is one."""
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    signed = (what for start, what in _SIGNATURES if head.startswith(start))
    found = _container(data) or _markup(head) or next(signed, None)
    return found or f"not an image of a known format; it starts with {data[:8]!r}"


def _container(data: bytes) -> str | None:
    if not data:
        return "an empty file; copy or download the image again"
    if data[4:8] != b"ftyp" or data[8:12] in (b"avif", b"avis"):
        return None
    if data[8:12] in _HEIF_BRANDS:
        return "a HEIC image, which Pillow does not read by itself; convert it to JPEG or PNG"
    return "a video file; take its frames as images"


def _markup(head: bytes) -> str | None:
    if _SVG.search(head):
        return "an SVG drawing, which has no pixels of its own; render it to PNG"
    if _HTML.match(head) or (head.startswith(b"<?xml") and _HTML.search(head)):
        return "a web page, not an image: the download was answered with an error page; download it again"
    return None
