"""Write how to reproduce each table in docs/reproduce/PAPER_TABLE.md, and the costs of all in docs/paper_tables.md.

    vtr tables reproduce

The content comes from the tables' specs, the published values, the data needs of the benchmarks and estimates; nothing
is measured, downloaded or run. The text is in `reproduce.md.j2`. Only the costs are committed, not the pages.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from eval import benchmarks
from eval.command import exit_on_user_error, make_parser
from eval.config import FULL
from eval.efficiency.memory import duration
from eval.papers import published, spec
from eval.papers.document import budget_title
from eval.papers.gate import CAUSES, EVERYWHERE
from eval.papers.published import AVERAGE, CONVENTIONS, EFFICIENCY, KINDS, POINTS, Published
from eval.papers.runs import columns_of
from eval.papers.spec import Column, Table
from eval.tables import insert, left_aligned, markdown
from lab.pages import expense as costing
from lab.pages.benchmarks import need_file
from lab.pages.expense import GPUS, Expense, Gpu, checkpoint_of, downloads, expense
from llava.places import WORK, check_checkout

INDEX = WORK / "docs" / "paper_tables.md"
FOLDER = WORK / "docs" / "reproduce"
SERVER = ("vqav2", "vizwiz")  # the papers' splits have no public answers
JUDGED = ("mmvet", "llava_bench", "tgif_qa", "msvd_qa", "msrvtt_qa", "activitynet_qa")  # scored by a language model
MANY = 8  # number of GPUs in the second column of hours
INDEX_GPU = GPUS[1]  # GPU of the column of hours in docs/paper_tables.md
COSTS = {"tflops": "TFLOP", "latency_ms": "ms", "speedup": "speed-up"}


def page(cost: Expense) -> str:
    """The page of one table."""
    table = cost.table
    columns = columns_of(table, table.real)
    source = published.load(table.published) if table.published else None
    names = [column.benchmark for column in columns]
    text = Path(__file__).with_suffix(".md.j2").read_text(encoding="utf-8")
    template = jinja2.Template(text, undefined=jinja2.StrictUndefined)
    text = template.render(
        table=table,
        cost=cost,
        names=names,
        budgets=", ".join(map(budget_title, table.budgets)),
        checkpoints=checkpoints_of(table),
        benchmarks=[benchmarks.get(name) for name in names],
        need_file=need_file,
        disk=sum(load.gb for load in cost.loads.values() if load and load.gb) + gigabytes_of(table),
        gpus=[(gpu, *hours(cost, gpu)) for gpu in GPUS],
        unknown=[name for name, load in cost.loads.items() if not load or not load.gb],
        many=MANY,
        gigabytes=gigabytes,
        costing=costing,
        first="gqa" if "gqa" in names else names[0],
        judged=[name for name in names if name in JUDGED],
        server=[name for name in names if name in SERVER],
        source=source,
        published=Sources(table, columns, source) if source else None,
        causes=cause_table(columns, source, table.real.convention),
        everywhere=EVERYWHERE,
        convention=CONVENTIONS[table.real.convention],
    )
    return f"{text.rstrip()}\n"


def gigabytes(size: float) -> str:
    """Bytes as decimal gigabytes, as data sheets and hubs count them."""
    return f"{size / 1e9:.0f} GB"


def checkpoints_of(table: Table) -> dict[str, costing.Checkpoint]:
    """The repositories of the hub that a table needs, by name."""
    return {name: downloads().checkpoints[name] for name in (table.real.model, *checkpoint_of(table).also)}


def gigabytes_of(table: Table) -> float:
    """Decimal gigabytes of a table's checkpoints."""
    return sum(one.gb for one in checkpoints_of(table).values())


def hours(cost: Expense, gpu: Gpu) -> tuple[str, str]:
    """The table's time on one GPU and on MANY; "n/a" if a batch of the unreduced model does not fit on one."""
    if cost.peak > gpu.memory:
        return "n/a", "n/a"
    seconds = 3600 * cost.gpu_hours(gpu)
    return duration(seconds), duration(seconds / MANY)


def cause_table(columns: Sequence[Column], source: Published | None, convention: str) -> str:
    """Per benchmark: the published baselines that the gate compares with, its tolerance, and what to look at first."""
    rows = []
    for column in columns:
        known = source.full(column.published) if source and column.published and not column.published_split else []
        values = [one.value for one in known if not one.obstacle(convention)]
        ends = [number(value, column.published) for value in (min(values), max(values))] if values else []
        spread = " to ".join(dict.fromkeys(ends)) or "n/a"
        rows.append([column.title, spread, f"{column.tolerance:g}", CAUSES.get(column.benchmark, "")])
    return left_aligned(markdown(["benchmark", "full, published", "tolerance", "look at first"], rows))


class Sources:
    """The rows of a file of published scores that belong to a table, as Markdown.

    Attributes:
        rows: rows of the unreduced model, then of the table's methods in its order, at falling budgets.
    """

    def __init__(self, table: Table, columns: Sequence[Column], source: Published):
        self._source = source
        self._titles = {column.published: column.title for column in columns if column.published}
        self._labels = {FULL: FULL} | {row.published_name: row.title for row in table.rows if row.published_name}
        shown = {*self._titles, AVERAGE, *EFFICIENCY}
        known = [row for row in source.rows if row.method in self._labels and not shown.isdisjoint(row.scores)]
        order = list(self._labels)
        self.rows = sorted(known, key=lambda row: (order.index(row.method), -row.share))

    @property
    def table(self) -> str:
        """Method, tokens, source, trust, scores, and costs if a row has any.

        Disputed numbers are marked "?". A cell is empty if the source has no number for it.
        """
        costs = {name: title for name, title in COSTS.items() if any(name in row.scores for row in self.rows)}
        columns = {**self._titles, AVERAGE: "average", **costs}
        words = ["method", "tokens", "source", "trust"]
        body = []
        for row in self.rows:
            about = self._source.value(row, next(iter(row.scores)))
            cells = [self._labels[row.method], str(row.tokens), about.title, about.trust]
            for column in columns:
                is_known, mark = column in row.scores, "?" if row.reason(column) else ""
                cells.append(f"{number(row.scores[column], column)}{mark}" if is_known else "")
            body.append(cells)
        text = markdown([*words, *columns.values()], body)
        return text.replace(f"|---|{'---:|' * (len(words) - 1)}", f"|{'---|' * len(words)}", 1)

    @property
    def sources(self) -> str:
        """One line for each source of the rows."""
        lines = []
        for key in dict.fromkeys(row.source for row in self.rows):
            source = self._source.sources[key]
            split = "the usual splits" if source.split == "usual" else "splits not named"
            if isinstance(source.split, dict):
                split = "; ".join(f"{column}: {name}" for column, name in source.split.items())
            note = f" {source.note[0].upper()}{source.note[1:]}." if source.note else ""
            about = f"{KINDS[source.kind]}; trust {source.trust}; {CONVENTIONS[source.convention]}; {split}"
            lines.append(f"* {source.title} ({about}): {source.where}.{note}")
        return "\n".join(lines)

    @property
    def disputes(self) -> list[str]:
        """Why numbers are disputed, one line for each row with such numbers."""
        lines = []
        for row in self.rows:
            reason = row.disputed or ""
            if isinstance(reason, dict):
                reason = "; ".join(f"{self._titles.get(column, column)}: {why}" for column, why in reason.items())
            title, method = self._source.sources[row.source].title, self._labels[row.method]
            lines += [f"* {title}, {method} at {row.tokens}: {reason}."] if reason else []
        return lines


def number(value: float, column: str) -> str:
    """The value as printed, with at least one decimal except for MME's points."""
    text = f"{value:.6g}"
    return text if "." in text or column in POINTS else f"{text}.0"


def index(costs: Sequence[Expense]) -> str:
    """One row per table, for docs/paper_tables.md."""
    rows = []
    for cost in costs:
        table = cost.table
        budgets, size = ", ".join(map(str, table.budgets)), f"{gigabytes_of(table):.0f} GB"
        rows.append([table.title, budgets, f"{cost.cells:,}", size, gigabytes(cost.peak), hours(cost, INDEX_GPU)[0]])
    return markdown(["table", "budgets", "runs", "checkpoints", "GPU memory", f"one {INDEX_GPU.name}"], rows)


def all_costs() -> list[Expense]:
    """The costs of the tables that have a page, which are the tables of scores."""
    found = [spec.read(path) for path in spec.paths()]
    return [expense(table) for table in found if table.kind == "scores"]


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("lab.pages.reproduce", __doc__)
    parser.parse_args(arguments)
    check_checkout(parser.prog)
    costs = all_costs()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for cost in costs:
        (FOLDER / f"{cost.table.paper}_{cost.table.name}.md").write_text(page(cost), encoding="utf-8")
    insert(INDEX, "tables", index(costs))
    print(f"The pages are in {FOLDER.relative_to(WORK)}/, their costs in {INDEX.relative_to(WORK)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
