"""SEED-Bench as LLaVA's scripts/convert_seed_for_submission.py (commit c121f04) scores it, and as lmms-eval does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from eval.metrics import Score
from eval.metrics.accuracy import percent

# Names of the question types, as SEED-Bench.json numbers them; 10 and up are about videos.
TYPES = {
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Attributes",
    4: "Instance Location",
    5: "Instances Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Understanding",
    10: "Action Recognition",
    11: "Action Prediction",
    12: "Procedure Understanding",
}
Rule = Callable[[str, str], float]


@dataclass(frozen=True)
class Item:
    """What scoring needs of a question.

    Attributes:
        official: the benchmark's own id, which a few questions share.
        answer: the right letter.
        kind: "image" or "video".
        type: key of TYPES; None where the data does not say.
    """

    official: str
    answer: str
    kind: str
    type: int | None = None


def exact(text: str, answer: str) -> float:
    """LLaVA's rule: the text is the letter and nothing else, in the same case, without a full stop or space."""
    return float(text == answer)


def first_character(text: str, answer: str) -> float:
    """lmms-eval's rule: the first character, in either case."""
    return float(text.strip()[:1].lower() == answer.strip().lower())


def last_by_official(items: Mapping[str, Item], texts: Mapping[str, str]) -> dict[str, str]:
    """Texts as the official script sees them: of questions that share an id, the last answer stands for all."""
    last = {items[name].official: text for name, text in texts.items() if name in items}
    return {name: last[item.official] for name, item in items.items() if item.official in last}


def score(items: Mapping[str, Item], texts: Mapping[str, str], rule: Rule = exact, main: str = "accuracy") -> Score:
    """Accuracy over all questions, over those about images and over those about videos.

    A question without a prediction is wrong, as officially.

    Args:
        items: the questions that count; texts of others are ignored.
        texts: question id -> the model's text, in the order of the answer file.
        main: "accuracy", or "image_accuracy" for SEED-Bench's image part.
    """
    if main == "image_accuracy":
        items = {name: item for name, item in items.items() if item.kind == "image"}
    own = {name: rule(texts[name], item.answer) if name in texts else 0.0 for name, item in items.items()}
    correct, notes = own, []
    values: dict[str, float | None] = {}
    if rule is exact and len({item.official for item in items.values()}) < len(items):
        seen = last_by_official(items, texts)
        correct = {name: rule(seen[name], item.answer) if name in seen else 0.0 for name, item in items.items()}
        notes.append(
            "questions that share an id are all scored with the last of their answers, as the official script does; "
            "accuracy_own_answer scores each with its own"
        )
        values["accuracy_own_answer"] = percent(own.values())
    for kind in ("video", "image"):
        part = [correct[name] for name, item in items.items() if item.kind == kind]
        if part or main == f"{kind}_accuracy":
            values = {f"{kind}_accuracy": percent(part) if part else None, **values}
    if main == "accuracy":
        values = {"accuracy": percent(correct.values()), **values}
    return Score(values, {"type": by_type(items, correct)}, correct, tuple(notes), main=main)


def by_type(items: Mapping[str, Item], correct: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    """Percent correct and number of questions of each type, in the order of their numbers."""
    table = {}
    for number in sorted({item.type for item in items.values() if item.type is not None}):
        part = [correct[name] for name, item in items.items() if item.type == number]
        table[TYPES.get(number, f"type {number}")] = (percent(part), len(part))
    return table
