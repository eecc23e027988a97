"""The verdict on one row of a shard: a sample whose images all exist, or a rejection.

The verdict depends on the row's content and on whether its images can be opened; pixels are not looked at.
Repeats of a row are found only by the reader of the whole shard.
"""

import hashlib
from dataclasses import dataclass

from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.resources.forms.embedded import address_of
from scalselect_assets.resources.image_root import ImageRoot
from scalselect_assets.resources.samples import Sample, content_key, parse_row, repeat_key, text_key
from scalselect_assets.resources.shard_reader import RowText


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One row of a shard: a sample whose images all exist, or a rejection."""

    row: int
    """Place in the shard, from 0."""
    line: int
    """Line of the file on which the row starts, from 1."""
    text: str
    """The row's JSON text verbatim."""
    sample_key: str
    """Hash of the row's content, unique within the shard."""
    source_id: str | None
    """The row's ``id`` as a string; None if it has none."""
    sample: Sample | None
    """The sample; None exactly if ``rejection`` is set."""
    image_paths: tuple[str, ...]
    """The images, for ``SampleSource.open_image``; empty if the row is rejected."""
    rejection: Rejection | None


def judge(row: RowText, images: ImageRoot) -> tuple[PoolRow, str | None]:
    """The verdict on a row by itself. Its key is the base key, which its repeats share."""

    def judged(
        base: str,
        source_id: str | None = None,
        rejection: Rejection | None = None,
        sample: Sample | None = None,
        image_paths: tuple[str, ...] = (),
    ) -> PoolRow:
        return PoolRow(row.row, row.line, row.text, base, source_id, sample, image_paths, rejection)

    if row.error:
        return judged(text_key(row.text), rejection=Rejection(RejectionReason.MALFORMED_ROW, row.error)), None
    parsed = parse_row(row.text, row.row)
    if parsed.sample is None:
        return judged(text_key(row.text), parsed.source_id, parsed.rejection), None
    paths, names = [], []
    rejection: Rejection | None = None
    for reference in parsed.sample.images:
        address = address_of(reference)
        if address and address.row == row.row and address.place < len(row.images):
            paths.append(reference)
            names.append(f"sha256:{hashlib.sha256(row.images[address.place]).hexdigest()}")
            continue
        found = images.resolve(reference)
        rejection = rejection or found.rejection
        paths.append(found.path or reference)
        names.append(paths[-1])
    base = content_key(parsed.sample, names)
    if rejection:
        return judged(base, parsed.source_id, rejection), None
    kept = judged(base, parsed.source_id, sample=parsed.sample, image_paths=tuple(paths))
    return kept, repeat_key(row.text, names)
