"""The POPE metrics: accuracy, precision, recall, F1 and yes ratio over questions that are answered by yes or no.

`score` is LLaVA's eval_pope.py (haotian-liu/LLaVA @ c121f04) and equal to it on the vectors in tests/data/pope; its
headline, the mean F1 of the three categories, is what papers print. `score_lmms` is lmms-eval @ 75571cf, which pools
the categories. Both differ from the scripts in that a quotient without a denominator is 0 and noted, where eval_pope.py
stops, and in that numbers a script gets wrong stand beside the right ones.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import Array, Score, SufficientStatistics, divide, first_names
from eval.metrics.accuracy import check_coverage
from llava.errors import UserError

# In the order of the paper's table.
CATEGORIES = ("random", "popular", "adversarial")
NEGATIONS = {"No", "not", "no"}
WORD = re.compile(r"\w+")

# Columns of the counts. "Other" is an answer that is neither, which only lmms-eval knows.
TP, FP, TN, FN, OTHER_YES, OTHER_NO = range(6)
COLUMNS = 6


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        label: "yes" or "no"; None if the label file does not have the question.
    """

    category: str
    image: str
    label: str | None


def parse(text: str) -> str:
    """ "yes" or "no" as eval_pope.py reads a text: everything is yes but a negation word in the first sentence.

    Words are what single spaces separate, and case counts: "NO", "no!", "None" and "" are yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "yes" if NEGATIONS.isdisjoint(words) else "no"


def parse_lmms(text: str) -> str:
    """The whole text, which lmms-eval compares with "yes" and "no"."""
    return text.lower().strip()


def score(items: Mapping[str, Item], labels: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> Score:
    """The numbers of eval_pope.py in percent.

    Args:
        items: id -> question, of those that were asked, in the order of the question file.
        labels: category -> labels in the order of its file. The script compares a category's answers with them by
            position, whatever the ids say.
        texts: id -> raw text, in the order of the answer file; one for every item.
    """
    check_coverage(items, texts, set(items))
    said = {name: parse(text) for name, text in texts.items()}
    by_position = labels_by_position(items, labels, texts)
    known = {name: item for name, item in items.items() if item.label is not None}
    own = by_position | {name: item.label for name, item in known.items() if item.label is not None}
    present = categories_of(items)
    counts = tally(items, present, said, by_position)
    table = {name: 100 * value for name, value in measures(counts.sum(0)).items()}
    values: dict[str, float | None] = {name: float(value.mean()) for name, value in table.items()}
    notes = [*category_notes(present), *empty_notes(present, counts.sum(0)), *unread_notes(texts)]
    if unknown := len(items) - len(known):
        notes.append(
            f"{unknown:,} of {len(items):,} questions are not in the label files, which may be of another version: "
            "they have a label by position alone"
        )
    if wrong := sum(own[name] != by_position[name] for name in known):
        matched = measures(tally(known, categories_of(known), said, own).sum(0))
        values |= {f"{name}_matched_by_id": float(100 * matched[name].mean()) for name in ("f1", "accuracy")}
        notes.append(
            f"the official script matches labels by position, which gives {wrong:,} of {len(known):,} answers the "
            "wrong label; f1_matched_by_id and accuracy_matched_by_id give every question its own"
        )
    return Score(
        values,
        groups_of(table, present, counts),
        {name: float(said[name] == own[name]) for name in items},
        tuple(notes),
        main="f1",
        terms=terms_of(items, counts.reshape(len(items), -1), mean_f1),
    )


def score_lmms(items: Mapping[str, Item], texts: Mapping[str, str]) -> Score:
    """The numbers of lmms-eval in percent, over all categories at once.

    Its yes ratio is that of the labels: `yes_ratio_lmms`, while `yes_ratio` is that of the answers. An answer that is
    neither yes nor no lowers its accuracy but not its recall; `f1_other_missed` counts it in both.
    """
    check_coverage(items, texts, set(items))
    said = {name: parse_lmms(text) for name, text in texts.items()}
    own = {name: item.label for name, item in items.items() if item.label is not None}
    if lost := [name for name in items if name not in own]:
        raise UserError(
            f"{len(lost):,} of {len(items):,} questions are not in the label files ({first_names(lost)}): question "
            "file and label files should be of the same version."
        )
    present = categories_of(items)
    counts = tally(items, present, said, own)
    pooled = counts.sum((0, 1))
    table = {name: 100 * value for name, value in measures(counts.sum(0)).items()}
    values: dict[str, float | None] = {name: float(100 * value) for name, value in measures(pooled).items()}
    positive = pooled[TP] + pooled[FN] + pooled[OTHER_YES]
    values["yes_ratio_lmms"] = float(100 * divide(positive, pooled.sum()))
    values["f1_mean_of_categories"] = float(table["f1"].mean())
    notes = ["yes_ratio_lmms is the share of questions whose label is yes, which lmms-eval prints as yes ratio"]
    notes += empty_notes(("all categories",), pooled[None])
    if other := int(pooled[OTHER_YES] + pooled[OTHER_NO]):
        missed = pooled.copy()
        missed[FN] += missed[OTHER_YES]
        values["f1_other_missed"] = float(100 * measures(missed)["f1"])
        notes.append(
            f"{other:,} answers are neither yes nor no: wrong in the accuracy, left out of recall and f1 by lmms-eval; "
            "f1_other_missed counts those to a yes as missed"
        )
    return Score(
        values,
        groups_of(table, present, counts),
        {name: float(said[name] == own[name]) for name in items},
        tuple(notes),
        main="f1",
        terms=terms_of(items, counts.sum(1), pooled_f1),
    )


def labels_by_position(
    items: Mapping[str, Item], labels: Mapping[str, Sequence[str]], texts: Mapping[str, str]
) -> dict[str, str]:
    """id -> the label at the place that the answer has among its category's answers."""
    seen: dict[str, int] = defaultdict(int)
    found = {}
    for name in texts:
        category = items[name].category
        place = seen[category]
        if place >= len(labels.get(category, ())):
            raise UserError(
                f"There are {len(labels.get(category, ())):,} labels for more answers of category {category}: question "
                "file and label file should be of the same version."
            )
        found[name] = labels[category][place]
        seen[category] += 1
    return found


def categories_of(items: Mapping[str, Item]) -> tuple[str, ...]:
    """Those that were asked, in the order of the paper."""
    there = {item.category for item in items.values()}
    return tuple(category for category in CATEGORIES if category in there)


def tally(
    items: Mapping[str, Item], present: Sequence[str], said: Mapping[str, str], labels: Mapping[str, str]
) -> Array:
    """[questions, categories, columns]: a 1 where each answer counts."""
    column = {("yes", "yes"): TP, ("yes", "no"): FP, ("no", "no"): TN, ("no", "yes"): FN}
    other = {"yes": OTHER_YES, "no": OTHER_NO}
    counts = np.zeros((len(items), len(present), COLUMNS))
    for row, (name, item) in enumerate(items.items()):
        label = labels[name]
        counts[row, present.index(item.category), column.get((said[name], label), other[label])] = 1
    return counts


def measures(counts: Array) -> dict[str, Array]:
    """Shares of counts [..., columns], the headline first; 0 where there is nothing to divide by."""
    total = counts.sum(-1)
    precision = divide(counts[..., TP], counts[..., TP] + counts[..., FP])
    recall = divide(counts[..., TP], counts[..., TP] + counts[..., FN])
    return {
        "f1": divide(2 * precision * recall, precision + recall),
        "accuracy": divide(counts[..., TP] + counts[..., TN], total),
        "precision": precision,
        "recall": recall,
        "yes_ratio": divide(counts[..., TP] + counts[..., FP], total),
    }


def mean_f1(sums: Array) -> Array:
    """[..., categories x columns] -> percent."""
    return 100 * measures(sums.reshape(*sums.shape[:-1], -1, COLUMNS))["f1"].mean(-1)


def pooled_f1(sums: Array) -> Array:
    """[..., columns] -> percent."""
    return 100 * measures(sums)["f1"]


def terms_of(items: Mapping[str, Item], sums: Array, value: Callable[[Array], Array]) -> SufficientStatistics:
    """Images are the units: the answers about one of them are not independent."""
    images = {image: row for row, image in enumerate(dict.fromkeys(item.image for item in items.values()))}
    by_image = np.zeros((len(images), sums.shape[1]))
    np.add.at(by_image, [images[item.image] for item in items.values()], sums)
    return SufficientStatistics("image", tuple(images), tuple(images), by_image, value, most=100)


def groups_of(
    table: Mapping[str, Array], present: Sequence[str], counts: Array
) -> dict[str, dict[str, tuple[float, int]]]:
    """Every measure by category."""
    sizes = counts.sum((0, 2)).astype(int)
    return {
        name: {category: (float(value[k]), int(sizes[k])) for k, category in enumerate(present)}
        for name, value in table.items()
    }


def category_notes(present: Sequence[str]) -> list[str]:
    """That a mean is not over all three."""
    if len(present) == len(CATEGORIES):
        return []
    return [f"f1 is over the questions of {' and '.join(present)} alone; papers print the mean of three categories"]


def unread_notes(texts: Mapping[str, str]) -> list[str]:
    """That answers with neither yes nor no count as yes: gibberish alone has an F1 of 66.7."""
    unread = sum(parse(text) == "yes" and "yes" not in WORD.findall(text.lower()) for text in texts.values())
    if not unread:
        return []
    return [f"{unread:,} of {len(texts):,} answers say neither yes nor no: the official script counts them as yes"]


def empty_notes(names: Sequence[str], counts: Array) -> list[str]:
    """Which quotients had nothing to divide by; counts is [names, columns]."""
    notes = []
    for name, row in zip(names, counts, strict=True):
        lost = [word for word, other in (("precision", FP), ("recall", FN)) if not row[TP] + row[other]]
        if not row[TP]:
            notes.append(f"{name}: nothing to divide by for {' and '.join([*lost, 'f1'])}, counted as 0")
    return notes
