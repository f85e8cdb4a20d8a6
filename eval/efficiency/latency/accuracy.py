"""The accuracy gate: the speed of a method that answers badly is marked."""

from dataclasses import dataclass
from pathlib import Path

from eval.command import open_dataset
from eval.config import FULL
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate
from llava.reduction.reducer import Reducer

BATCH = 16


@dataclass(frozen=True)
class Gate:
    """What a method must reach for its speed to count.

    Attributes:
        title: of the questions, "GQA testdev".
        questions: how many are asked, the first of the benchmark.
        share: of the accuracy of `full`.
        accuracy: method -> share of right answers.
    """

    title: str
    questions: int
    share: float
    accuracy: dict[str, float]

    def passes(self, name: str) -> bool:
        """Whether a method has at least `share` of the accuracy of `full`."""
        return self.accuracy[name] >= self.share * self.accuracy[FULL]


def gate(model: Llava, reducers: dict[str, Reducer], benchmark: str, data: Path, questions: int, share: float) -> Gate:
    """Ask every method the first questions of a benchmark.

    Raises:
        UserError: answers of this benchmark have no score of their own.
    """
    found = open_dataset(benchmark, str(data), None, None, "auto")
    if found.sample_score is None:
        raise UserError(f"Answers of {found.title} have no score of their own; choose another --gate-benchmark.")
    asked = found.questions[:questions]
    scores: dict[str, float] = {}
    for name, reducer in reducers.items():
        points = 0.0
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            answers = generate(model, [found.sample(one) for one in part], reducer, found.max_new_tokens).answers
            points += sum(found.sample_score(one, answer.text) for one, answer in zip(part, answers, strict=True))
        scores[name] = points / len(asked)
    return Gate(found.title, len(asked), share, scores)
