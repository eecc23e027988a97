"""What a selection may ask for beside the path: samples that must not, or need not, be trained on.

Only the settings lie here, so that a declaration can be read without what they set in motion
(`decontamination`, `near_duplicates`).
"""

from typing import Annotated, Any, Self

import dagster as dg
from pydantic import ConfigDict, Field, model_validator


class Decontamination(dg.Model, dg.Resolvable):
    """What is looked for in the pool, and how alike it has to be."""

    model_config = ConfigDict(frozen=True)

    images: str | None = Field(default=None, description="Folder (or file, or URI) of evaluation images.")
    texts: str | None = Field(
        default=None,
        description="File (or folder, or URI) of evaluation texts: .txt with one per line, or .jsonl.",
    )
    text_field: str = Field(default="text", description="The field of a .jsonl line that holds the text.")
    # The bounds stand inside, as Dagster would apply them to null, too.
    max_hamming: Annotated[int, Field(ge=0, le=32)] | None = Field(
        default=4,
        description="Perceptual hashes (64 bits) that differ in at most as many are the same image. Stored "
        "again or resized it differs by 0 to 2, cropped by a hundredth at each side by up to 6. Null "
        "compares bytes only, for pools of drawings, which look alike.",
    )
    ngram: int = Field(default=13, ge=1, description="Words of an n-gram, as in GPT-3's decontamination.")
    short_ngram: int = Field(
        default=8,
        ge=1,
        description="Words of an n-gram of texts that have fewer than `ngram`; still shorter texts are not "
        "looked for.",
    )
    min_overlap: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of an evaluation text's n-grams that a sample must have; with 0, one will do.",
    )
    common_ngrams: int = Field(
        default=10,
        ge=1,
        description="N-grams that more evaluation texts than this share are a benchmark's prompt and do not "
        "count.",
    )

    @model_validator(mode="after")
    def _something_is_looked_for(self) -> Self:
        if self.images is None and self.texts is None:
            raise ValueError("name evaluation images or texts, or leave decontamination out")
        if self.short_ngram > self.ngram:
            raise ValueError(f"short_ngram is {self.short_ngram}; it is at most ngram, {self.ngram}")
        return self

    def matching(self) -> dict[str, Any]:
        """All but where the files are: what a result depends on beside them."""
        return self.model_dump(exclude={"images", "texts"})


class NearDuplicates(dg.Model, dg.Resolvable):
    """How alike samples have to be for one to go."""

    model_config = ConfigDict(frozen=True)

    cosine: float = Field(
        default=0.995,
        gt=0,
        le=1,
        description="Cosine of two samples' vectors, from the pool's mean, from which on they are "
        "near-duplicates. What it means depends on the model: look at what a threshold removes.",
    )
    exact_up_to: int = Field(
        default=50_000,
        ge=0,
        description="Pools of so many samples are searched exactly; larger ones with LanceDB's IVF index, "
        "whose measured recall is told.",
    )
