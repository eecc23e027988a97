"""The closed list of reasons why a row has no representation, shared by all code that can reject a row."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class RejectionReason(enum.StrEnum):
    """The typed reason in the rejected-rows Parquet and in the counts of every summary."""

    MALFORMED_ROW = "malformed_row"
    DUPLICATE = "duplicate"
    OTHER_MEDIA = "other_media"
    FOREIGN_IMAGE_MARK = "foreign_image_mark"
    UNREAD_IMAGE = "unread_image"
    TEXT_ONLY = "text_only"
    IMAGE_COUNT_MISMATCH = "image_count_mismatch"
    NO_INSTRUCTION_TEXT = "no_instruction_text"
    OUTSIDE_IMAGE_ROOT = "outside_image_root"
    MISSING_IMAGE = "missing_image"
    UNDECODABLE_IMAGE = "undecodable_image"
    DEEP_IMAGE = "deep_image"
    IMAGE_TOO_LARGE = "image_too_large"
    TEMPLATE_REFUSED = "template_refused"
    PROCESSOR_REFUSED = "processor_refused"
    TOO_LONG = "too_long"
    TOO_LARGE = "too_large"
    NON_FINITE = "non_finite"


MEANINGS: Mapping[RejectionReason, str] = {
    RejectionReason.MALFORMED_ROW: "not JSON, not an object, no turns, an unknown role, or no answer",
    RejectionReason.DUPLICATE: "repeats an earlier row of its shard in everything but its id",
    RejectionReason.OTHER_MEDIA: "has video or audio, which is not read",
    RejectionReason.FOREIGN_IMAGE_MARK: "another model's image marks, which do not say which image is meant",
    RejectionReason.UNREAD_IMAGE: "seems to name an image where none is read",
    RejectionReason.TEXT_ONLY: "has no image",
    RejectionReason.IMAGE_COUNT_MISMATCH: "image marks and images differ in number",
    RejectionReason.NO_INSTRUCTION_TEXT: "no text beside the answers",
    RejectionReason.OUTSIDE_IMAGE_ROOT: "the image's path leads out of the image root",
    RejectionReason.MISSING_IMAGE: "the image is not there or cannot be read",
    RejectionReason.UNDECODABLE_IMAGE: "the image is damaged, or none at all",
    RejectionReason.DEEP_IMAGE: "more than 8 bits of grey, which would be clipped to white or black",
    RejectionReason.IMAGE_TOO_LARGE: "the image has too many pixels, or is too long a strip",
    RejectionReason.TEMPLATE_REFUSED: "the model's chat template refuses the row",
    RejectionReason.PROCESSOR_REFUSED: "the model's processor refuses the row",
    RejectionReason.TOO_LONG: "more tokens than the model takes",
    RejectionReason.TOO_LARGE: "alone, it does not fit the memory of the device",
    RejectionReason.NON_FINITE: "the model's first layer gave infinity or NaN",
}
"""The meaning of each reason, for the report and the documentation."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """The reason why one row is not embedded, and one sentence that names the finding and the remedy."""

    reason: RejectionReason
    detail: str
