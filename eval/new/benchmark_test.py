"""template_name scores as its official script does."""

from eval import benchmarks
from eval.config import DEFAULT_DATA


def test_official_vectors() -> None:
    """Texts and what the official script gives for them: copy vectors of the script here, with its source."""
    data = benchmarks.get("template_name").load(DEFAULT_DATA, "test")
    first, *others = data.questions
    texts = {question.id: question.answer for question in others}
    vectors = {first.answer: 1, f"{first.answer.upper()}.": 1, f"a {first.answer}": 0, "": 0}
    for text, credit in vectors.items():
        value = data.score([q.id for q in data.questions], {first.id: text, **texts}).values["accuracy"]
        assert round(value * len(data.questions) / 100, 6) == len(others) + credit
