"""MM-Vet: means of an LLM judge's scores from 0 to 1, over all questions, capabilities and combinations of them.

Source of the definitions: mm-vet_evaluator.py (https://github.com/yuweihao/MM-Vet, acde843). Differs from it: the
official names of combinations are in no fixed order, here capabilities come in the order of the paper; and numbers are
not rounded to one decimal before they are printed.
"""

import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from eval.metrics import Score
from eval.metrics.words import contains, words

# Out of 100, but no percentages.
POINTS = frozenset({"score", "std", "score_match", "capability", "combination"})
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

# Official judge settings: a first try at temperature 0, and up to four more with a hint at 0, 0.5, 1 and 1.5.
TRIES = 5
STEP = 0.5
HINT = "\nPredict the correctness of the answer (digit): "


def parse(reply: str) -> float | None:
    """A judge's score: what stands before the first space; None unless that is a number from 0 to 1."""
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


def score(capabilities: Mapping[str, Collection[str]], scores: Mapping[str, Sequence[float]]) -> Score:
    """The official numbers, in points from 0 to 100.

    Args:
        capabilities: question id -> what it needs, of every question that was asked.
        scores: question id -> its score in each run of the judge. The shortest list says how many runs count.
    """
    runs = min(len(scores[name]) for name in capabilities)
    correct = {name: statistics.fmean(scores[name][:runs]) for name in capabilities}
    values: dict[str, float | None] = {"score": 100 * statistics.fmean(correct.values())}
    notes = []
    if runs > 1:
        totals = [100 * statistics.fmean(scores[name][run] for name in capabilities) for run in range(runs)]
        values["std"] = statistics.pstdev(totals)
        notes.append(f"mean over {runs} runs of the judge, with their population standard deviation")
    if any(len(scores[name]) > runs for name in capabilities):
        notes.append(f"some questions were judged more than {runs} times; the first {runs} count")
    return Score(values, groups(capabilities, correct), correct, tuple(notes), "score", POINTS)


def groups(
    capabilities: Mapping[str, Collection[str]], correct: Mapping[str, float]
) -> dict[str, dict[str, tuple[float, int]]]:
    """Means per capability, a question counting for each of its own, and per combination; the most frequent first."""
    single, together = defaultdict(list), defaultdict(list)
    for name, needed in capabilities.items():
        for capability in needed:
            single[capability].append(correct[name])
        together["_".join(sorted(needed, key=rank))].append(correct[name])
    return {
        kind: {
            label: (100 * statistics.fmean(sample_scores), len(sample_scores))
            for label, sample_scores in sorted(table.items(), key=lambda item: (-len(item[1]), item[0]))
        }
        for kind, table in (("capability", single), ("combination", together))
    }


def rank(capability: str) -> tuple[int, str]:
    """Place in the paper's order."""
    known = CAPABILITIES.index(capability) if capability in CAPABILITIES else len(CAPABILITIES)
    return known, capability


def match_score(
    capabilities: Mapping[str, Collection[str]], answers: Mapping[str, str], texts: Mapping[str, str]
) -> Score:
    """The same means of a word match, which no paper reports."""
    correct = {name: match(texts[name], answers[name]) for name in capabilities}
    note = "score_match is the share of reference elements found word for word: no published metric"
    value = 100 * statistics.fmean(correct.values())
    return Score({"score_match": value}, groups(capabilities, correct), correct, (note,), "score_match", POINTS)


def match(text: str, answer: str) -> float:
    """Share of the elements, separated by <AND>, that occur in the text; the best of the choices around <OR>."""
    said = words(text)
    choices = [[words(element) for element in choice.split("<AND>")] for choice in answer.split("<OR>")]
    return max(sum(contains(said, element) for element in elements) / len(elements) for elements in choices)
