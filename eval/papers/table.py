"""Make one table of a paper: run the cells that are missing, check the baseline, write the table in four formats.

    vtr tables paper consensusdrop/llava15_7b                          # toy model and data
    vtr tables paper consensusdrop/llava15_7b --limit 20               # quick look
    vtr tables paper consensusdrop/llava15_7b --data /data/eval        # the paper's model, downloaded by its id
    vtr tables paper consensusdrop/llava15_7b --render                 # only write, from finished runs
    vtr tables paper consensusdrop/llava15_7b --published-only --add mine.csv   # no model, no data

Without --data (or --model) the bundled toy model stands in, and the published columns are left out. Answers are kept in
results/sweep, shared by all tables, so an interrupted table goes on where it stopped.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.answers.jsonl import write_file
from eval.command import exit_on_user_error, make_parser
from eval.config import FULL, RunConfig, folder_name, is_toy
from eval.papers import published, reported, spec
from eval.papers.reported import Reported
from eval.papers.spec import Table
from eval.parallel import placement
from eval.tables import insert, markdown, write_csv
from eval.tracking import has_key, resolve_mode
from eval.tracking.table_run import log_table_run
from llava.errors import UserError
from llava.places import ASSETS, CHECKOUT, WORK, check_bundled, check_checkout
from llava.reduction import registry

if TYPE_CHECKING:
    from eval.papers.cells import MeasuredTable
    from eval.papers.document import Document
    from eval.papers.gate import Check
    from eval.papers.runs import RunTarget, Time
    from llava.model.llava_arch import Llava

REPEATS = 5


def toy_path(name: str) -> Path:
    """Where a toy model or toy data set of a spec is: paths below assets/ are bundled with the package."""
    path = Path(name)
    return ASSETS / path.relative_to("assets") if path.is_relative_to("assets") else WORK / path


def where_of(table: Table, args: argparse.Namespace) -> "RunTarget":
    """The model and data of this run: the paper's if the user names data or a model, otherwise the toy ones."""
    from eval.papers.runs import RunTarget

    bundled = args.model is None and args.data is None
    place = table.toy if bundled else table.real
    changes = {"model": args.model, "dtype": args.dtype, "batch_size": args.batch_size}
    place = place.model_copy(update={key: value for key, value in changes.items() if value is not None})
    if bundled:
        place = place.model_copy(update={"model": str(toy_path(place.model))})
    if not bundled and args.data is None:
        raise UserError("--model also needs --data, the folder of the benchmarks (docs/benchmarks.md).")
    data = toy_path(table.toy.data) if bundled else Path(args.data)
    check_bundled(data)
    if not data.is_dir():
        raise UserError(f"The data folder {data} does not exist; see docs/paper_tables.md.")
    # Every cell is a W&B run of its own where W&B is online or asked for; hundreds of offline runs help nobody.
    wandb = "disabled" if args.wandb == "auto" and not (has_key() and resolve_mode("auto") == "online") else args.wandb
    run = RunConfig(
        FULL,
        model=place.model,
        data=data,
        batch_size=place.batch_size,
        limit=min(filter(None, (args.limit, place.questions)), default=None),
        dtype=place.dtype,
        device=args.device,
        image_options=dict(place.image_options),
        judge=args.judge,
        failed="again",
        quiet=True,  # what a run prints is hidden, so it need not be made
        wandb=wandb,
        table=table.identity,
    )
    return RunTarget(place, bundled or is_toy(place.model), run)


def narrowed(table: Table, args: argparse.Namespace) -> Table:
    """The table with the rows, columns and budgets that the user asked for.

    A method that the table does not list gets a row if it is registered, as an author's own method is. If it is only
    published, it is shown as reported.
    """
    asked, listed = words(args.methods), [row.method for row in table.rows]
    own = [name for name in asked if name not in listed and name in registry.names() and name != FULL]
    others = [name for name in asked if name not in (*listed, *own)]
    if others and table.published:
        file = {row.method for row in published.load(table.published).rows}
        others = [name for name in others if name not in file]
    spec.chosen(table.rows, others, "method", listed)  # refuses a method that is neither listed nor published
    rows = [row for row in table.rows if not asked or row.method in asked] + [
        spec.TableRow(method=name) for name in own
    ]
    columns = spec.chosen(table.columns, words(args.benchmarks), "benchmark", [c.benchmark for c in table.columns])
    budgets = spec.chosen(table.budgets, words(args.budgets), "budget", [str(budget) for budget in table.budgets])
    parts = {"rows": rows, "columns": columns, "budgets": budgets} | ({"others": asked} if asked else {})
    return table.model_copy(update={name: tuple(part) for name, part in parts.items()})


def words(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def build_document(
    table: Table, where: "RunTarget", args: argparse.Namespace, folder: Path, added: Sequence[Reported]
) -> "Document":
    """Run the cells that are missing, and gather everything that the formats write.

    The unreduced model is compared with the published baseline before any reduced cell is asked, except a toy model.

    Raises:
        UserError: it is outside the tolerance of a benchmark, and the user asked to stop then.
    """
    from eval.papers import gate
    from eval.papers.cells import read_cells
    from eval.papers.figure import draw_kept
    from eval.papers.runs import columns_of, described, fill_cells, jobs_of, lines_of, open_model, times_of

    source = published.load(table.published) if table.published and not where.is_toy else None
    place = None if args.render else placement.here()
    model = open_model(where.run, place)
    columns, lines = columns_of(table, where.place), lines_of(table, where.run, model)
    if not columns:
        raise UserError(f"{where.place.model} can fill none of the chosen benchmarks; leave --benchmarks out.")
    for reason in described(lines):
        print(f"n/a: {reason}", file=sys.stderr)
    jobs = jobs_of(lines, columns, where.run, model)
    if not args.render:
        fill_cells({key: job for key, job in jobs.items() if key[0] == 0}, model, place, f"{table.identity}, full")
    full = read_cells(lines[:1], columns, jobs)
    checks = gate.check(list(full.row(0).values()), source, where.place) if source else []
    wrong = gate.sentences(checks)
    for line in wrong:
        print(f"gate: {line}", file=sys.stderr)
    if wrong and args.gate == "stop":
        raise UserError("The unreduced model is not the published one, see above; --gate mark goes on regardless.")
    if not args.render:
        fill_cells(jobs, model, place, table.identity)
    repeats = repeats_of(args, model, where)
    times = times_of(jobs, model, repeats, folder / f"{table.name}.times.jsonl")
    found = read_cells(lines, columns, jobs)
    document = document_of(table, where, found, checks, times, command_line(table, args), added)
    if args.wandb == "disabled" or args.render or not repeats:
        return document
    return dataclasses.replace(
        document, images=draw_kept(lines, next(iter(jobs.values())).data, model, folder / f"{table.name}-kept")
    )


def repeats_of(args: argparse.Namespace, model: "Llava", where: "RunTarget") -> int:
    """How many prefills to time: by default none with --limit, and never any if the model is on another device."""
    from llava.model.builder import device_of

    if model.device.type != device_of(where.run.device).type:
        print("Times are not measured: the ranks have the GPUs; run again with GPUS=1 for them.", file=sys.stderr)
        return 0
    return args.times if args.times is not None else 0 if args.limit else REPEATS


def document_of(
    table: Table,
    where: "RunTarget",
    found: "MeasuredTable",
    checks: "Sequence[Check]",
    times: "Mapping[int, Time]",
    command: str,
    added: Sequence[Reported] = (),
) -> "Document":
    """What the page says, by the kind of the table.

    Args:
        added: an author's own rows. Published rows are left out if a toy model ran.
    """
    from eval.papers.document import Document, blocks, entries, facts_of, lost_values, notes_of, with_reported
    from eval.papers.sections import clear_differences, pair_rows, pairs_of, sections_of

    source = published.load(table.published) if table.published and not where.is_toy else None
    cells = entries(found, source, where.place)
    clear = clear_differences(table, found) if table.kind == "scores" else {}
    pairs = pairs_of(found) if table.kind == "overview" else {}
    wide = blocks(found, clear) if table.kind == "scores" else []
    rows = [*(reported.published_rows(table, source) if source and wide else ()), *added]
    full = None if where.is_toy else {name: cell.value for name, cell in found.row(0).items()}
    wide = with_reported(wide, rows, table, found.columns, full) if rows else wide
    shown = [row for block in wide for row in block.reported]
    return Document(
        table,
        Path(where.run.model).name,
        where.is_toy,
        facts_of(table, where, found, command),
        [*(column.title for column in found.columns), "average"],
        wide,
        cells,
        sections_of(table, found, times, clear, pairs),
        checks,
        [*lost_values(rows, table, found.columns), *notes_of(table, found, cells, shown)],
        points_of(table, found, times),
        pairs=pair_rows(found, pairs),
    )


def points_of(table: Table, found: "MeasuredTable", times: "Mapping[int, Time]") -> list[dict[str, object]]:
    """One point per line for plots: tokens, time, and the average or, in an overview, the score."""
    points: list[dict[str, object]] = []
    for index, line in enumerate(found.lines):
        row, time = found.row(index), times.get(index)
        if row:
            tokens = sum(cell.tokens for cell in row.values()) / len(row)
            point: dict[str, object] = {"method": line.title, "budget": line.budget, "tokens": tokens}
            point |= {"ttft_ms": 1000 * time.ttft if time else None, "score": found.of_full(index)}
            if table.kind == "overview":
                (cell,) = row.values()
                low, high = (cell.value, cell.value) if cell.low is None or cell.high is None else (cell.low, cell.high)
                point |= {"score": cell.value, "bars": (cell.value - low, high - cell.value)}
            points.append(point)
    return points


def write(document: "Document", folder: Path, tex_intervals: bool = False) -> list[Path]:
    """The table in all formats; returns the files."""
    from eval.papers import figure, render

    folder.mkdir(parents=True, exist_ok=True)
    table = document.table
    image, paths = folder / f"{table.name}.png", []
    scores = "mean over benchmarks, % of full"
    if table.kind == "overview":
        cell = document.entries[0].cell
        scores = cell.column.title + ("" if cell.whole else ", %")
    if table.kind in ("scores", "overview"):
        has_image = figure.draw(image, document.points, document.title, document.ours, scores)
        paths += [image] if has_image else []
    texts = {
        "md": render.markdown_page(document, image.name if paths else ""),
        "csv": render.csv_file(document),
        "tex": render.latex_file(document, tex_intervals),
        "html": render.html_page(document),
        "bib": render.bib_file(document),
    }
    for suffix, text in texts.items():
        if not text:
            continue
        paths.append(folder / f"{table.name}.{suffix}")
        write_file(paths[-1], text)
    if document.pairs:
        paths.append(folder / f"{table.name}_pairs.csv")
        write_csv(paths[-1], ["budget", "a", "b", "a_minus_b", "low", "high", "p_holm"], document.pairs)
    return paths


def parser() -> argparse.ArgumentParser:
    p = make_parser("tables paper", __doc__)
    p.add_argument("table", help="paper/name, such as consensusdrop/llava15_7b, or a path to a .yaml")
    p.add_argument("--model", help="checkpoint, hub id or folder; with --data the table's own if left out")
    p.add_argument("--data", help="folder of the benchmarks; without it the toy model and toy data")
    p.add_argument("--limit", type=int, metavar="N", help="ask the first N questions of each benchmark only")
    p.add_argument("--methods", help="some of the table's methods, separated by commas")
    p.add_argument("--budgets", help="some of the table's budgets")
    p.add_argument("--benchmarks", help="some of the table's benchmarks")
    p.add_argument("--dtype", help="of the weights; the table's own if left out")
    p.add_argument("--batch-size", type=int, help="questions asked at once; the table's own if left out")
    p.add_argument("--device", default="auto", help="torch device")
    p.add_argument("--judge", default="auto", help="for judged benchmarks: docs/evaluation.md")
    p.add_argument("--gate", choices=("mark", "stop"), default="mark", help="what a wrong baseline does to the table")
    p.add_argument("--render", action="store_true", help="ask nothing, write from finished runs; --times 0: no timing")
    p.add_argument(
        "--add",
        type=Path,
        action="append",
        default=[],
        metavar="ROWS",
        help="a .csv or .yaml of rows that are shown as reported: docs/paper_tables.md; may be given several times",
    )
    p.add_argument(
        "--published-only", action="store_true", help="published and added rows alone; needs no model, no data"
    )
    p.add_argument("--tex-intervals", action="store_true", help="LaTeX: 95 %% intervals, and * for clear differences")
    p.add_argument("--output", type=Path, help="folder of the files; default results/tables/PAPER/MODEL[-limitN]")
    p.add_argument("--page", action="store_true", help="also write the sections into the table's page of docs/")
    p.add_argument("--times", type=int, metavar="N", help="prefills per method to time; default 5, 0 with --limit")
    p.add_argument("--wandb", default="auto", help="auto, online, offline or disabled: one run for the whole table")
    return p


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = parser()
    args = p.parse_args(arguments)
    if args.page:
        check_checkout(f"{p.prog} with --page")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit should be 1 or more questions, got {args.limit}.")
    table = spec.read(spec.find(args.table))
    if table.kind != "scores" and (args.add or args.published_only):
        raise UserError(
            f"--add and --published-only are for tables of scores; {table.identity} is of kind {table.kind}: leave "
            "them out."
        )
    # Checked against the whole table, before a part of it is taken.
    added = [row for path in args.add for row in reported.read_added(path, table)]
    if args.published_only:
        return published_only(table, added, args)
    where = where_of(table, args)
    if args.tex_intervals and table.kind != "scores":
        raise UserError(
            f"--tex-intervals is for tables of scores; {table.identity} is of kind {table.kind}: leave it out."
        )
    if args.page and not (table.page and where.is_toy):
        raise UserError(
            "--page writes toy results into a page of docs/, which few tables have (`page` in their specification): "
            "leave it out."
        )
    table = narrowed(table, args)
    folder = args.output or default_folder(table, where.run.model, args)
    document = build_document(
        table, where, args, folder, [row for row in added if row.budget in (None, *table.budgets)]
    )
    files = write(document, folder, args.tex_intervals)
    log_to_wandb(args.wandb, document, where, folder, files)
    print(summary(document))
    print(f"Table: {', '.join(str(file) for file in files)}")
    if args.page:
        # A marker names the table and the title of the section: `<!-- begin embedded_main overview -->`.
        page = WORK / table.page
        for section in document.sections:
            marker = f"{table.name} {section.title}".lower()
            if f"<!-- begin {marker} -->" in page.read_text():
                insert(page, marker, f"{section.about}\n\n{markdown(section.columns, section.rows)}")
        print(f"Page: {page}")
    return 0


def published_only(table: Table, added: Sequence[Reported], args: argparse.Namespace) -> int:
    """Write what sources report; returns the exit code."""
    from eval.papers.document import reported_document

    usual = parser().parse_args([args.table])
    asking = (
        "model",
        "data",
        "limit",
        "render",
        "page",
        "times",
        "tex_intervals",
        "device",
        "dtype",
        "judge",
        "batch_size",
    )
    if given := [f"--{name.replace('_', '-')}" for name in asking if getattr(args, name) != getattr(usual, name)]:
        raise UserError(f"--published-only asks no model and measures nothing; leave {', '.join(given)} out.")
    source = published.load(table.published) if table.published else None
    table = narrowed(table, args)
    rows = [*(reported.published_rows(table, source) if source else ()), *added]
    document = reported_document(
        table, [row for row in rows if row.budget in (None, *table.budgets)], command_line(table, args)
    )
    if not any(row.budget for row in document.reported):
        raise UserError(
            f"Nothing is published for this part of {table.identity}; leave --methods or --budgets out, or --add rows."
        )
    files = write(document, args.output or default_folder(table, "published", args))
    print(summary(document))
    print(f"Table: {', '.join(str(file) for file in files)}")
    return 0


def command_line(table: Table, args: argparse.Namespace) -> str:
    """The command that makes this table again, with every flag that changes it and is not its default."""
    names = ("model", "data", "limit", "methods", "budgets", "benchmarks", "dtype", "batch_size", "judge")
    usual = parser().parse_args([args.table])
    options = {name: getattr(args, name) for name in (*names, "times") if getattr(args, name) != getattr(usual, name)}
    given = []
    command = f"vtr tables paper {args.table}"
    if CHECKOUT and spec.find(args.table).resolve().is_relative_to(spec.SPECS.resolve()):
        command = f"bash {table.script}"
        given = [f"{name.upper()}={shlex.quote(options.pop(name))}" for name in ("model", "data") if name in options]
    flags = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in options.items()]
    flags += [f"--add {shlex.quote(str(path))}" for path in args.add]
    flags += ["--published-only"] * args.published_only + ["--tex-intervals"] * args.tex_intervals
    return " ".join([*given, command, *flags])


def default_folder(table: Table, model: str, args: argparse.Namespace) -> Path:
    """The folder of the files. A part of a table has its own, so that it does not replace the whole one."""
    narrow = [args.methods, args.budgets, args.benchmarks]
    tail = f"-limit{args.limit}" * bool(args.limit) + "-part" * any(narrow)
    return WORK / "results" / "tables" / table.paper / (folder_name(Path(model).name) + tail)


def summary(document: "Document") -> str:
    """The wide table as it is printed on the terminal."""
    from eval.papers.document import SPREAD
    from eval.papers.render import wide_markdown

    lines = [document.title, *([document.banner] if document.banner else [])]
    lines += [f"MARKED: {line}" for line in document.marked]
    if document.blocks:
        lines.append(
            wide_markdown(document.columns, document.blocks).replace("**", "").replace("<u>", "").replace("</u>", "")
        )
    return "\n".join([*lines, *(note for note in document.notes if note.startswith(SPREAD))])


def log_to_wandb(mode: str, document: "Document", where: "RunTarget", folder: Path, files: Sequence[Path]) -> None:
    """One W&B run for the table, with its files and what its plots show."""
    from eval.papers.document import marked

    header = ["method", "budget", "benchmark", "score", "low", "high", "tokens per layer", "fewest", "most", "answers"]
    rows = []
    for c in (entry.cell for entry in document.entries):
        names = marked(c.line.title, c.line), str(c.line.budget or "all"), c.column.title
        rows.append([*names, c.value, c.low, c.high, c.tokens, *(c.ends or (None, None)), c.answers_sha256])
    about = {"model": where.run.model, "paper": document.table.paper, "limit": where.run.limit, "toy": where.is_toy}
    log_table_run(mode, folder, document.table.identity, about, header, rows, files, document.points, document.images)


if __name__ == "__main__":
    sys.exit(main())
