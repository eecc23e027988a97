"""Sentences of made-up words: the training text of the tokenizer and the text of the samples."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn

_N_WORDS: Final = 3000
_SENTENCE_WORDS: Final = 12
TEXT_TOKENS: Final = (130.0, 0.6, 40, 400)  # median and log-deviation, and the limits, like LLaVA-665K's


class Speech:
    """Sentences of made-up words, frequent and rare ones."""

    def __init__(self, seed: int | Sequence[int]) -> None:
        """The words are always the same; the seed decides what is said."""
        fixed = np.random.default_rng(0)
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        self._words = list(
            dict.fromkeys("".join(fixed.choice(syllables, size)) for size in fixed.integers(1, 5, _N_WORDS))
        )
        weights = 1 / (10 + np.arange(len(self._words)))
        self._probabilities = weights / weights.sum()
        self._generator = np.random.default_rng(seed)

    def say(self, n_words: int) -> str:
        """So many words, in sentences."""
        words = self._generator.choice(self._words, max(1, n_words), p=self._probabilities)
        sentences = (
            words[start : start + _SENTENCE_WORDS] for start in range(0, len(words), _SENTENCE_WORDS)
        )
        return " ".join(f"{' '.join(sentence).capitalize()}." for sentence in sentences)

    def converse(self, n_words: int) -> Conversation:
        """One image and one or more questions with their answers."""
        rounds = min(int(self._generator.geometric(0.5)), 1 + n_words // 25)
        asked = self._generator.uniform(0.2, 0.6) * n_words / rounds
        answered = n_words / rounds - asked
        turns = []
        for place in range(rounds):
            question = self.say(round(asked))
            turns.append(Turn("user", (question,) if place else (IMAGE, question)))
            turns.append(Turn("assistant", (self.say(round(answered)),)))
        return Conversation(tuple(turns))
