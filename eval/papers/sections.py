"""The further tables of a page: costs, statistics over the benchmarks, and paired tests between methods."""

from collections.abc import Callable, Iterable, Mapping

from eval.papers.cells import Cell, Measured
from eval.papers.document import MARK, MARK_TEXT, Section, label, number, ours_text, published_text
from eval.papers.gate import values_of
from eval.papers.published import AVERAGE, Published
from eval.papers.runs import Time
from eval.papers.spec import Budget, Place, Row, Table
from eval.results.statistics import (
    LEVEL,
    RESAMPLES,
    Comparison,
    Interval,
    accuracy_terms,
    all_pairs,
    compare,
    holm,
    interval,
)
from eval.statistics.answers import hard_questions, same_answers
from eval.statistics.relative import Scores, relative_iqm, relative_mean, tokens_needed
from eval.tables.page import csv_numbers, difference_text, score_text
from llava.errors import UserError

Times = Mapping[int, Time]
# Line -> benchmark -> the paper's method minus this line, where the difference is significant.
Clear = Mapping[int, Mapping[str, Comparison]]
# Budget -> (line, line) -> their difference, corrected over all pairs of the budget.
Pairs = Mapping[Budget, Mapping[tuple[int, int], Comparison]]


def sections_of(
    table: Table,
    found: Measured,
    times: Times,
    source: Published | None = None,
    place: Place | None = None,
    clear: Clear | None = None,
    pairs: Pairs | None = None,
) -> list[Section]:
    """The sections of a table's kind; of a score table and an overview only those that have rows.

    Args:
        source, place: the published values and the model they are of; None where they are left out.
        clear: of `clear_differences`, for a score table.
        pairs: of `pairs_of`, for an overview.
    """
    known = [published_costs(found, times, source, place)] if source and place else []
    known = [section for section in known if section.rows]
    if table.kind == "ablation":
        return [ablation(table, found), costs(found, times), *known]
    if table.kind == "efficiency":
        return [costs(found, times, scored=True), *known]
    if table.kind == "overview":
        budgets = [costs_at(found, times, budget, pairs or {}) for budget in table.budgets]
        tested = [claims(table, found)] if any(row.claim for row in table.rows) else []
        return [overview(table, found), *tested, significance(found, pairs or {}), *budgets, *known]
    variants = [section for section in [releases(found)] if section.rows]
    tested = [needed(found), against(table, found, clear or {})]
    return [aggregates(found), *variants, *tested, costs(found, times), *known]


# -- costs ------------------------------------------------------------------------------------------------------------


def costs(found: Measured, times: Times, scored: bool = False, lines: Iterable[int] | None = None) -> Section:
    """What one question costs, beside the unreduced model.

    Args:
        scored: also show what it scores, for a page that has no table of scores.
        lines: all if left out.
    """
    rows = []
    for index in range(len(found.lines)) if lines is None else lines:
        cell, full = first(found, index), first(found, 0)
        if cell is None or full is None:
            continue
        row = [label(found, index), str(found.lines[index].budget or "all"), f"{cell.tokens:.1f}"]
        row += [f"{cell.kv_bytes / 1e6:.2f}", f"{full.kv_bytes / cell.kv_bytes:.2f}x"]
        flops = (cell.flops or 0.0, full.flops or 0.0)
        row += [f"{flops[0] / 1e9:.2f}", f"{flops[1] / flops[0]:.2f}x"] if all(flops) else ["n/a", "n/a"]
        time, base = times.get(index), times.get(0)
        row += [f"{1000 * time.ttft:.1f}", f"{base.ttft / time.ttft:.2f}x"] if time and base else ["n/a", "n/a"]
        rows.append([*row, *(ours_text(cell) for cell in found.row(index).values())] if scored else row)
    about = (
        f"Of {found.columns[0].title}: tokens that entered a layer (mean over layers), key/value cache, and operations "
        "of a question asked alone, vision tower included. "
    )
    about += next(iter(times.values())).about if times else "Times were not measured in this run (--times)."
    header = [
        "method",
        "budget",
        "tokens",
        "KV MB",
        "KV smaller",
        "GFLOP",
        "fewer operations",
        "TTFT ms",
        "TTFT faster",
    ]
    header += [column.title for column in found.columns] if scored else []
    return Section("Costs", about + mark_text(found), header, rows)


def mark_text(found: Measured) -> str:
    """What the mark of rows that count their budget otherwise means, where there are such rows."""
    return f" {MARK} {MARK_TEXT}." if any(line.by_kept for line in found.lines) else ""


def first(found: Measured, index: int) -> Cell | None:
    """The cell of the first benchmark."""
    return found.cells.get((index, found.columns[0].benchmark))


def published_costs(found: Measured, times: Times, source: Published, place: Place) -> Section:
    """The averages and costs that sources print, beside ours."""
    names = {AVERAGE: "average, %", "tflops": "TFLOP", "latency_ms": "latency, ms", "speedup": "speed-up"}
    rows = []
    for index, line in enumerate(found.lines):
        texts = [published_text(values_of(line, name, source, place), place.convention) for name in names]
        cell, average, time = first(found, index), found.of_full(index), times.get(index)
        if cell is not None and any(text not in ("", "n/a") for text in texts):
            ours = [
                "n/a" if average is None else f"{average:.1f}",
                "n/a" if cell.flops is None else f"{cell.flops / 1e12:.2f}",
                "n/a" if time is None else f"{1000 * time.ttft:.1f}",
            ]
            rows.append([label(found, index), str(line.budget or "all"), *(text or "n/a" for text in texts), *ours])
    about = (
        "As printed, with the source in brackets. Nothing here is compared: sources average over other benchmarks and "
        "by other rules, count operations otherwise, and mostly name no GPU, batch size or data set."
    )
    header = ["method", "budget", *(f"published {name}" for name in names.values()), "our average, %", "our TFLOP"]
    return Section("Published averages and costs", about, [*header, "our TTFT, ms"], rows)


# -- statistics of a score table --------------------------------------------------------------------------------------


def releases(found: Measured) -> Section:
    """Our variants of methods whose release is a row, minus the release, on every benchmark."""
    rows = []
    for index, line in enumerate(found.lines):
        if line.row is None or line.row.runs_release:
            continue
        same = (i for i, one in enumerate(found.lines) if (one.method, one.budget) == (line.method, line.budget))
        release = next((i for i in same if (row := found.lines[i].row) and row.runs_release), -1)
        ours, cells = found.row(index), found.row(release)
        if not ours or not cells:
            continue
        texts = [
            difference_text(compare(ours[c.benchmark].terms, cells[c.benchmark].terms))
            if c.benchmark in ours and c.benchmark in cells
            else "n/a"
            for c in found.columns
        ]
        rows.append([label(found, index), found.lines[release].title, str(line.budget), *texts])
    about = (
        "Our variant minus the release at the same budget, paired, with 95 % intervals, not corrected for their number."
    )
    header = ["variant", "release", "budget", *(column.title for column in found.columns)]
    return Section("Variants against their releases", about, header, rows)


def aggregates(found: Measured) -> Section:
    """Averages over the benchmarks with intervals, loyalty, and accuracy on the questions that downsampling loses."""
    rows = []
    full = found.row(0)
    for index, line in enumerate(found.lines):
        row = found.row(index)
        if index == 0 or not row:
            continue
        pairs = {name: (cell.terms, full[name].terms) for name, cell in row.items()}
        same_budget = (
            i for i, one in enumerate(found.lines) if one.budget == line.budget and one.method == "downsample"
        )
        control = found.row(next(same_budget, -1))
        rows.append(
            [
                label(found, index),
                str(line.budget),
                *(relative_text(average, pairs, len(full)) for average in (relative_mean, relative_iqm)),
                score_text(pooled_loyalty(row, full)),
                hard_text(row, full, control),
            ]
        )
    about = (
        "Average (mean) and interquartile mean, over the benchmarks, of the scores above in percent of full; loyalty: "
        "questions with the same answer as full, in the benchmark's own form of an answer; hard questions: right with "
        "full, wrong with the downsampled image of as many tokens "
        "(group A of VTC-Bench). 95 % intervals in brackets. Definitions: docs/statistics.md."
    )
    header = ["method", "budget", "average, % of full", "interquartile mean, %", "loyalty, %", "hard questions, %"]
    return Section("Averages, loyalty and hard questions", about, header, rows)


def relative_text(average: Callable[[Scores], Interval], pairs: Scores, count: int) -> str:
    """An average with its interval, or why there is none: a benchmark is missing, or full scores 0 on a resample, as a
    few questions can make it."""
    if len(pairs) < count:
        return f"n/a: a result on {count - len(pairs)} of {count} benchmarks is missing"
    try:
        return score_text(average(pairs))
    except UserError as error:
        return f"n/a: {str(error).partition(',')[0]}"


def pooled_loyalty(row: Mapping[str, Cell], full: Mapping[str, Cell]) -> Interval:
    """Over all questions of all benchmarks; images of different benchmarks are different units."""
    same = {
        f"{name} {key}": value
        for name, cell in row.items()
        for key, value in same_answers(cell.texts, full[name].texts, cell.normalise).items()
    }
    return interval(accuracy_terms(same, clusters_of(row)))


def clusters_of(row: Mapping[str, Cell]) -> dict[str, str]:
    """Question of a benchmark -> image of that benchmark."""
    return {f"{name} {key}": f"{name} {image}" for name, cell in row.items() for key, image in cell.clusters.items()}


def hard_text(row: Mapping[str, Cell], full: Mapping[str, Cell], control: Mapping[str, Cell]) -> str:
    """Accuracy on the hard questions of all benchmarks that score single answers, and how many these are."""
    credits: dict[str, float] = {}
    for name, cell in row.items():
        if name in control and cell.credits and full[name].credits and control[name].credits:
            hard = hard_questions(full[name].credits, control[name].credits)["group_a"]
            credits |= {f"{name} {key}": cell.credits[key] for key in hard}
    if not credits:
        return "n/a"
    return f"{score_text(interval(accuracy_terms(credits, clusters_of(row))))} of {len(credits):,}"


def needed(found: Measured) -> Section:
    """The smallest budget of each method at which 99 % of full are shown, for each benchmark."""
    by_method: dict[str, dict[int, int]] = {}
    for index, line in enumerate(found.lines):
        if index and found.row(index):
            cell = next(iter(found.row(index).values()))
            by_method.setdefault(line.title, {})[round(cell.tokens)] = index
    rows = [
        [title, *(needed_text(found, budgets, column.benchmark) for column in found.columns)]
        for title, budgets in by_method.items()
    ]
    about = (
        "The smallest measured number of tokens from which on a one-sided non-inferiority test at 5 % shows more than "
        "99 % of the unreduced score. Small sets show it for few methods. Definition: docs/statistics.md."
    )
    return Section("Tokens needed for 99 % of full", about, ["method", *(c.title for c in found.columns)], rows)


def needed_text(found: Measured, budgets: Mapping[int, int], benchmark: str) -> str:
    full = found.cells[0, benchmark].terms
    try:
        cells = {budget: found.cells.get((index, benchmark)) for budget, index in budgets.items()}
        known = {budget: cell.terms for budget, cell in cells.items() if cell is not None}
        return tokens_needed(full, known).text.replace("more than", ">")
    except UserError:
        return "n/a"


def against(table: Table, found: Measured, clear: Clear) -> Section:
    """On how many benchmarks the paper's method is significantly better and worse than each other method."""
    titles = {column.benchmark: column.title for column in found.columns}
    rows = []
    for index, differences in clear.items():
        better = sum(one.difference > 0 for one in differences.values())
        texts = "; ".join(f"{titles[name]} {difference_text(one)}" for name, one in differences.items()) or "none"
        line = found.lines[index]
        rows.append([line.title, str(line.budget), str(better), str(len(differences) - better), texts])
    title = next((line.title for line in found.lines if line.method == table.ours), table.ours)
    about = (
        f"{title} minus each method at the same budget, paired permutation tests by image on every benchmark. p-values "
        "are corrected by Holm over the benchmarks of one row, not over the rows. Listed are the differences that are "
        "significant at 5 %."
    )
    header = ["method", "budget", f"{title} better on", "worse on", "significant differences [95 % interval]"]
    return Section(f"{title} against each method", about, header, rows)


def clear_differences(table: Table, found: Measured) -> Clear:
    """The significant differences of every line that is compared with the paper's method at the same budget."""
    clear = {}
    for index, line in enumerate(found.lines):
        ours = ours_at(table, found, line.budget)
        if index and not line.by_kept and ours is not None and ours != index and found.row(index):
            clear[index] = significant(found.row(ours), found.row(index))
    return clear


def ours_at(table: Table, found: Measured, budget: object) -> int | None:
    """The first line of the paper's method at a budget."""
    for index, line in enumerate(found.lines):
        if line.method == table.ours and line.budget == budget:
            return index if found.row(index) and not line.by_kept else None
    return None


def significant(ours: Mapping[str, Cell], other: Mapping[str, Cell]) -> dict[str, Comparison]:
    """Benchmark -> ours minus other, where a paired test finds a difference, corrected by Holm over the benchmarks."""
    names = [name for name in ours if name in other]
    found = [compare(ours[name].terms, other[name].terms, RESAMPLES // 2) for name in names]
    corrected = holm([one.p for one in found])
    return {name: one for name, one, p in zip(names, found, corrected, strict=True) if p <= 1 - LEVEL}


# -- one method's choices, and all methods on one benchmark -----------------------------------------------------------


def by_row(table: Table, found: Measured) -> list[tuple[Row, dict[Budget | None, int]]]:
    """Every row of the table with its lines by budget."""
    rows: dict[int, dict[Budget | None, int]] = {id(row): {} for row in table.rows}  # rows have no hash
    for index, line in enumerate(found.lines):
        if line.row is not None:
            rows[id(line.row)][line.budget] = index
    return [(row, rows[id(row)]) for row in table.rows]


def defaults_of(table: Table, found: Measured) -> dict[Budget | None, int]:
    """Budget -> line of the paper's method with its defaults; empty where it is not among the rows."""
    rows = by_row(table, found)
    return next((lines for row, lines in rows if row.method == table.ours and not row.options), {})


def ablation(table: Table, found: Measured) -> Section:
    """Every choice beside the method's defaults, paired over images; two columns per benchmark and budget."""
    budgets, default = list(dict.fromkeys(line.budget for line in found.lines[1:])), defaults_of(table, found)
    rows = []
    for row, lines in by_row(table, found):
        cells = [f"{row.group}: {row.title}" if row.group else row.title]
        for budget in budgets:
            for column in found.columns:
                cells += compared(found, lines[budget], default.get(budget), column.benchmark)
        rows.append(cells)
    heads = [f"{column.title}, {budget} tokens" for budget in budgets for column in found.columns]
    header = ["choice", *(text for head in heads for text in (head, "against the default [95 % CI]"))]
    about = "One choice at a time around the method's defaults; differences are paired over images."
    return Section("One choice at a time", about, header, rows)


def compared(found: Measured, index: int, base: int | None, benchmark: str) -> list[str]:
    """A score, and its difference to the defaults."""
    cell = found.cells.get((index, benchmark))
    default = None if base is None else found.cells.get((base, benchmark))
    if cell is None:
        return ["n/a", "cannot run"]
    text = number(cell.value, cell.points)
    if base is None or default is None:
        return [text, "n/a"]
    if found.lines[index].setting == found.lines[base].setting:
        return [f"**{text}**", "default"]
    return [text, difference_text(compare(cell.terms, default.terms))]


def pairs_of(found: Measured) -> Pairs:
    """Every two lines of a budget, compared on the one benchmark of an overview."""
    by_budget: dict[Budget, dict[int, Cell]] = {}
    for index, line in enumerate(found.lines):
        cell = first(found, index)
        if line.budget is not None and cell is not None:
            by_budget.setdefault(line.budget, {})[index] = cell
    return {budget: all_pairs({i: cell.terms for i, cell in cells.items()}) for budget, cells in by_budget.items()}


def pair_rows(found: Measured, pairs: Pairs) -> list[list[str]]:
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


def overview(table: Table, found: Measured) -> Section:
    """Methods by budgets, those with the highest lowest score first."""
    full = found.cells[0, found.columns[0].benchmark]
    rows = []
    for row, lines in by_row(table, found):
        cells = [first(found, lines[budget]) for budget in table.budgets]
        texts = ["n/a" if cell is None else ours_text(cell) + f" {MARK}" * cell.line.by_kept for cell in cells]
        rows.append((min(0.0 if cell is None else cell.value for cell in cells), [row.title, *texts]))
    rows.sort(key=lambda row: -row[0])
    about = (
        f"{found.columns[0].title} with 95 % intervals, {full.questions:,} of {full.available:,} questions about "
        f"{len(set(full.clusters.values())):,} images or videos."
    )
    header = ["method", *(f"{budget} tokens" for budget in table.budgets)]
    everything = [f"full ({full.tokens:.0f})", *[ours_text(full)] * len(table.budgets)]
    return Section("Overview", about + mark_text(found), header, [everything, *(texts for _, texts in rows)])


def claims(table: Table, found: Measured) -> Section:
    """The defaults of the paper's method minus the row of each claim: it holds, fails or stays open."""
    default, name = defaults_of(table, found), found.columns[0].benchmark
    rows = []
    for row, lines in by_row(table, found):
        pairs = [
            (found.cells.get((default.get(b, -1), name)), found.cells.get((lines[b], name))) for b in table.budgets
        ]
        rows += [[row.claim, *(claim_text(*pair) for pair in pairs)]] if row.claim else []
    about = (
        f"{table.ours} minus the row that a claim is about, paired over images [95 % interval]: a claim holds or fails "
        "where the interval leaves out 0, and stays open elsewhere."
    )
    return Section("Claims", about, ["claim", *(f"{budget} tokens" for budget in table.budgets)], rows)


def claim_text(ours: Cell | None, other: Cell | None) -> str:
    """A difference with the verdict on "better": holds, fails or open."""
    if ours is None or other is None:
        return "n/a"
    found = compare(ours.terms, other.terms)
    verdict = "open" if found.p > 1 - LEVEL else "holds" if found.difference > 0 else "fails"
    return f"{difference_text(found)} {verdict}"


def significance(found: Measured, pairs: Pairs) -> Section:
    """How many pairs differ at each budget, and the methods that no other one beats."""
    rows = []
    for budget, compared in pairs.items():
        clear = sum(one.p <= 1 - LEVEL for one in compared.values())
        best = [index for index in lines_at(found, budget) if not standing(index, compared)[1]]
        names = ", ".join(found.lines[index].title for index in best)
        rows.append([f"{budget} tokens", f"{clear} of {len(compared)}", names])
    about = (
        "Paired permutation tests by image at 5 %, two-sided, corrected by Holm over all pairs of methods at a budget. "
        "The last column has the methods that none is significantly better than."
    )
    return Section("Significance", about, ["budget", "pairs that differ", "best methods"], rows)


def lines_at(found: Measured, budget: Budget) -> list[int]:
    """The lines of a budget that have a score, the highest first."""
    cells = {i: cell for i, line in enumerate(found.lines) if line.budget == budget and (cell := first(found, i))}
    return sorted(cells, key=lambda index: -cells[index].value)


def costs_at(found: Measured, times: Times, budget: Budget, pairs: Pairs) -> Section:
    """Costs and scores of one budget, the highest score first, with how many methods each beats and loses to."""
    lines = lines_at(found, budget)
    section = costs(found, times, scored=True, lines=[0, *lines])
    places = [standing(index, pairs.get(budget, {})) for index in lines]
    verdicts = ["", *(f"{beats} / {lost}" + " **top**" * (not lost) for beats, lost in places)]
    rows = [[*row, verdict] for row, verdict in zip(section.rows, verdicts, strict=True)]
    return Section(f"Costs at {budget} tokens", section.about, [*section.columns, "beats / loses to"], rows)
