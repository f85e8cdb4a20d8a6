"""The text-only baseline: the commonest training answer to the same question, else to its family."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from toy.data.corpus import Corpus
from toy.data.questions import FAMILIES, ask


class TextOnly:
    """A lookup from question text to answer, counted over training questions."""

    def __init__(self, pairs: Iterable[tuple[str, str, str]]):
        """`pairs` are (family, question, answer)."""
        questions: dict[str, Counter] = defaultdict(Counter)
        families: dict[str, Counter] = defaultdict(Counter)
        for family, question, answer in pairs:
            questions[question][answer] += 1
            families[family][answer] += 1
        self._question = {text: _commonest(counts) for text, counts in questions.items()}
        self._family = {family: _commonest(counts) for family, counts in families.items()}

    def answer(self, family: str, question: str) -> str:
        """The answer that was seen most often."""
        return self._question.get(question, self._family[family])


def _commonest(counts: Mapping[str, int]) -> str:
    """Ties go to the first in the alphabet, not to the order of counting."""
    return min(counts, key=lambda answer: (-counts[answer], answer))


def training_questions(corpus: Corpus, scenes: int, seed: int = 0) -> Iterable[tuple[str, str, str]]:
    """Two questions of every family about each of the first `scenes` training scenes."""
    rng = np.random.default_rng(seed)
    for row in range(min(scenes, len(corpus))):
        things = corpus.list_things(row)
        for family in (*FAMILIES, *FAMILIES):
            question = ask(things, family, rng, tries=12)
            if question is not None:
                yield family, question.text, question.answer
