"""Write a leaderboard of finished runs: one page without scripts from elsewhere, and a CSV file beside it.

vtr leaderboard results
vtr leaderboard results submissions --output board.html

Every folder is searched for runs (result.json) and reported entries (reported.json). All answers are scored again with
the labels of --data, and an entry with faults is left out and named. docs/evaluation.md explains the page.
"""

import dataclasses
import math
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from eval.answers.entries import Entry, check_entry, entry_folders
from eval.answers.jsonl import is_file, read_json, write_file
from eval.answers.reuse import RESULT, joint, joint_differences, read_result
from eval.answers.source_hash import combined
from eval.benchmarks.base import Dataset
from eval.command import exit_on_user_error, make_parser, open_dataset, value
from eval.config import DEFAULT_DATA, FULL, TOY_BANNER, is_toy, path_name
from eval.pages import asset, environment
from eval.pages.report import REPLACED
from eval.results.report import operations_of
from eval.results.statistics import Interval, interval, rounded
from eval.statistics.command import Run, read_run
from eval.statistics.gain import gain_kept
from eval.statistics.ranks import RankInterval, rank_intervals
from eval.statistics.relative import SHARE, relative_mean, tokens_needed
from eval.tables import csv_numbers, csv_text, interval_text, markdown, write_csv
from llava.budget import BLIND
from llava.errors import UserError
from llava.reduction import options_of, registry

NUMBERS = ("score", "of full", "tokens entering", "cost ratio")  # the columns that sort by a number
HEADS = (
    "rank", "method", "score", "of full", "tokens for 99 %", "visual gain kept", "tokens entering", "tokens paid",
    "cost ratio", "position ids", "determinism", "badge",
)  # fmt: skip


@dataclass(eq=False)
class Board:
    """All entries that may be compared: one model, one benchmark, the same settings and labels.

    Attributes:
        full: the run without reduction, which the entries are checked against.
        blind: the entry without visual tokens, if it is there.
        entries: those without faults.
    """

    full: Run
    data: Dataset
    entries: list[Entry] = field(default_factory=list)
    blind: Entry | None = None

    @property
    def result(self) -> Mapping[str, Any]:
        return self.full.stored.result

    @property
    def model_key(self) -> tuple[str, ...]:
        """What boards of one model share: its name, its files, and how it was run."""
        settings = self.result["settings"]
        names = ("model_files", "conversation", "dtype", "image_options", "quantization", "engine", "device", "code")
        return settings["model"], *(repr(settings.get(name)) for name in names)

    @property
    def provenance(self) -> dict[str, str]:
        """What an entry has to share to be compared, for a reader who wants to add one."""
        settings, facts, result = self.result["settings"], self.result["facts"], self.result
        known = {
            "model": settings["model"],
            "model_files": combined(settings["model_files"]),
            "dtype": settings["dtype"],
            "device": settings["device"],
            "benchmark": settings["benchmark"],
            "split": settings["split"],
            "profile": facts.get("profile"),
            "source": facts.get("source"),
            "questions": settings["questions"],
            "labels": result["labels"],
            "images": result["images"],
            "code of model and pipeline": combined(settings["code"]),
            "commit of full": result.get("commit"),
            "image_options": settings.get("image_options"),
            "quantization": settings.get("quantization"),
        }
        return {name: str(value) for name, value in known.items() if value}


@dataclass(frozen=True)
class Row:
    """A line of the page; `cells` are the texts under HEADS, and `notes` say more about a cell, by its head."""

    cells: Mapping[str, str]
    entry: Entry | None
    rank: RankInterval | None
    score: Interval
    notes: Mapping[str, str]
    numbers: Mapping[str, float | None]
    kind: str  # "native", "reported", "reference", ...


@dataclass(frozen=True)
class Ranking:
    """One table: a board at a budget."""

    board: Board
    size: str
    rows: list[Row]

    @property
    def heads(self) -> list[str]:
        """The columns in which a row says something."""
        return [head for head in HEADS if any(row.cells.get(head) for row in self.rows)]

    @property
    def title(self) -> str:
        return f"{self.board.data.title}, {self.size} tokens"


# -- reading ----------------------------------------------------------------------------------------------------------


def collect(folders: Sequence[Path], data_folder: str, judge: str) -> tuple[list[Board], list[str]]:
    """The boards of all entries below some folders, and a sentence for each thing that is left out.

    Raises:
        UserError: there is no such folder, or no run of `full` without faults.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; vtr leaderboard takes folders that hold runs of vtr eval.")
    places = list(dict.fromkeys(place for folder in folders for place in entry_folders(folder)))
    places = [place for place in places if not any(REPLACED.fullmatch(part) for part in place.parts)]
    left_out: list[str] = []
    facts: dict[Path, Mapping[str, Any]] = {}
    for place in places:
        try:
            facts[place] = read_result(place) if is_file(place / RESULT) else read_json(place / "reported.json")
        except UserError as error:
            left_out.append(str(error))
    boards: list[Board] = []
    opened: dict[tuple[Any, ...], Dataset] = {}
    for place, result in facts.items():
        if result.get("method") != FULL or "settings" not in result:
            continue
        if any(joint(board.result) == joint(result) for board in boards):
            left_out.append(f"{place}: another run of full with the same questions and settings is on the board.")
            continue
        try:
            boards.append(Board(read_run(place, data_of(result, data_folder, opened), judge), opened[data_key(result)]))
        except UserError as error:
            left_out.append(f"{place}: {error}")
    if not boards:
        more = f" {left_out[0]}" if left_out else ""
        raise UserError(f"There is no usable run of {FULL} in {', '.join(map(str, folders))}.{more}")
    for place, result in facts.items():
        if result.get("method") == FULL and "settings" in result:
            continue
        board = board_of(result, boards)
        if board is None:
            left_out.append(f"{place}: there is no run of full on the same benchmark and split.")
            continue
        entry, faults = check_entry(place, board.full, board.data, judge)
        if entry is None or faults:
            left_out.append(f"{place}: {'; '.join(faults)}.")
        elif entry.method == BLIND and not entry.about:
            board.blind = entry
        elif twin := next(
            (one for one in board.entries if label(one) == label(entry) and one.size == entry.size), None
        ):
            left_out.append(f"{place}: the same method, options and budget as {twin.folder}.")
        else:
            board.entries.append(entry)
    return boards, left_out


def data_key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the questions of a run depend on."""
    facts = result.get("facts") or {}
    return (
        result["settings"].get("benchmark"),
        result["settings"].get("split"),
        facts.get("profile"),
        facts.get("source"),
    )


def data_of(result: Mapping[str, Any], folder: str, opened: dict[tuple[Any, ...], Dataset]) -> Dataset:
    """The data set of a run, read once."""
    key = data_key(result)
    if key not in opened:
        benchmark, split, profile, source = key
        opened[key] = open_dataset(benchmark, folder, split, profile, "auto" if source == "official" else "mirror")
    return opened[key]


def board_of(result: Mapping[str, Any], boards: Sequence[Board]) -> Board | None:
    """The board that an entry belongs to: of those on its benchmark and split, the one it differs least from."""
    about = result.get("settings", result)

    def unlike(board: Board) -> int:
        if "settings" in result:
            return len(joint_differences(board.result, result))
        known = board.provenance
        return sum(known.get(name) != about.get(name) for name in ("questions", "model_files", "dtype", "profile"))

    same = [
        board
        for board in boards
        if all(board.result["settings"][name] == about.get(name) for name in ("benchmark", "split"))
    ]
    return min(same, key=unlike, default=None)


# -- what a row says --------------------------------------------------------------------------------------------------


def label(entry: Entry) -> str:
    """Method and options, which are the same at every budget; the badge tells a foreign method from ours."""
    return " ".join(part for part in (entry.method, entry.options, f"({entry.badge})" if entry.about else "") if part)


def rankings_of(board: Board) -> list[Ranking]:
    """The tables of a board, by budget."""
    needed = tokens_for_share(board)
    sizes: dict[str, list[Entry]] = defaultdict(list)
    for entry in board.entries:
        sizes[entry.size].append(entry)
    found = []
    for size, entries in sorted(sizes.items(), key=lambda item: item[1][0].budget):
        ranked = {label(entry): entry.terms for entry in entries if not entry.over_budget}
        ranks = rank_intervals(ranked)
        rows = [row_of(entry, board, ranks.get(label(entry)), needed[label(entry)]) for entry in entries]
        # A tie is no victory of numbers that nobody here can repeat: reported entries come after the others.
        rows.sort(
            key=lambda row: (row.rank is None, row.rank and row.rank.best, row.kind == "reported", -row.score.mean)
        )
        found.append(Ranking(board, size, [*references(board), *rows]))
    return found


def tokens_for_share(board: Board) -> dict[str, str]:
    """Label -> tokens needed for 99 % of full, where a method has several budgets; else ""."""
    methods: dict[str, dict[int, Entry]] = defaultdict(dict)
    for entry in board.entries:
        if not entry.over_budget:
            methods[label(entry)][round(entry.tokens)] = entry
    found = {label(entry): "" for entry in board.entries}
    for name, budgets in methods.items():
        if len(budgets) > 1:
            by_budget = {budget: entry.terms for budget, entry in budgets.items()}
            found[name] = tokens_needed(board.full.terms, by_budget, SHARE, bounds=False).text
    return found


def references(board: Board) -> list[Row]:
    """The rows of `full` and, if it was run, of the blind control, which have no rank."""
    accounting, main = board.result["accounting"], board.full.score.main
    full = interval(board.full.terms)
    tokens = accounting["mean_tokens_per_layer"]
    cells = {
        "rank": "–",
        "method": FULL,
        "score": score_cell(full),
        "of full": "100.0",
        "tokens entering": rounded(tokens),
    }
    cells |= {"cost ratio": "1.00", "badge": "reference"}
    numbers = {"score": board.full.score.values[main], "of full": 100.0, "tokens entering": tokens, "cost ratio": 1.0}
    rows = [Row(cells, None, None, full, {}, numbers, "reference")]
    if board.blind is not None:
        blind = row_of(board.blind, board, None, "")
        rows.append(dataclasses.replace(blind, kind="reference", cells={**blind.cells, "badge": "reference"}))
    return rows


def row_of(entry: Entry, board: Board, rank: RankInterval | None, needed: str) -> Row:
    """The row of an entry."""
    found, main = interval(entry.terms), entry.score.main
    full = board.full.score.values[main]
    of_full = 100 * found.mean / full if full else None
    ratio, kind = cost_ratio(entry, board)
    paid = entry.accounting.get("paid_tokens_per_layer")
    register, clauses = register_of(entry)
    gain, why = visual_gain(entry, board)
    notes = {"score": found.method if found.low is None else "", "visual gain kept": why, "determinism": clauses}
    notes["cost ratio"] = kind
    ends = [entry.accounting[f"{end}_tokens_per_layer"] for end in ("least", "most")]
    if round(ends[0], 1) != round(ends[1], 1):
        notes["tokens entering"] = f"{ends[0]:.1f} to {ends[1]:.1f} from question to question"
    if entry.over_budget:
        notes["rank"] = f"not ranked: {entry.tokens:.1f} tokens enter, {entry.size} were asked for"
    if entry.code_faults:
        notes["badge"] = "; ".join(entry.code_faults)
    cells = {
        "rank": rank.text if rank else "–",
        "method": entry.method,
        "score": score_cell(found),
        "of full": "" if of_full is None else rounded(of_full),
        "tokens for 99 %": needed,
        "visual gain kept": gain,
        "tokens entering": rounded(entry.tokens),
        "tokens paid": "" if paid is None else rounded(paid),
        "cost ratio": "" if ratio is None else rounded(ratio, 2),
        "position ids": "" if entry.positions == "renumber" and entry.tokens == 0 else entry.positions,
        "determinism": register,
        "badge": entry.badge,
    }
    numbers = {"score": found.mean, "of full": of_full, "tokens entering": entry.tokens, "cost ratio": ratio}
    return Row(cells, entry, rank, found, {name: note for name, note in notes.items() if note}, numbers, entry.badge)


def score_cell(found: Interval) -> str:
    return f"{rounded(found.mean)} {interval_text(found.low, found.high)}"


def cost_ratio(entry: Entry, board: Board) -> tuple[float | None, str]:
    """Cost as a share of full's; None for an entry whose cost nobody here has seen. And a note, if no operations."""
    if not entry.result:
        return None, ""
    own, full = operations_of(entry.result), operations_of(board.result)
    if own and full:
        return own / full, "without the selection, which ran elsewhere" if entry.badge == "replayed" else ""
    own, full = (((one.get("timing") or {}).get("ttft") or {}).get("median_ms") for one in (entry.result, board.result))
    if own and full and entry.result.get("conditions") == board.result.get("conditions"):
        return own / full, "measured time to the first token"
    return None, "neither operations nor times under the same conditions"


def register_of(entry: Entry) -> tuple[str, str]:
    """What a method's result depends on besides image, question and budget: a word, and the clauses behind it."""
    if entry.badge == "replayed":
        return "fixed by its file", ""
    if entry.badge == "reported":
        return "not known", ""
    try:
        method = registry.method(entry.method)
    except UserError:
        return "not known", ""
    seeded = any(name.split("__")[-1] == "seed" for name in options_of(method))
    clauses = {
        word: clause
        for part in method.parts or (method,)
        for name, word in {"random": "draws", "batch": "batch", "order": "order"}.items()
        if (clause := getattr(part.metadata.release, name, ""))
    }
    words = [*(["seed"] if seeded else []), *([f"release: {', '.join(clauses)}"] if clauses else [])]
    return ", ".join(words) or "none", "; ".join(clauses.values())


def visual_gain(entry: Entry, board: Board) -> tuple[str, str]:
    """Visual gain kept as a cell, and why it is missing."""
    if board.blind is None:
        return "", ""
    found = gain_kept(entry.terms, board.full.terms, board.blind.terms)
    if math.isnan(found.mean):
        return "", found.method
    return score_cell(found), found.method if found.low is None else ""


# -- overall ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overall:
    """Mean of the scores in percent of full over the benchmarks of a model, at one budget.

    Attributes:
        rows: label -> mean, of the methods that have an entry on every benchmark, best first.
        missing: methods that lack a benchmark.
    """

    size: str
    benchmarks: list[str]
    rows: list[tuple[Entry, Interval]]
    missing: list[str]


def overall_of(boards: Sequence[Board]) -> list[Overall]:
    """The averages of one model, by budget; none where it has one benchmark only."""
    if len(boards) < 2:
        return []
    by_size: dict[str, dict[str, list[tuple[Board, Entry]]]] = defaultdict(lambda: defaultdict(list))
    for board in boards:
        for entry in board.entries:
            if not entry.over_budget:
                by_size[entry.size][label(entry)].append((board, entry))
    found = []
    for size, methods in sorted(by_size.items(), key=lambda item: next(iter(item[1].values()))[0][1].budget):
        common = {name: own for name, own in methods.items() if len(own) == len(boards)}
        rows = []
        for own in common.values():
            scores = {str(number): (entry.terms, board.full.terms) for number, (board, entry) in enumerate(own)}
            rows.append((own[0][1], relative_mean(scores)))
        rows.sort(key=lambda row: (row[0].badge == "reported", -row[1].mean))
        if rows:
            titles = [board.data.title for board in boards]
            found.append(Overall(size, titles, rows, sorted(methods.keys() - common.keys())))
    return found


# -- the page and the CSV file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A section of the page."""

    name: str
    is_toy: bool
    overall: list[Overall]
    rankings: list[Ranking]
    boards: list[Board]


def models_of(boards: Sequence[Board]) -> list[Model]:
    """The sections of the page; toy models come last."""
    by_model: dict[tuple[str, ...], list[Board]] = defaultdict(list)
    for board in boards:
        by_model[board.model_key].append(board)
    models = []
    for own in by_model.values():
        rankings = [ranking for board in own for ranking in rankings_of(board)]
        name = own[0].result["settings"]["model"]
        models.append(Model(name, is_toy(name), overall_of(own), rankings, own))
    return sorted(models, key=lambda model: (model.is_toy, model.name))


def page(models: Sequence[Model], left_out: Sequence[str], output: Path, made_by: str) -> str:
    """The page as HTML, which needs nothing from the network; links to entries are relative to `output`."""
    place = output.resolve().parent

    def link(entry: Entry) -> str:
        return quote(os.path.relpath(entry.folder.resolve(), place))

    return (
        environment()
        .get_template("leaderboard.html.j2")
        .render(
            style=asset("style.css") + asset("leaderboard.css"),
            script=asset("sort.js"),
            models=models,
            left_out=left_out,
            link=link,
            code=lambda entry: hash_of_code(entry.result),
            web=lambda text: text if re.match(r"https?://", text) else "",
            toy_banner=TOY_BANNER,
            made_by=made_by,
            csv=quote(output.with_suffix(".csv").name),
            rounded=rounded,
            interval_text=interval_text,
        )
    )


def hash_of_code(result: Mapping[str, Any]) -> str:
    """One hash over all source files that a run's answers depend on; "" where nothing ran here."""
    settings = result.get("settings", {})
    return combined({**settings["code"], **settings["method_code"]}) if settings else ""


def csv_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """The rows of the CSV file, column by column."""
    rows = []
    for model in models:
        for ranking in model.rankings:
            board = ranking.board
            for row in ranking.rows:
                entry, cells, known = row.entry, row.cells, board.provenance
                own = entry.result if entry else board.result
                about = entry.about if entry else {}
                low, high, *numbers = csv_numbers(row.score.low, row.score.high, *map(row.numbers.get, NUMBERS))
                texts = {
                    "model": model.name,
                    "toy": "yes" if model.is_toy else "no",
                    **{name: known.get(name, "") for name in ("model_files", "dtype", "profile", "source")},
                    "benchmark": board.data.title,
                    **{name: known[name] for name in ("questions", "labels")},
                    "budget": ranking.size,
                    "best rank": str(row.rank.best) if row.rank else "",
                    "worst rank": str(row.rank.worst) if row.rank else "",
                    **{name: cells.get(name, "") for name in HEADS if name not in ("rank", *NUMBERS)},
                    "options": entry.options if entry else "",
                    "commit": about.get("commit") or str(own.get("commit", "")),
                    "code": hash_of_code(own),
                    **{name: about.get(name, "") for name in ("author", "licence", "link")},
                    "folder": str(entry.folder if entry else board.full.folder),
                }
                texts = {name: csv_text(text) for name, text in texts.items()}
                rows.append(texts | dict(zip(NUMBERS, numbers, strict=True)) | {"low": low, "high": high})
    return rows


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("eval.cli leaderboard", __doc__)
    p.add_argument("folders", nargs="+", type=value(path_name), help="folders that hold runs, at any depth")
    p.add_argument("--data", type=value(path_name), default=str(DEFAULT_DATA), help="folder that holds the benchmarks")
    p.add_argument("--judge", default="auto", help="who scores open answers, as for vtr score")
    p.add_argument("--output", type=value(path_name), default="leaderboard.html", help="the page to write")
    args = p.parse_args(arguments)
    output = Path(args.output)
    if output.is_dir() or output.suffix != ".html":
        raise UserError(f"--output should name an HTML file, such as leaderboard.html, got {args.output!r}.")
    boards, left_out = collect([Path(folder) for folder in args.folders], args.data, args.judge)
    models = models_of(boards)
    command = shlex.join(["vtr", "leaderboard", *args.folders, "--output", str(output)])
    write_file(output, page(models, left_out, output, command))
    rows = csv_rows(models)
    write_csv(output.with_suffix(".csv"), list(rows[0]) if rows else [], [list(row.values()) for row in rows])
    for sentence in left_out:
        print(f"left out: {sentence}", file=sys.stderr)
    shown = ("rank", "method", "score", "of full", "tokens entering", "cost ratio", "badge")
    for model in models:
        for ranking in model.rankings:
            cells = [[row.cells.get(name, "") for name in shown] for row in ranking.rows]
            for row, own in zip(ranking.rows, cells, strict=True):
                own[1] += f" {row.entry.options}" if row.entry and row.entry.options else ""
            print(f"{model.name}{' (toy model)' if model.is_toy else ''}, {ranking.title}\n")
            print(markdown(shown, cells), end="\n\n")
    print(f"Wrote {output} and {output.with_suffix('.csv')}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
