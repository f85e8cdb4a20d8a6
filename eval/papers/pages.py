"""Write how to reproduce a table: docs/reproduce/PAPER_TABLE.md, and their index in docs/paper_tables.md.

    vtr tables reproduce

They come from the tables' specs, the published values, the data needs of the benchmarks and estimates; nothing is
measured, downloaded or run. The text is in `reproduce.md.j2`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from eval import benchmarks
from eval.command import exit_on_user_error, make_parser
from eval.config import ROOT
from eval.efficiency.memory import duration
from eval.papers import published, spec
from eval.papers.expense import (
    CUDA_CONTEXT,
    GPUS,
    OF_BANDWIDTH,
    OF_PEAK,
    Expense,
    Gpu,
    checkpoint_of,
    downloads,
    expense,
)
from eval.papers.gate import CAUSES, EVERYWHERE
from eval.papers.plan import Where, columns_of
from eval.papers.published import CONVENTIONS, Published
from eval.papers.sources import Sources, budget_title, number
from eval.papers.spec import Column, Table
from eval.tables.benchmarks import need_line
from eval.tables.page import insert, left_aligned, markdown

INDEX = ROOT / "docs" / "paper_tables.md"
FOLDER = ROOT / "docs" / "reproduce"
TEMPLATE = Path(__file__).parent / "reproduce.md.j2"
SERVER = ("vqav2", "vizwiz")  # the papers' splits have no public answers
JUDGED = ("mmvet", "llava_bench", "tgif_qa", "msvd_qa", "msrvtt_qa", "activitynet_qa")  # by a language model
MANY = 8  # GPUs of the second column of hours
INDEX_GPU = "A100, 80 GB"


def page(cost: Expense) -> str:
    """The page of one table."""
    table = cost.table
    columns = columns_of(table, Where(table.real, False, Path("DATA")))
    source = published.load(table.published) if table.published else None
    names = [column.benchmark for column in columns]
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    text = template.render(
        table=table,
        overview=overview(table, cost),
        checkpoints=checkpoint_table(table),
        data=data_table(cost),
        disk=f"{disk(table, cost):.0f} GB",
        unknown=[name for name, load in cost.loads.items() if not load or not load.gb],
        files=file_list(names),
        hours=hours_table(cost),
        peak=gigabytes(cost.peak),
        context=f"{CUDA_CONTEXT / 1e9:.1f} GB",
        of_peak=round(100 * OF_PEAK),
        of_bandwidth=round(100 * OF_BANDWIDTH),
        preparation=duration(3600 * cost.preparation_hours),
        first="gqa" if "gqa" in names else names[0],
        names=names,
        judged=[name for name in names if name in JUDGED],
        server=[name for name in names if name in SERVER],
        source=source,
        published=Sources(table, columns, source) if source else None,
        picture=", ".join(f"`{key}={value}`" for key, value in table.real.picture.items()),
        causes=cause_table(columns, source, table.real.convention),
        everywhere=EVERYWHERE,
        convention=CONVENTIONS[table.real.convention],
    )
    return text.rstrip("\n") + "\n"


def name_of(table: Table) -> str:
    """The file name of a table's page."""
    return f"{table.paper}_{table.name}.md"


def gigabytes(size: float) -> str:
    """Bytes as decimal gigabytes, as data sheets and hubs count them."""
    return f"{size / 1e9:.0f} GB"


def overview(table: Table, cost: Expense) -> str:
    """The table in a few lines."""
    lost = len(cost.lines) - len(cost.runnable)
    budgets = ", ".join(budget_title(budget) for budget in table.budgets)
    rows = [
        ["spec", f"[`scripts/{table.identity}.yaml`](../../scripts/{table.identity}.yaml)"],
        ["model", f"{table.model_title}, `{table.real.model}`"],
        ["rows", f"full, and {len(table.rows)} rows of {len({row.method for row in table.rows})} methods at {budgets}"],
        ["columns", ", ".join(column.title for column in table.columns)],
        ["runs", f"{cost.cells:,}" + (f"; {lost} rows cannot run on this model" if lost else "")],
    ]
    return left_aligned(markdown(["script", f"[`{table.script}`](../../{table.script})"], rows))


def checkpoint_names(table: Table) -> list[str]:
    return [table.real.model, *checkpoint_of(table).also]


def checkpoint_table(table: Table) -> str:
    """Repositories of the hub with sizes and commands."""
    known = downloads().checkpoints
    rows = [
        [f"`{name}`", f"{known[name].gb:g} GB", known[name].basis, f"`hf download {name}`"]
        for name in checkpoint_names(table)
    ]
    return left_aligned(markdown(["checkpoint", "size", "size from", "command"], rows))


def data_table(cost: Expense) -> str:
    """Benchmarks with questions and sizes."""
    rows = []
    for name, load in cost.loads.items():
        size = f"{load.gb:g} GB" if load and load.gb else "not known"
        basis = load.basis if load else ""
        mirror = f"{load.mirror:g} GB" if load and load.mirror else "not known"
        questions = f"{load.questions:,}" if load else "not known"
        rows.append([f"[{name}](../evaluation.md#{name})", questions, size, basis, mirror])
    return left_aligned(markdown(["benchmark", "questions", "official files", "size from", "mirror on the hub"], rows))


def disk(table: Table, cost: Expense) -> float:
    """Gigabytes of everything whose size is known."""
    data = sum(load.gb for load in cost.loads.values() if load and load.gb)
    return data + sum(downloads().checkpoints[name].gb for name in checkpoint_names(table))


def file_list(names: Sequence[str]) -> str:
    """The official files of each benchmark."""
    lines = []
    for name in names:
        benchmark = benchmarks.get(name)
        lines += [f"* **{name}** ({benchmark.licence})", *(f"  {need_line(need)}" for need in benchmark.needs)]
        if benchmark.mirror:
            lines.append(f"  * mirror: {' or '.join(f'`{one}`' for one in benchmark.mirror)}")
    return "\n".join(lines)


def hours_table(cost: Expense) -> str:
    """Whether the model fits, and the hours of the whole table, by GPU."""
    rows = [
        [gpu.name, "yes" if fits(cost, gpu) else "no: split it with `TP=2`", *(hours(cost, gpu, n) for n in (1, MANY))]
        for gpu in GPUS
    ]
    return markdown(["GPU", "fits on one", "one GPU", f"{MANY} GPUs"], rows)


def fits(cost: Expense, gpu: Gpu) -> bool:
    return cost.peak <= gpu.memory


def hours(cost: Expense, gpu: Gpu, count: int = 1) -> str:
    """The table's time on some GPUs; "n/a" where the model does not fit on one."""
    return duration(3600 * cost.gpu_hours(gpu) / count) if fits(cost, gpu) else "n/a"


def cause_table(columns: Sequence[Column], source: Published | None, convention: str) -> str:
    """Per benchmark: the published baselines that the gate takes, its tolerance, and what to look at first."""
    rows = []
    for column in columns:
        known = source.full(column.published) if source and column.published and not column.published_split else []
        values = [one.value for one in known if one.trust != "low" and not one.obstacle(convention)]
        ends = [number(value, column.published) for value in (min(values), max(values))] if values else []
        spread = " to ".join(dict.fromkeys(ends)) or "n/a"
        rows.append([column.title, spread, f"{column.tolerance:g}", CAUSES.get(column.benchmark, "")])
    return left_aligned(markdown(["benchmark", "full, published", "tolerance", "look at first"], rows))


def index(costs: Sequence[Expense]) -> str:
    """One row per table, for docs/paper_tables.md."""
    gpu = next(gpu for gpu in GPUS if gpu.name == INDEX_GPU)
    rows = []
    for cost in costs:
        table = cost.table
        size = sum(downloads().checkpoints[name].gb for name in checkpoint_names(table))
        budgets = ", ".join(str(budget) for budget in table.budgets)
        link = f"[{table.title}](reproduce/{name_of(table)})"
        rows.append([link, budgets, f"{cost.cells:,}", f"{size:.0f} GB", gigabytes(cost.peak), hours(cost, gpu)])
    return markdown(["table", "budgets", "runs", "checkpoints", "GPU memory", f"one {INDEX_GPU}"], rows)


def pages(costs: Sequence[Expense]) -> dict[str, str]:
    """File name below docs/reproduce -> text."""
    return {name_of(cost.table): page(cost) for cost in costs}


def all_costs() -> list[Expense]:
    """The costs of the tables that have a page: those of scores."""
    found = [spec.read(path) for path in spec.paths()]
    return [expense(table) for table in found if table.kind == "scores"]


def write_all(folder: Path = FOLDER, index_page: Path = INDEX) -> None:
    """Write all pages and the index, and remove pages without a table."""
    costs = all_costs()
    written = pages(costs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in folder.glob("*.md"):
        if path.name not in written:
            path.unlink()
    insert(index_page, "tables", index(costs))


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser().parse_args(arguments)
    write_all()
    print(f"The pages are in {FOLDER.relative_to(ROOT)}/, their index in {INDEX.relative_to(ROOT)}.")
    return 0


def parser() -> argparse.ArgumentParser:
    return make_parser("eval.papers.pages", __doc__)


if __name__ == "__main__":
    sys.exit(main())
