"""What a selection may ask for beside the path: samples that must not, or need not, be trained on.

Only the settings lie here, so that a declaration can be read without what they set in motion
(`decontamination`, `near_duplicates`).
"""

from typing import Annotated, Any, Final, Literal, Self

import dagster as dg
from pydantic import ConfigDict, Field, model_validator

DEFAULT_LIKENESS: Final = 0.9
"""From which likeness on two texts say the same: rewordings stay, rather than other questions go."""


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
    """How alike samples have to be for one to go: by their vectors, and by their texts as well."""

    model_config = ConfigDict(frozen=True)

    cosine: Annotated[float, Field(gt=0, le=1)] | Literal["suggested"] = Field(
        default="suggested",
        description="Cosine of two samples' vectors, from the pool's mean, from which on they are "
        "near-duplicates. What a number means depends on the model; `suggested` takes the cosine that only "
        "one in a hundred samples reaches with a sample of another picture and another text.",
    )
    text_likeness: float = Field(
        default=DEFAULT_LIKENESS,
        ge=0,
        le=1,
        description="How much of the shorter text two samples must share, what is asked and what is answered "
        "each, weighted by how rare the words are in the pool. Samples of the same pictures and like texts "
        "are near-duplicates whatever their cosine. 0 compares vectors only, which takes different "
        "questions about one picture for copies.",
    )
    exact_up_to: int = Field(
        default=50_000,
        ge=0,
        description="Pools of so many samples are searched exactly; larger ones with LanceDB's IVF index, "
        "whose recall is measured and recorded.",
    )
