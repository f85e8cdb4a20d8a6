"""Describe the benchmarks with their data sources, and write the toy models' scores on all of them.

    python -m lab.pages.benchmarks pages      # from the benchmarks' own metadata
    python -m lab.pages.benchmarks scores     # from finished runs of scripts/tables/embedded_benchmarks.sh

`pages` writes between markers of docs/benchmarks.md; `scores` between those of docs/toy_results.md, and writes
docs/tables/embedded_benchmarks.csv.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.answers.jsonl import is_file
from eval.answers.reuse import RESULT, check_table, read_result
from eval.benchmarks.base import Benchmark, Need
from eval.command import exit_on_user_error, make_parser
from eval.results.report import interval_of
from eval.results.statistics import rounded
from eval.tables import insert, interval_text, markdown, write_csv
from llava.errors import UserError
from llava.places import WORK, check_checkout

PAGE = WORK / "docs" / "benchmarks.md"
TOY_PAGE = WORK / "docs" / "toy_results.md"
RESULTS = WORK / "results" / "benchmarks"
OURS = ("video_qa",)  # sets of this repository alone, which no paper reports


def reported() -> list[Benchmark]:
    """The benchmarks that papers report."""
    return [benchmarks.get(name) for name in benchmarks.names() if name not in OURS]


def data_sections() -> str:
    """What each benchmark asks and scores, what is published, and where its data come from."""
    sections = []
    for benchmark in reported():
        lines = [f"### {benchmark.name}", "", benchmark.summary]
        if benchmark.published:
            lines.append(f"Published: {benchmark.published} ({benchmark.published_by}).")
        if benchmark.blind:
            lines.append(f"Mostly answerable without its images: {benchmark.blind}.")
        about = f"Profiles: {', '.join(benchmark.profiles)}. Splits: {', '.join(benchmark.splits)}."
        lines += [f"{about} Licence: {benchmark.licence}.", ""]
        sources: dict[str, list[str]] = {}  # files of one source stand in one line
        for need in benchmark.needs:
            sources.setdefault(need.source, []).append(need_file(need))
        lines += [f"* {', '.join(files)}: {source}" for source, files in sources.items()]
        if benchmark.mirror:
            lines.append(f"* mirror: {' or '.join(f'`{name}`' for name in benchmark.mirror)}")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def need_file(need: Need) -> str:
    """A file or folder of a benchmark's data in Markdown, with the number of its files."""
    count = f", {need.count:,} files" if need.count else ""
    return f"`DATA/{need.path}`{count}{' (optional)' if need.optional else ''}"


def result_of(folder: Path) -> dict[str, Any]:
    """The result of a run. Without one, a UserError names the script that makes it."""
    if not is_file(folder / RESULT):
        raise UserError(f"{folder} holds no result; run `bash scripts/tables/embedded_benchmarks.sh` first.")
    return read_result(folder)


def score_rows(results: Path) -> list[list[str]]:
    """One row per benchmark: the main metric of a toy model with and without reduction, on the same questions."""
    rows = []
    for benchmark in reported():
        full = result_of(results / benchmark.name / "full")
        reduced = result_of(results / benchmark.name / "consensusdrop")
        check_table([results / benchmark.name / name for name in ("full", "consensusdrop")])
        rows.append(
            [
                benchmark.name,
                full["main"].replace("_", " "),
                f"{full['questions']:,}",
                number(full),
                number(reduced),
                " of ".join(f"{one['accounting']['mean_tokens_per_layer']:.0f}" for one in (reduced, full)),
            ]
        )
    return rows


def number(result: dict[str, Any]) -> str:
    """The main metric of a result with its interval."""
    value, found = result["metrics"][result["main"]], interval_of(result)
    if value is None or found is None:
        return "graded by its server"
    return f"{rounded(value)} {interval_text(found['low'], found['high'])}"


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("lab.pages.benchmarks", __doc__)
    parser.add_argument("step", choices=("pages", "scores"))
    args = parser.parse_args(arguments)
    check_checkout(parser.prog)
    if args.step == "pages":
        insert(PAGE, "data", data_sections())
        readme, count = WORK / "README.md", len(reported())
        readme.write_text(re.sub(r"\*\*\d+ (?=\[benchmarks\])", f"**{count} ", readme.read_text()))
    else:
        header = ["benchmark", "metric", "questions", "full", "consensusdrop", "tokens per layer"]
        rows = score_rows(RESULTS)
        shown = [(name, metric, full, ours) for name, metric, _, full, ours, _ in rows]
        insert(TOY_PAGE, "embedded scores", markdown(["benchmark", "metric", "full", "consensusdrop"], shown))
        write_csv(WORK / "docs" / "tables" / "embedded_benchmarks.csv", header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
