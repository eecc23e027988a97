"""The settings for removing samples: those that an evaluation set contains, and near-duplicates.

Only the settings are here, so that reading a declaration does not import the code that removes samples
(`scalselect_assets.choice.decontamination`, `scalselect_assets.choice.duplicate_removal`).
"""

from typing import Annotated, Any, Final, Literal, Self

import dagster as dg
from pydantic import ConfigDict, Field, model_validator

DEFAULT_LIKENESS: Final = 0.9
"""From which likeness on two texts say the same: rewordings stay, rather than other questions go."""


class Decontamination(dg.Model, dg.Resolvable):
    """The evaluation set that is looked for in the pool, and how alike a sample must be to match."""

    model_config = ConfigDict(frozen=True)

    images: str | None = Field(default=None, description="Folder (or file, or URI) of evaluation images.")
    texts: str | None = Field(
        default=None,
        description="File (or folder, or URI) of evaluation texts: .txt with one per line, or .jsonl.",
    )
    text_field: str = Field(default="text", description="The field of a .jsonl line that holds the text.")
    # The bounds are inside the union, because Dagster would apply outer ones to null, too.
    max_hamming: Annotated[int, Field(ge=0, le=32)] | None = Field(
        default=4,
        description="Two images count as the same if their perceptual hashes (64 bits) differ in at most so "
        "many bits. A copy that was stored again or resized differs by 0 to 2, one that was cropped by a "
        "hundredth at each side by up to 6. Null compares bytes only, for pools of drawings, which look "
        "alike.",
    )
    ngram: int = Field(
        default=13, ge=1, description="Number of words in an n-gram, as in GPT-3's decontamination."
    )
    short_ngram: int = Field(
        default=8,
        ge=1,
        description="Number of words in an n-gram of texts that have fewer words than `ngram`; still "
        "shorter texts are not looked for.",
    )
    min_overlap: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of an evaluation text's n-grams that a sample must contain; with 0, one is "
        "enough.",
    )
    common_ngrams: int = Field(
        default=10,
        ge=1,
        description="An n-gram that more evaluation texts than this share is a benchmark's prompt and does "
        "not count.",
    )

    @model_validator(mode="after")
    def _something_is_looked_for(self) -> Self:
        if self.images is None and self.texts is None:
            raise ValueError("name evaluation images or texts, or leave decontamination out")
        if self.short_ngram > self.ngram:
            raise ValueError(f"short_ngram is {self.short_ngram}; it is at most ngram, {self.ngram}")
        return self

    def matching(self) -> dict[str, Any]:
        """The settings without the places of the files, of which only the content matters to a result."""
        return self.model_dump(exclude={"images", "texts"})


class NearDuplicates(dg.Model, dg.Resolvable):
    """The likeness, of vectors and of texts, at which one of two samples is removed."""

    model_config = ConfigDict(frozen=True)

    cosine: Annotated[float, Field(gt=0, le=1)] | Literal["suggested"] = Field(
        default="suggested",
        description="Least cosine of two samples' vectors, measured from the pool's mean, for "
        "near-duplicates. The meaning of a number depends on the model; `suggested` takes the cosine that "
        "only one in a hundred samples reaches with a sample of another picture and another text.",
    )
    text_likeness: float = Field(
        default=DEFAULT_LIKENESS,
        ge=0,
        le=1,
        description="Least share of the shorter text that two samples have in common, of the question and of "
        "the answer, each word weighted by how rare it is in the pool. Samples of the same pictures and like "
        "texts are near-duplicates whatever their cosine. 0 compares vectors only, which takes different "
        "questions about one picture for copies.",
    )
    exact_up_to: int = Field(
        default=50_000,
        ge=0,
        description="Largest pool, in samples, that is searched exactly; larger pools are searched through "
        "LanceDB's IVF index, and its measured recall is recorded.",
    )
