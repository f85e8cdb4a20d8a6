"""Methods that spend different numbers of tokens on different questions, beside fixed budgets.

`audit` says what was spent. `beside_line` compares such a method with a coin: at a fixed budget of B1 tokens for some
questions and of B2 for the others, chosen at random, any mean between B1 and B2 can be had without looking at the image
or the question. A method that decides by them should do better at the same mean. `oracle` knows which answers are
right, and says how much a perfect decision could gain. docs/statistics.md ("Adaptive budgets") defines all three.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from eval.metrics import SufficientStatistics, ratio_terms
from eval.results.statistics import Comparison, Interval, compare, interval, p_text, rounded, summed_by_cluster
from eval.statistics.answers import RIGHT, accuracy_on
from eval.tables import difference_text, markdown, score_text

# Means this near to each other, in tokens, count as the same budget; methods round theirs by as much.
ROUNDING = 0.5


@dataclass(frozen=True)
class Spent:
    """A run with the visual tokens of its questions with an image, as means over decoder layers and per image.

    Attributes:
        label: the method, with the options in which its runs differ.
        budget: that was asked for.
        scores: question id -> score in [0, 1]; None if single answers have no score.
        tokens: question id -> tokens of the pass that answers.
        paid: question id -> tokens of all passes; None where the answers do not record it.
        adaptive: whether the content of an image or a question decided their number.
    """

    label: str
    budget: int
    terms: SufficientStatistics
    scores: Mapping[str, float] | None
    tokens: Mapping[str, float]
    paid: Mapping[str, float] | None
    adaptive: bool

    @property
    def method(self) -> str:
        """The name of the method, without options."""
        return self.label.split()[0]


def spent(
    label: str,
    budget: int,
    terms: SufficientStatistics,
    scores: Mapping[str, float] | None,
    accounting: Mapping[str, Mapping[str, Any]],
) -> Spent | None:
    """A run with what it spent; None if its answers do not record that.

    Args:
        accounting: question id -> what eval.results.cost.accounting_record wrote, or {}.
    """
    known = {name: record for name, record in accounting.items() if record and record["visual_tokens"]}
    if not known or not all(accounting.values()):
        return None
    paid = {name: record["paid"] for name, record in known.items() if "paid" in record}
    return Spent(
        label,
        budget,
        terms,
        scores,
        {name: record["mean"] for name, record in known.items()},
        paid if len(paid) == len(known) else None,
        any(record["planned"] is None for record in known.values()),
    )


@dataclass(frozen=True)
class Audit:
    """The tokens of a run's questions: mean with its interval over clusters, and how far single questions are from it.

    Attributes:
        low, high: the 5th and the 95th percentile over the questions.
        paid: the mean over all passes; None if unknown.
    """

    mean: Interval
    least: float
    low: float
    high: float
    most: float
    paid: float | None


def audit(run: Spent, labels: Mapping[str, str]) -> Audit:
    """Summarise the tokens of a run.

    Args:
        labels: question id -> label of its cluster.
    """
    least, low, high, most = map(float, np.percentile(list(run.tokens.values()), (0, 5, 95, 100)))
    mean = interval(ratio_terms(run.tokens, labels, "image", scale=1))
    return Audit(mean, least, low, high, most, None if run.paid is None else fmean(run.paid.values()))


@dataclass(frozen=True)
class Line:
    """A method beside the mixture of two fixed budgets that spends as many tokens.

    Attributes:
        weight: share of the questions that the mixture asks at the larger budget.
        score: of the mixture.
        gain: the method's score minus that of the mixture.
    """

    weight: float
    score: float
    gain: Comparison


def beside_line(run: Spent, tokens: Mapping[str, float], low: Spent, high: Spent, labels: Mapping[str, str]) -> Line:
    """Compare a run with the mixture of two others at the same mean of tokens, by a paired permutation test.

    A cluster's row of the mixture is (1 - w) x its row at `low` + w x its row at `high`, so that three rows enter the
    test for each cluster. The weight w = (T - T1) / (T2 - T1) is estimated from the same questions. To first order a
    cluster whose questions spend e tokens more than the mixture would, summed, moves w by e / (n (T2 - T1)) for n
    questions, and the mixture's sums by as much of the way from `low` to `high`. This is added to its row. It changes
    no score, only the spread.

    Args:
        tokens: question id -> tokens of the run, those of the pass that answers or of all passes.
        low, high: runs at the fixed budgets below and above; the same one twice if it spends as much.
        labels: question id -> label of its cluster.
    """
    few, many = low.tokens, high.tokens
    mean, least, most = (fmean(one[name] for name in tokens) for one in (tokens, few, many))
    apart = most - least
    weight = min(1.0, max(0.0, (mean - least) / apart)) if apart else 0.0
    own, below, above = (summed_by_cluster(one.terms) for one in (run, low, high))
    clusters = tuple(dict.fromkeys(run.terms.clusters))
    excess = defaultdict[str, float](float)
    for name, here in tokens.items():
        excess[labels[name]] += here - (1 - weight) * few[name] - weight * many[name]
    moved = np.array([excess[label] for label in clusters])
    mixed = (1 - weight) * below + weight * above
    if apart:
        mixed += np.outer((moved - moved.mean()) / (len(tokens) * apart), (above - below).sum(0))
    whole = replace(run.terms, names=clusters, clusters=clusters, proportion=False)
    a, b = (replace(whole, sums=rows) for rows in (own, mixed))
    return Line(weight, float(b.value(b.sums.sum(0))), compare(a, b))


def around(mean: float, fixed: Sequence[Spent]) -> tuple[Spent, Spent] | None:
    """The runs that spend the next fewer and the next more tokens, the same one twice if it spends as many.

    None if `mean` is outside what they spend.
    """
    means = {fmean(run.tokens.values()): run for run in fixed}
    nearest = min(means, key=lambda one: abs(one - mean), default=math.inf)
    if abs(nearest - mean) <= ROUNDING:
        return means[nearest], means[nearest]
    below, above = [one for one in means if one < mean], [one for one in means if one > mean]
    return (means[max(below)], means[min(above)]) if below and above else None


@dataclass(frozen=True)
class Oracle:
    """What a rule could reach that knows which answers are right. A bound, not a method.

    Attributes:
        scores: question id -> sample score of the answer that it chooses.
        tokens: mean of the tokens of these answers.
    """

    scores: Mapping[str, float]
    tokens: float


def oracle(runs: Sequence[Spent], stable: bool = False) -> Oracle:
    """For every question, choose the smallest budget that answers it right, and the smallest of all if none does.

    Args:
        runs: of the same questions at different budgets. An answer is right if its sample score is above 0.5.
        stable: all larger budgets must answer it right, too.
    """
    runs = sorted(runs, key=lambda run: run.budget)
    table = [run.scores or {} for run in runs]
    scores, tokens = dict[str, float](), list[float]()
    for name in table[0]:
        right = [one[name] > RIGHT for one in table]
        fitting = [number for number in range(len(runs)) if (all(right[number:]) if stable else right[number])]
        chosen = fitting[0] if fitting else 0
        scores[name] = table[chosen][name]
        if name in runs[chosen].tokens:  # a question without an image has none
            tokens.append(runs[chosen].tokens[name])
    return Oracle(scores, fmean(tokens))


# -- what `vtr stats` says --------------------------------------------------------------------------------------------


def budgets_record(full: Spent | None, runs: Sequence[Spent], labels: Mapping[str, str]) -> dict[str, Any]:
    """Audits of all runs, lines of the adaptive ones, and oracles of methods with several budgets, in JSON types.

    Args:
        full: the run without reduction, the largest budget of every method.
        labels: question id -> label of its cluster.
    """
    by_label: dict[str, list[Spent]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    audits, lines, oracles = [], [], []
    for run in runs:
        about = {"method": run.label, "budget": run.budget}
        found = audit(run, labels)
        audits.append(about | {"adaptive": run.adaptive} | asdict(found))
        passes = {"answering": run.tokens}
        if run.paid is not None and run.paid != run.tokens:
            passes["all"] = run.paid
        for which, tokens in passes.items() if run.adaptive or len(passes) > 1 else ():
            mean, rows = fmean(tokens.values()), list[dict[str, Any]]()
            for label, others in by_label.items():
                ends = around(mean, [one for one in others if not one.adaptive and one is not run])
                if ends is not None:
                    of = {"line": label, "own": ends[0].method == run.method, "ends": [one.budget for one in ends]}
                    rows.append(of | asdict(beside_line(run, tokens, *ends, labels)))
            rows.sort(key=lambda row: (not row["own"], -row["score"]))
            lines.append(about | {"passes": which, "tokens": mean, "lines": rows})
    for label, own in by_label.items():
        whole = [full] if full and all(run.budget != full.budget for run in own) else []
        if len(own) > 1 and all(run.scores is not None for run in (*own, *whole)):
            kinds = {}
            for name in ("oracle", "stable"):
                best = oracle([*own, *whole], stable=name == "stable")
                score = accuracy_on(best.scores, list(best.scores), labels)
                kinds[name] = {"score": asdict(score), "tokens": best.tokens}
            oracles.append({"method": label, "budgets": sorted(one.budget for one in (*own, *whole)), "kinds": kinds})
    return {"audits": audits, "lines": lines, "oracles": oracles}


def budgets_lines(record: Mapping[str, Any], unit: str) -> list[str]:
    """The record of `budgets_record` as tables and sentences.

    Args:
        unit: of the main score, "%" or "".
    """
    found, shown = [], {(row["method"], row["budget"]) for row in record["lines"]}
    if shown:
        head = ["method", "asked", "tokens", "fewest", "5 %", "95 %", "most", "tokens paid"]
        rows = [
            [row["method"], f"{row['budget']:,}", score_text(Interval(**row["mean"]))]
            + [rounded(row[name]) for name in ("least", "low", "high", "most")]
            + ["n/a" if row["paid"] is None else rounded(row["paid"])]
            for row in record["audits"]
            if (row["method"], row["budget"]) in shown
        ]
        about = "Visual tokens of a question, as a mean over decoder layers, where not the budget alone decides them"
        found += ["", f"{about}:", "", markdown(head, rows)]
    rows = []
    for one in record["lines"]:
        paid = "" if one["passes"] == "answering" else " paid"
        for row in one["lines"]:
            low, high = row["ends"]
            mixed = f"{low:,}" if low == high else f"{rounded(100 * row['weight'], 0)} % at {high:,}, others at {low:,}"
            gain = Comparison(**row["gain"])
            numbers = rounded(row["score"]), difference_text(gain), p_text(gain.p)
            rows.append([one["method"], f"{rounded(one['tokens'])}{paid}", row["line"], mixed, *numbers])
    if rows:
        head = ["method", "tokens", "line of", "questions at random", f"line {unit}".strip(), "method − line", "p"]
        found += ["", "Beside fixed budgets that spend as many tokens (own method first, then the best line first):"]
        found += ["", markdown(head, rows)]
    for one in record["lines"]:
        if not any(row["own"] for row in one["lines"]):
            mean = rounded(one["tokens"])
            found += [
                f"{one['method']} at {one['budget']:,} has no line of its own: give runs of the same method at a fixed "
                f"budget below and one above {mean} tokens."
            ]
    if record["oracles"]:
        head = ["method", "budgets", "accuracy %", "tokens", "stable, accuracy %", "stable, tokens"]
        rows = []
        for one in record["oracles"]:
            cells = [(score_text(Interval(**kind["score"])), rounded(kind["tokens"])) for kind in one["kinds"].values()]
            budgets = ", ".join(f"{budget:,}" for budget in one["budgets"])
            rows.append([one["method"], budgets, *cells[0], *cells[1]])
        about = "Budget oracle, which knows the right answers: a bound for choosing among these budgets, not a method"
        found += ["", f"{about}:", "", markdown(head, rows), ""]
    return found
