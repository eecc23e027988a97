"""Which evaluation texts a sample repeats: n-grams of words that both have.

The rule follows GPT-3's decontamination (Brown et al. 2020, arXiv 2005.14165, appendix C), which looks for
n-grams of words in lower case without punctuation, of 13 words, or down to 8 for benchmarks of short texts.
Here each evaluation text of 13 words or more is looked for by its 13-grams, a shorter one by its 8-grams.
What has fewer words is not looked for, since "How many dogs are there?" stands in every pool, and is counted.
N-grams that many evaluation texts share ("Answer the question using a single word or phrase.") are the prompt
of a benchmark, not its content, and do not count; GPT-3 leaves out what is common in its training data.

The index is a plain dict from n-gram to texts. Libraries for such work (datasketch's MinHash, scikit-learn's
vectorisers) estimate or weigh similarities of whole texts; here one exact n-gram decides, a dict finds it in
one look-up, and the evaluation set is what fits in memory. Costs: some 150 bytes per n-gram of the evaluation
set, and one look-up per word of the pool for each length in use.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import regex

from scalselect_assets.resources.evaluation_set import EvaluationText

# Scripts that do not part words by spaces. Each of their characters, with its marks, counts as a word, so an
# n-gram of Chinese is n characters; a dictionary would part words differently by the text around them, and a
# repeated sentence would no longer have the same n-grams. Korean parts words by spaces.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|(?:(?![{_UNSPACED}])\w)+")

# Normalising takes time in proportion to the square of a run of combining marks, so a longer run than any
# script has is cut by a character that keeps marks from being put in order across it (Unicode's stream-safe
# text).
_LONG_RUN = regex.compile(r"[\p{M}\uff9e\uff9f]{30}")  # two marks of half-width kana are letters by name
_JOINER = "\u034f"


def words(text: str) -> list[str]:
    """The words of a text as they are compared: NFKC, case folded, without punctuation.

    In scripts without spaces between words, each character is one.
    """
    safe = _LONG_RUN.sub(rf"\g<0>{_JOINER}", text)
    found: list[str] = _WORD.findall(unicodedata.normalize("NFKC", safe).casefold())
    return found


@dataclass(frozen=True, slots=True)
class TextMatch:
    """An evaluation text that a sample repeats.

    Attributes:
        text: The evaluation text.
        overlap: Share of its n-grams that the sample has, in (0, 1].
        phrase: The first n-gram that both have.
    """

    text: EvaluationText
    overlap: float
    phrase: str


class NgramIndex:
    """The n-grams of an evaluation set.

    Attributes:
        n_texts: Different texts that are looked for.
        n_too_short: Texts that are not, as they have fewer words than ``short_ngram``.
        n_common: Texts that are not, as other texts share all their n-grams.
    """

    def __init__(self, texts: Sequence[EvaluationText], *, ngram: int, short_ngram: int, common: int) -> None:
        """Index texts.

        Args:
            texts: The evaluation texts; of equal ones, the first counts.
            ngram: Words of an n-gram of a text that has as many.
            short_ngram: Words of an n-gram of a shorter text, at most ``ngram``.
            common: An n-gram that more texts than this share is left out.
        """
        distinct: dict[tuple[str, ...], EvaluationText] = {}
        for text in texts:
            distinct.setdefault(tuple(words(text.text)), text)
        long_enough = {parts: text for parts, text in distinct.items() if len(parts) >= short_ngram}
        self.n_too_short = len(distinct) - len(long_enough)
        self._texts: list[EvaluationText] = []
        self._n_grams: list[int] = []
        self._texts_with: dict[str, list[int]] = defaultdict(list)
        grams_of = {
            parts: dict.fromkeys(_ngrams(parts, ngram if len(parts) >= ngram else short_ngram))
            for parts in long_enough
        }
        shared_by = Counter(gram for grams in grams_of.values() for gram in grams)
        for parts, text in long_enough.items():
            own = [gram for gram in grams_of[parts] if shared_by[gram] <= common]
            if own:
                for gram in own:
                    self._texts_with[gram].append(len(self._texts))
                self._texts.append(text)
                self._n_grams.append(len(own))
        self.n_texts = len(self._texts)
        self.n_common = len(long_enough) - self.n_texts
        self._lengths = tuple(sorted({ngram, short_ngram}, reverse=True))

    def match(self, text: str, min_overlap: float = 0.0) -> TextMatch | None:
        """The evaluation text that ``text`` repeats most of, the first of equals; none if it repeats none.

        Args:
            text: All that a sample says.
            min_overlap: Share of a text's n-grams from which on it counts; 0 asks for one n-gram.
        """
        parts = words(text)
        found: dict[int, dict[str, None]] = defaultdict(dict)
        for length in self._lengths:
            for gram in _ngrams(parts, length):
                for place in self._texts_with.get(gram, ()):
                    found[place].setdefault(gram)
        matches = [
            (-overlap, place)
            for place, grams in found.items()
            if (overlap := len(grams) / self._n_grams[place]) >= min_overlap
        ]
        if not matches:
            return None
        negative, place = min(matches)
        return TextMatch(self._texts[place], -negative, next(iter(found[place])))


def _ngrams(parts: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(parts[start : start + length]) for start in range(len(parts) - length + 1))
