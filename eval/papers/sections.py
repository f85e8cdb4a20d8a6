"""The further tables of a page: costs, statistics over the benchmarks, and paired tests between methods."""

import math
from collections.abc import Iterable, Mapping, Sequence

from eval.papers.cells import Cell, MeasuredTable
from eval.papers.document import MARK_TEXTS, Section, label, marked, marks_of, number, ours_text
from eval.papers.runs import Time
from eval.papers.spec import Budget, Table, TableRow
from eval.results.statistics import (
    LEVEL,
    Comparison,
    Interval,
    accuracy_terms,
    all_pairs,
    compare,
    holm,
    interval,
    rounded,
)
from eval.statistics.answers import hard_questions, same_answers
from eval.statistics.gain import gain_kept, no_gain
from eval.statistics.relative import Scores, relative_mean, tokens_needed
from eval.tables import csv_numbers, difference_text, score_text
from llava.budget import BLIND
from llava.errors import UserError

Times = Mapping[int, Time]
# Line -> benchmark -> the paper's method minus this line, where the difference is significant.
Clear = Mapping[int, Mapping[str, Comparison]]
# Budget -> (line, line) -> their difference, corrected over all pairs of the budget.
Pairs = Mapping[Budget, Mapping[tuple[int, int], Comparison]]


def sections_of(table: Table, found: MeasuredTable, times: Times, clear: Clear, pairs: Pairs) -> list[Section]:
    """The sections of a table's kind that have rows.

    Args:
        clear: of `clear_differences`, for a score table.
        pairs: of `pairs_of`, for an overview.
    """
    if table.kind == "ablation":
        sections = [ablation(table, found), costs(found, times)]
    elif table.kind == "efficiency":
        sections = [costs(found, times, scored=True)]
    elif table.kind == "overview":
        sections = [overview(table, found), claims(table, found), significance(found, pairs)]
        sections += [costs_at(found, times, budget, pairs) for budget in table.budgets]
    else:
        sections = [row_pairs(found), aggregates(found), releases(found), needed(found)]
        sections += [against(table, found, clear), costs(found, times)]
    sections.append(visual_gain(found))
    return [section for section in sections if section.rows]


# -- costs ------------------------------------------------------------------------------------------------------------


def costs(found: MeasuredTable, times: Times, scored: bool = False, lines: Iterable[int] | None = None) -> Section:
    """What one question costs, compared with the unreduced model.

    Args:
        scored: also show the scores, for a page that has no table of scores.
        lines: which lines to show; all if left out.
    """
    rows = []
    for index in range(len(found.lines)) if lines is None else lines:
        cell, full = found.first(index), found.first(0)
        if cell is None or full is None:
            continue
        row = [label(found, index), found.lines[index].size, cell.spread or rounded(cell.tokens)]
        row += [rounded(cell.kv_bytes / 1e6, 2), f"{rounded(full.kv_bytes / cell.kv_bytes, 2)}x"]
        flops = (cell.flops or 0.0, full.flops or 0.0)
        row += [rounded(flops[0] / 1e9, 2), f"{rounded(flops[1] / flops[0], 2)}x"] if all(flops) else ["n/a", "n/a"]
        time, base = times.get(index), times.get(0)
        faster = [rounded(1000 * time.ttft), f"{rounded(base.ttft / time.ttft, 2)}x"] if time and base else []
        row += faster or ["n/a", "n/a"]
        rows.append([*row, *(ours_text(cell) for cell in found.row(index).values())] if scored else row)
    about = (
        f"Of {found.columns[0].title}: tokens that entered a layer (mean over layers), key/value cache, and operations "
        "of a question asked alone, vision tower included. "
    )
    about += next(iter(times.values())).about if times else "Times were not measured in this run (--times)."
    header = ["method", "budget", "tokens", "KV MB", "KV smaller", "GFLOP", "fewer operations"]
    header += ["TTFT ms", "TTFT faster", *(column.title for column in found.columns if scored)]
    return Section("Costs", about + mark_text(found), header, rows)


def mark_text(found: MeasuredTable) -> str:
    """What the marks of rows with other tokens than their budget mean; "" if there are no such rows."""
    return "".join(f" {mark} {MARK_TEXTS[mark]}." for mark in marks_of(found))


def left_out(found: MeasuredTable) -> str:
    """A sentence that rows with other tokens than their budget are left out; "" if there are no such rows."""
    marks = " and ".join(marks_of(found))
    return f" Rows marked {marks} are left out." if marks else ""


# -- statistics of a score table --------------------------------------------------------------------------------------


def difference(one: Cell | None, other: Cell | None) -> Comparison | None:
    """One cell minus another of the same benchmark; None if one is missing or has other tokens than its budget."""
    if one is None or other is None or one.line.mark or other.line.mark:
        return None
    return compare(one.terms, other.terms)


def releases(found: MeasuredTable) -> Section:
    """The difference between our variant of a method and the authors' release, if both are rows of the table."""
    released = {(line.row.method, line.budget): i for i, line in enumerate(found.lines) if line.row.runs_release}
    bases = {
        index: released.get((line.row.method, line.budget))
        for index, line in enumerate(found.lines)
        if not line.row.runs_release
    }
    about = "Our variant minus the release"
    return minus(found, bases, "Variants against their releases", about, ["variant", "release"])


def row_pairs(found: MeasuredTable) -> Section:
    """The rows that the table sets against another one: a variant minus what it is a variant of."""
    places = {(line.title, line.budget): index for index, line in enumerate(found.lines)}
    bases = {
        index: places.get((line.row.against, line.budget)) for index, line in enumerate(found.lines) if line.row.against
    }
    return minus(found, bases, "Pairs of rows", "The first row minus the second", ["row", "minus"])


def minus(
    found: MeasuredTable, bases: Mapping[int, int | None], title: str, about: str, heads: Sequence[str]
) -> Section:
    """Paired differences of lines on every benchmark; lines with other tokens than their budget are left out.

    Args:
        bases: line -> the line that is subtracted; None if the table has none.
        about: what is subtracted from what.
        heads: of the columns with the two names.
    """
    rows = []
    for index, base in bases.items():
        if base is None or found.lines[index].mark or found.lines[base].mark:
            continue
        ours, theirs = found.row(index), found.row(base)
        if not ours or not theirs:
            continue
        both = [(ours.get(column.benchmark), theirs.get(column.benchmark)) for column in found.columns]
        texts = [difference_text(one) if (one := difference(*cells)) else "n/a" for cells in both]
        rows.append([label(found, index), found.lines[base].title, str(found.lines[index].budget), *texts])
    about += " at the same budget, paired, with 95 % intervals, not corrected for their number." + left_out(found)
    return Section(title, about, [*heads, "budget", *(column.title for column in found.columns)], rows)


def aggregates(found: MeasuredTable) -> Section:
    """Averages over the benchmarks with intervals, loyalty, and accuracy on the questions that downsampling loses."""
    rows = []
    full = found.row(0)
    for index, line in enumerate(found.lines):
        row = found.row(index)
        if line.budget is None or not row:
            continue
        pairs = {name: (cell.terms, full[name].terms) for name, cell in row.items()}
        # A row that has other tokens than its budget is not compared with the downsampled image of that budget.
        same_budget = (
            i
            for i, one in enumerate(found.lines)
            if one.budget == line.budget and one.row.method == "downsample" and not line.mark
        )
        control = found.row(next(same_budget, -1))
        rows.append(
            [
                label(found, index),
                str(line.budget),
                relative_text(pairs, len(full)),
                score_text(pooled_loyalty(row, full)),
                hard_text(row, full, control),
            ]
        )
    about = (
        "Average: mean over the benchmarks of the scores above in percent of full; loyalty: "
        "questions with the same answer as full, in the benchmark's own form of an answer; hard questions: right with "
        "full, wrong with the downsampled image of as many tokens "
        "(group A of VTC-Bench). 95 % intervals in brackets. Definitions: docs/statistics.md."
    )
    header = ["method", "budget", "average, % of full", "loyalty, %", "hard questions, %"]
    return Section("Averages, loyalty and hard questions", about, header, rows)


def relative_text(pairs: Scores, count: int) -> str:
    """An average with its interval, or why there is none: a benchmark is missing, or full scores 0 there."""
    if len(pairs) < count:
        return f"n/a: a result on {count - len(pairs)} of {count} benchmarks is missing"
    try:
        return score_text(relative_mean(pairs))
    except UserError as error:
        return f"n/a: {str(error).partition(',')[0]}"


def pooled_loyalty(row: Mapping[str, Cell], full: Mapping[str, Cell]) -> Interval:
    """The share of questions with an image that are answered as by the unreduced model, over all benchmarks.

    Images of different benchmarks are different units of the interval.
    """
    same = {
        f"{name} {key}": value
        for name, cell in row.items()
        for key, value in same_answers(cell.texts, full[name].texts, cell.normalise).items()
        if key in cell.clusters
    }
    return interval(accuracy_terms(same, clusters_of(row)))


def clusters_of(row: Mapping[str, Cell]) -> dict[str, str]:
    """ "BENCHMARK QUESTION" -> "BENCHMARK IMAGE", which are unique over all benchmarks."""
    return {f"{name} {key}": f"{name} {image}" for name, cell in row.items() for key, image in cell.clusters.items()}


def hard_text(row: Mapping[str, Cell], full: Mapping[str, Cell], control: Mapping[str, Cell]) -> str:
    """Accuracy on the hard questions of all benchmarks that score single answers, and how many these are."""
    sample_scores: dict[str, float] = {}
    for name, cell in row.items():
        if name in control and cell.sample_scores and full[name].sample_scores and control[name].sample_scores:
            hard = hard_questions(full[name].sample_scores, control[name].sample_scores)["group_a"]
            sample_scores |= {f"{name} {key}": cell.sample_scores[key] for key in hard if key in cell.clusters}
    if not sample_scores:
        return "n/a"
    return f"{score_text(interval(accuracy_terms(sample_scores, clusters_of(row))))} of {len(sample_scores):,}"


def visual_gain(found: MeasuredTable) -> Section:
    """What of the gain of seeing each line keeps, and the blind score and the floor; no rows without a run of none."""
    blind = next((found.row(i) for i, line in enumerate(found.lines) if line.row.method == BLIND), {})
    names, full = [column.benchmark for column in found.columns], found.row(0)
    rows = [["blind (none): score", "", *(ours_text(blind[name]) if name in blind else "n/a" for name in names)]]
    runs = [blind[name].stored if name in blind else None for name in names]
    floors = [(run.result.get("floor") or {}) if run else {} for run in runs]
    rows.append(["floor: score", "", *("n/a" if one.get("value") is None else rounded(one["value"]) for one in floors)])
    for index, line in enumerate(found.lines):
        if line.budget is None or line.mark or not (row := found.row(index)):
            continue
        both = [name in row and name in blind for name in names]
        kept = [
            gain_kept(row[name].terms, full[name].terms, blind[name].terms) if known else None
            for name, known in zip(names, both, strict=True)
        ]
        texts = ["n/a" if one is None or math.isnan(one.mean) else score_text(one) for one in kept]
        rows.append([label(found, index), str(line.budget), *texts])
    reasons = {name: no_gain(full[name].terms, cell.terms) for name, cell in blind.items()}
    about = (
        "(method - blind) / (full - blind) in percent, with 95 % intervals; the blind model is the same without any "
        "visual token. The floor needs no model: guessing among the options, or the usual answer of another split. "
        "Definitions: docs/statistics.md."
    ) + left_out(found)
    about += "".join(f" {c.title}: {reasons[c.benchmark]}." for c in found.columns if reasons.get(c.benchmark))
    head = ["method", "budget", *(column.title for column in found.columns)]
    return Section("Visual gain kept", about, head, rows if blind else [])


def needed(found: MeasuredTable) -> Section:
    """For each benchmark, the smallest budget at which a method is shown to keep 99 % of the unreduced score."""
    by_method: dict[str, dict[int, int]] = {}
    for index, line in enumerate(found.lines):
        if line.budget is not None and found.row(index) and not line.mark:
            cell = next(iter(found.row(index).values()))
            by_method.setdefault(line.title, {})[round(cell.tokens)] = index
    rows = [
        [title, *(needed_text(found, budgets, column.benchmark) for column in found.columns)]
        for title, budgets in by_method.items()
    ]
    about = (
        "The smallest measured number of tokens from which on a one-sided non-inferiority test at 5 % shows more than "
        "99 % of the unreduced score. Small sets show it for few methods. Definition: docs/statistics.md."
    ) + left_out(found)
    return Section("Tokens needed for 99 % of full", about, ["method", *(c.title for c in found.columns)], rows)


def needed_text(found: MeasuredTable, budgets: Mapping[int, int], benchmark: str) -> str:
    full = found.cells[0, benchmark].terms
    try:
        cells = {budget: found.cells.get((index, benchmark)) for budget, index in budgets.items()}
        known = {budget: cell.terms for budget, cell in cells.items() if cell is not None}
        return tokens_needed(full, known, bounds=False).text.replace("more than", ">")
    except UserError:
        return "n/a"


def against(table: Table, found: MeasuredTable, clear: Clear) -> Section:
    """On how many benchmarks the paper's method is significantly better and worse than each other method."""
    titles = {column.benchmark: column.title for column in found.columns}
    rows = []
    for index, differences in clear.items():
        better = sum(one.difference > 0 for one in differences.values())
        texts = "; ".join(f"{titles[name]} {difference_text(one)}" for name, one in differences.items()) or "none"
        line = found.lines[index]
        rows.append([line.title, str(line.budget), str(better), str(len(differences) - better), texts])
    title = next((line.title for line in found.lines if line.row.method == table.ours), table.ours)
    about = (
        f"{title} minus each method at the same budget, paired permutation tests by image on every benchmark. p-values "
        "are corrected by Holm over the benchmarks of one row, not over the rows. Listed are the differences that are "
        "significant at 5 %."
    ) + left_out(found)
    header = ["method", "budget", f"{title} better on", "worse on", "significant differences [95 % interval]"]
    return Section(f"{title} against each method", about, header, rows)


def clear_differences(table: Table, found: MeasuredTable) -> Clear:
    """The significant differences of every line that is compared with the paper's method at the same budget.

    A difference is significant if a paired test finds it, corrected by Holm over the benchmarks of the line.
    """
    bases: dict[Budget | None, int] = {}
    for index, line in enumerate(found.lines):
        if line.row.method == table.ours:
            bases.setdefault(line.budget, index)
    clear = {}
    for index, line in enumerate(found.lines):
        base = bases.get(line.budget, index)
        ours, other = found.row(base), found.row(index)
        if base == index or not (ours and other) or line.mark or found.lines[base].mark:
            continue
        tested = {name: compare(ours[name].terms, other[name].terms) for name in ours if name in other}
        corrected = holm([one.p for one in tested.values()])
        clear[index] = {name: one for (name, one), p in zip(tested.items(), corrected, strict=True) if p <= 1 - LEVEL}
    return clear


# -- one method's choices, and all methods on one benchmark -----------------------------------------------------------


def defaults_of(table: Table) -> TableRow | None:
    """The row of the paper's method with its defaults."""
    return next((row for row in table.rows if row.method == table.ours and not row.options), None)


def ablation(table: Table, found: MeasuredTable) -> Section:
    """Every choice compared with the method's defaults, paired over images; two columns per benchmark and budget."""
    places = [(budget, column) for budget in table.budgets for column in found.columns]
    defaults, rows = defaults_of(table), []
    for row in table.rows:
        texts = [f"{row.group}: {row.title}" if row.group else row.title]
        for budget, column in places:
            cell, default = (found.cell(one, budget, column.benchmark) for one in (row, defaults))
            if cell is None:
                texts += ["n/a", "cannot run"]
                continue
            text = marked(number(cell.value, cell.whole), cell.line)
            if default is not None and cell.line.run == default.line.run:
                texts += [f"**{text}**", "default"]
            else:
                one = difference(cell, default)
                texts += [text, difference_text(one) if one else "n/a"]
        rows.append(texts)
    heads = [f"{column.title}, {budget} tokens" for budget, column in places]
    header = ["choice", *(text for head in heads for text in (head, "against the default [95 % CI]"))]
    about = "One choice at a time around the method's defaults; differences are paired over images."
    return Section("One choice at a time", about + mark_text(found), header, rows)


def pairs_of(found: MeasuredTable) -> Pairs:
    """The difference of every two lines of a budget on the one benchmark of an overview.

    Lines with other tokens than their budget are left out.
    """
    by_budget: dict[Budget, dict[int, Cell]] = {}
    for index, line in enumerate(found.lines):
        cell = found.first(index)
        if line.budget is not None and cell is not None and not line.mark:
            by_budget.setdefault(line.budget, {})[index] = cell
    return {budget: all_pairs({i: cell.terms for i, cell in cells.items()}) for budget, cells in by_budget.items()}


def pair_rows(found: MeasuredTable, pairs: Pairs) -> list[list[str]]:
    """The rows of the file of pairs: budget, two methods, difference with its interval, corrected p-value."""
    rows = []
    for budget, compared in pairs.items():
        for both, one in compared.items():
            names = (found.lines[index].title for index in both)
            numbers = csv_numbers(one.difference, one.low, one.high)
            rows.append([str(budget), *names, *numbers, f"{one.p:.2g}"])
    return rows


def standing(index: int, pairs: Mapping[tuple[int, int], Comparison]) -> tuple[int, int]:
    """How many lines a line beats significantly, and how many it loses to."""
    ours = {both: one for both, one in pairs.items() if index in both and one.p <= 1 - LEVEL}
    beats = sum((one.difference > 0) == (both[0] == index) for both, one in ours.items())
    return beats, len(ours) - beats


def overview(table: Table, found: MeasuredTable) -> Section:
    """Methods by budgets, sorted by their lowest score, the highest first."""
    name = found.columns[0].benchmark
    full, rows = found.cells[0, name], []
    for row in table.rows:
        cells = [found.cell(row, budget, name) for budget in table.budgets]
        texts = ["n/a" if cell is None else marked(ours_text(cell), cell.line) for cell in cells]
        rows.append((min(0.0 if cell is None else cell.value for cell in cells), [row.title, *texts]))
    rows.sort(key=lambda row: -row[0])
    about = (
        f"{found.columns[0].title} with 95 % intervals, {full.questions:,} of {full.available:,} questions about "
        f"{len(set(full.clusters.values())):,} images or videos."
    )
    header = ["method", *(f"{budget} tokens" for budget in table.budgets)]
    everything = [f"full ({full.tokens:.0f})", *[ours_text(full)] * len(table.budgets)]
    return Section("Overview", about + mark_text(found), header, [everything, *(texts for _, texts in rows)])


def claims(table: Table, found: MeasuredTable) -> Section:
    """The defaults of the paper's method minus the row of each claim: it holds, fails or stays open."""
    defaults, name, rows = defaults_of(table), found.columns[0].benchmark, []
    for row in table.rows:
        texts = []
        for budget in table.budgets:
            one = difference(*(found.cell(which, budget, name) for which in (defaults, row)))
            verdict = "open" if one is None or one.p > 1 - LEVEL else "holds" if one.difference > 0 else "fails"
            texts.append("n/a" if one is None else f"{difference_text(one)} {verdict}")
        if row.claim:
            rows.append([row.claim, *texts])
    about = (
        f"{table.ours} minus the row that a claim is about, paired over images [95 % interval]: a claim holds or fails "
        "where the paired permutation test is significant at 5 %, and stays open elsewhere."
    )
    return Section("Claims", about, ["claim", *(f"{budget} tokens" for budget in table.budgets)], rows)


def significance(found: MeasuredTable, pairs: Pairs) -> Section:
    """How many pairs of methods differ at each budget, and which methods no other method beats."""
    rows = []
    for budget, compared in pairs.items():
        clear = sum(one.p <= 1 - LEVEL for one in compared.values())
        best = [
            index for index in lines_at(found, budget) if not (found.lines[index].mark or standing(index, compared)[1])
        ]
        names = ", ".join(found.lines[index].title for index in best)
        rows.append([f"{budget} tokens", f"{clear} of {len(compared)}", names])
    about = (
        "Paired permutation tests by image at 5 %, two-sided, corrected by Holm over all pairs of methods at a budget. "
        "The last column has the methods that none is significantly better than."
    ) + left_out(found)
    return Section("Significance", about, ["budget", "pairs that differ", "best methods"], rows)


def lines_at(found: MeasuredTable, budget: Budget) -> list[int]:
    """The lines of a budget that have a score, the highest first."""
    cells = {i: cell for i, line in enumerate(found.lines) if line.budget == budget and (cell := found.first(i))}
    return sorted(cells, key=lambda index: -cells[index].value)


def costs_at(found: MeasuredTable, times: Times, budget: Budget, pairs: Pairs) -> Section:
    """Costs and scores of one budget, the highest score first, with how many methods each beats and loses to."""
    lines = lines_at(found, budget)
    section = costs(found, times, scored=True, lines=[0, *lines])
    verdicts = [""]
    for index in lines:
        beats, lost = standing(index, pairs.get(budget, {}))
        verdict = f"{beats} / {lost}" + " **top**" * (not lost)
        verdicts.append("" if found.lines[index].mark else verdict)
    rows = [[*row, verdict] for row, verdict in zip(section.rows, verdicts, strict=True)]
    return Section(f"Costs at {budget} tokens", section.about, [*section.columns, "beats / loses to"], rows)
