"""Whether stored answers still belong to the questions: same prompt, same images."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.answers import ADVICE
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.media import digest_of
from llava.errors import UserError

SHOWN = 3


def check_reuse(data: Dataset, questions: Iterable[Question], answers: Mapping[str, Any], folder: Path) -> int:
    """Compare stored answers with the prompts and images that their questions have now.

    Args:
        questions: those of this run; the ones without an answer are passed over.
        answers: question id -> line of answers.jsonl.
        folder: of the store, for the error.

    Returns:
        How many answers were stored by a former version, without a hash of their images.

    Raises:
        UserError: an answer was given to another prompt or to other images.
    """
    prompts, pictures, unknown = [], [], 0
    for question in questions:
        line = answers.get(question.id)
        if line is None:
            continue
        if line.get("prompt", question.message) != question.message:
            prompts.append(question.id)
        stored = (line.get("metadata") or {}).get("pictures")
        if stored is None:
            unknown += bool(question.images)
        elif stored != digest_of(data.pictures, question.images):
            pictures.append(question.id)
    for names, what in ((prompts, "to other prompts"), (pictures, f"to other {data.pictures.noun}")):
        if names:
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            raise UserError(
                f"{folder} holds {len(names):,} answers {what} than the data have now (questions {shown}); "
                f"{ADVICE}, or take the old data back."
            )
    return unknown
