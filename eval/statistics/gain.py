"""What of the gain of seeing a method keeps: its score between that of a blind model and that of the full model.

**Visual gain kept** is (method - blind) / (full - blind). The blind score is that of the control `none`, the same model
without any visual token. Percent of full counts what needs no image as kept; this does not.

**Test of a share s.** m - s x f - (1 - s) x b is linear in the three scores, so the test is that of "percent of full"
(relative.py) with s x full + (1 - s) x blind in the place of the full model. Near s = 1 most clusters differ from this
mixture a little, although none lost anything, so one cluster that the method loses wholly is always added to the
observed ones. Without it half of the methods passed that keep exactly 99 % of the gain on 100 single questions.

**Interval.** The delta method: near its sums the ratio is linear, and a cluster's share in it is that cluster's share
in m - g x f - (1 - g) x b, divided by f - b, with the observed ratio g.

**Floor.** What needs no model: guessing among the options, or the usual answer. A blind model may be above it, because
it knows language, or below it, because it was never asked without an image.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

import numpy as np

from eval import benchmarks
from eval.benchmarks.base import Dataset, Question
from eval.metrics import Array, SufficientStatistics
from eval.results.statistics import FEWEST_CLUSTERS, LEVEL, Interval, compare, p_text, plural, rounded
from eval.statistics.relative import from_spread, influences, pair, tokens_needed
from llava.errors import UserError

GUESSES = 200  # drawn where the score is no mean over questions
POLAR = ("yes", "no")
NO_OTHER_SPLIT = "n/a: open questions, and the data has no other split with answers"


def mixture(full: SufficientStatistics, blind: SufficientStatistics, share: float) -> SufficientStatistics:
    """share x full + (1 - share) x blind, as one score of the same questions.

    Raises:
        UserError: they are not about the same questions.
    """
    if full.names != blind.names or full.clusters != blind.clusters:
        raise UserError("The blind and the full model must have answered the same questions in the same data.")
    if full.proportion and blind.proportion:
        return replace(full, sums=share * full.sums + (1 - share) * blind.sums)
    terms = full.sums.shape[1]

    def value(sums: Array) -> Array:
        found: Array = share * full.value(sums[..., :terms]) + (1 - share) * blind.value(sums[..., terms:])
        return found

    return replace(full, sums=np.concatenate([full.sums, blind.sums], axis=1), value=value, most=None)


def no_gain(full: SufficientStatistics, blind: SufficientStatistics) -> str:
    """Why these runs do not show that seeing helps; "" if they do, at 95 % and with enough clusters for an interval."""
    clusters, found = len(set(full.clusters)), compare(full, blind, 999)
    if clusters < FEWEST_CLUSTERS:
        return f"n/a: {clusters} {plural(full.unit, clusters)}, needs {FEWEST_CLUSTERS}"
    if found.difference <= 0 or found.p > 1 - LEVEL:
        return f"n/a: full is not shown to be above blind (p {found.p:.2g})"
    return ""


def gain_kept(method: SufficientStatistics, full: SufficientStatistics, blind: SufficientStatistics) -> Interval:
    """(method - blind) / (full - blind) in percent with its 95 % interval; the mean is NaN if `no_gain` says why.

    Raises:
        UserError: the scores are not about the same questions.
    """
    if reason := no_gain(full, blind):
        return Interval(math.nan, None, None, reason)
    m, f, b = (float(one.value(one.sums.sum(0))) for one in (method, full, blind))
    gain = (m - b) / (f - b)
    pairs = pair(method, mixture(full, blind, gain))
    shares = 100 * influences(pairs, 1.0) / (f - b)
    variance = float(pairs.counts @ shares**2) * pairs.clusters / (pairs.clusters - 1)
    same = f"n/a: every {full.unit} keeps the same share"
    return from_spread(100 * gain, variance**0.5, shares, pairs.counts, same)


Terms = Mapping[str, Mapping[int, SufficientStatistics]]  # method -> budget -> score


def gains(methods: Terms, full: SufficientStatistics, blind: SufficientStatistics) -> dict[str, dict[int, Interval]]:
    """What each method keeps of the visual gain at each budget."""
    return {name: {n: gain_kept(one, full, blind) for n, one in budgets.items()} for name, budgets in methods.items()}


def blind_record(
    named: Collection[str],
    methods: Terms,
    full: SufficientStatistics,
    blind: SufficientStatistics,
    share: float,
    floor: "Floor | None",
) -> dict[str, Any]:
    """What is known without seeing, and from which budget on methods keep a share of what seeing adds, in JSON types.

    Args:
        named: the methods to test.
        floor: of these questions; None if it was not computed.
    """
    reason = no_gain(full, blind)
    mixed = mixture(full, blind, share)
    tested = (
        {} if reason else {name: tokens_needed(mixed, methods[name], 1.0, bounds=False, whole=True) for name in named}
    )
    return {
        "no_gain": reason,
        "share": share,
        "gain_needed": {name: asdict(found) | {"text": found.text} for name, found in tested.items()},
        "floor": None if floor is None else asdict(floor),
    }


def gain_lines(record: Mapping[str, Any]) -> list[str]:
    """A record of `blind_record` in sentences."""
    lines = []
    if record["no_gain"]:
        lines.append(f"visual gain kept is {record['no_gain']}.")
    for name, needed in record["gain_needed"].items():
        tests = ", ".join(f"{budget}: {p_text(test['p'])}" for budget, test in needed["tests"].items())
        lines.append(
            f"{name} needs {needed['text']} tokens to keep {100 * record['share']:g} % of the visual gain, (method - "
            f"none) / (full - none) (the same test; p by budget: {tests})."
        )
    return lines + ([Floor(**record["floor"]).text] if record["floor"] else [])


def answerable_blind(benchmark: str) -> list[str]:
    """A sentence about a benchmark that is mostly answerable without its images; [] for others."""
    known = benchmarks.get(benchmark).blind
    return [f"{benchmark} is mostly answerable without its images: {known}"] if known else []


# -- the floor --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """What needs no model.

    Attributes:
        value: in the unit of the main number; None if it is not known.
        how: what it is, or why it is not known, in words.
    """

    value: float | None
    how: str

    @property
    def text(self) -> str:
        """The floor in a sentence."""
        known = self.how if self.value is None else f"{rounded(self.value)} ({self.how})"
        return f"floor, without any model: {known}."


def floor_of(data: Dataset, asked: Collection[str], folder: Path, split: str, profile: str | None) -> Floor:
    """The expected score of guessing among the options; for open questions, that of another split's usual answers.

    Args:
        asked: ids of the questions.
        folder, split, profile: where the questions come from; another split is searched there.
    """
    questions = [question for question in data.questions if question.id in asked]
    if not all(question.answer for question in questions):
        return Floor(None, "n/a: the questions have no answers")
    polar = all(question.answer.lower() in POLAR for question in questions)
    options = {question.id: POLAR if polar else options_of(question.question) for question in questions}
    if 2 * sum(map(bool, options.values())) >= len(options):
        return guessed(data, questions, options)
    benchmark = benchmarks.get(data.benchmark)
    for other in benchmark.splits:
        try:
            read = () if other == split else benchmark.load(folder, other, profile, "official").questions
        except UserError:  # it is not there, and is not fetched for this
            continue
        if known := [question for question in read if question.answer]:
            usual = {kind: most_frequent(known, kind) for kind in {question.kind for question in known}}
            texts = {one.id: usual.get(one.kind) or most_frequent(known) for one in questions}
            return Floor(main_of(data, texts), f"the most frequent answer to such questions in the split {other}")
    return Floor(None, NO_OTHER_SPLIT)


def options_of(text: str) -> tuple[str, ...]:
    """The letters A, B, ... of the options that a question lists in this order; () if there are not two."""
    found, place = [], 0
    for letter in ascii_uppercase:
        if (mark := re.compile(rf"(?:^|[\s(]){letter}[.:)]\s").search(text, place)) is None:
            break
        found.append(letter)
        place = mark.end() - 1
    return tuple(found) if len(found) > 1 else ()


def guessed(data: Dataset, questions: Sequence[Question], options: Mapping[str, Sequence[str]]) -> Floor:
    """1 / options where the score is the mean over questions, otherwise the mean score of random guesses."""
    draw = random.Random(0)

    def guess() -> dict[str, str]:
        return {name: draw.choice(known) if known else "" for name, known in options.items()}

    open_ = sum(not known for known in options.values())
    more = f"; {open_:,} of {len(options):,} questions list none and count as 0" if open_ else ""
    texts, rule = guess(), data.sample_score
    score = data.score(list(texts), texts)
    names = score.correct.keys() if score.terms is None else set(score.terms.names)
    if rule is not None and names <= options.keys():
        each = [rule(question, texts[question.id]) for question in questions if question.id in names]
        if math.isclose(100 * fmean(each), score.values.get(score.main) or 0.0, abs_tol=1e-6):
            chance = fmean(1 / len(options[name]) if options[name] else 0.0 for name in names)
            return Floor(100 * chance, f"1 / options{more}")
    found = fmean(main_of(data, guess()) or 0.0 for _ in range(GUESSES))
    return Floor(found, f"mean of {GUESSES} random guesses among the options{more}")


def most_frequent(questions: Sequence[Question], kind: str | None = None) -> str:
    """The most frequent answer, on a tie the first; of questions of one kind, if one is named."""
    counts = Counter(question.answer for question in questions if kind in (None, question.kind))
    return counts.most_common(1)[0][0]


def main_of(data: Dataset, texts: Mapping[str, str]) -> float | None:
    """The main number of these answers."""
    score = data.score(list(texts), texts)
    return score.values.get(score.main)
