"""Why a row has no representation: the closed list of reasons, shared by everything that can reject a row."""

import enum
from dataclasses import dataclass


class RejectionReason(enum.StrEnum):
    """The typed reason in the rejected-rows Parquet and in the counts of every summary."""

    MALFORMED_ROW = "malformed_row"
    DUPLICATE = "duplicate"
    TEXT_ONLY = "text_only"
    IMAGE_COUNT_MISMATCH = "image_count_mismatch"
    NO_INSTRUCTION_TEXT = "no_instruction_text"
    OUTSIDE_IMAGE_ROOT = "outside_image_root"
    MISSING_IMAGE = "missing_image"
    UNDECODABLE_IMAGE = "undecodable_image"
    IMAGE_TOO_LARGE = "image_too_large"
    TEMPLATE_REFUSED = "template_refused"
    PROCESSOR_REFUSED = "processor_refused"
    TOO_LONG = "too_long"
    TOO_LARGE = "too_large"
    NON_FINITE = "non_finite"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why one row is not embedded: the typed reason and one sentence with what was found and the remedy."""

    reason: RejectionReason
    detail: str
