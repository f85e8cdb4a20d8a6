"""What the English and the Chinese MMBench have in common: reading, wording, scoring and the files to upload."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.hub import letters, official_file, open_table, option_lines, ungraded
from eval.benchmarks.media import Pictures
from eval.benchmarks.mmbench import metric as mmbench
from eval.benchmarks.mmbench.tsv import EMPTY, LONGEST_INDEX, Row, read_tsv
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict
from eval.benchmarks.spreadsheet import read_xlsx, write_xlsx
from eval.metrics import Score, first_names
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/MMBench", "lmms-lab/MMBench")
SERVER = "MMBench's evaluation server, https://opencompass.org.cn/leaderboard-multimodal"

OPTIONS = "ABCDE"
# Columns that LLaVA's conversion leaves out, and the place it gives the prediction.
DROPPED = {"hint", "category", "source", "image", "comment", "l2-category"}
PREDICTION_AT = 6
# The mirror's columns by the names and in the order of the official file.
MIRRORED = ("index", "question", "hint", *OPTIONS, "answer", "category", "image", "source", "L2-category", "split")
# Empty cells of the mirror are NaN where pandas wrote it.
Cell = str | float | None
MirrorRow = TypedDict(
    "MirrorRow",
    {
        "index": Id,
        "question": Filled,
        "A": Cell,
        "B": Cell,
        "hint": NotRequired[Cell],
        "C": NotRequired[Cell],
        "D": NotRequired[Cell],
        "E": NotRequired[Cell],
        "answer": NotRequired[Cell],
        "category": NotRequired[Cell],
        "source": NotRequired[Cell],
        "split": NotRequired[Cell],
        "L2-category": NotRequired[Cell],
    },
)
COLUMNS_LMMS = ("index", "question", "answer", "prediction", "hint", "source", "split", "category", "L2-category")


@dataclass(frozen=True)
class Edition:
    """One language.

    Attributes:
        config: of the mirror, "en" or "cn".
        files: split -> paths of the official file below the data folder, the usual one first.
        suffix: LLaVA's instruction.
        suffix_lmms, max_new_tokens_lmms: lmms-eval's settings.
        nan_is_hint: lmms-eval's prompt starts with "nan" where the mirror has this word for "no hint".
        groups: of the dev split that published numbers are about, where that is known.
    """

    title: str
    config: str
    files: Mapping[str, tuple[str, ...]]
    suffix: str
    suffix_lmms: str
    max_new_tokens_lmms: int
    nan_is_hint: bool
    groups: int | None = None


@dataclass(frozen=True)
class Table:
    """The rows of a split from either source; "picture" names what `pictures` opens.

    Attributes:
        name: file or data set, for facts and for the file to upload.
        notes: what a reader of the score must know of the rows.
        columns: in the official order.
    """

    name: str
    stem: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    pictures: Pictures
    fingerprint: str
    notes: tuple[str, ...]


def load(edition: Edition, data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its rows is said here."""
    files = [data / name for name in edition.files[split]]
    title = f"{edition.title} {split}"
    official = official_file(data, source, title, files, MIRROR)
    table = from_tsv(official) if official is not None else from_mirror(data, edition, split, source == "mirror")
    if profile == "llava":
        # Wherever the rows come from, they are empty where the official tools find them empty.
        table = dataclasses.replace(table, rows=tuple(map(without_empty, table.rows)))
    lmms = profile == "lmms"
    questions = tuple(ask_lmms(row, edition) if lmms else ask(row, edition) for row in table.rows)
    groups = len({int(question.id) % mmbench.PASS for question in questions})
    upload = f"mmbench_{edition.config}_{split}_results.xlsx" if lmms else f"{table.stem}.xlsx"
    write = submission_lmms if lmms else submission
    rule = mmbench.infer_lmms if lmms else mmbench.infer
    scored = all(question.answer for question in questions)
    if not scored and any(question.answer for question in questions):
        raise UserError(f"{table.name} has rows with and rows without an answer; get it again.")
    items = {question.id: item(row, lmms) for question, row in zip(questions, table.rows, strict=True)}

    def sample_score(question: Question, text: str) -> float:
        return float(rule(text, items[question.id].choices) == question.answer)

    def unscored(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return ungraded("accuracy", upload, SERVER)

    return Dataset(
        title,
        questions,
        table.pictures,
        table.fingerprint,
        scorer(items, rule, (*table.notes, *version_notes(edition, split, groups))) if scored else unscored,
        sample_score if scored else None,
        lambda texts: {upload: write(table, texts)},
        # LLaVA's script for MMBench generates up to 1,024 tokens, not the 128 of its other scripts.
        max_new_tokens=edition.max_new_tokens_lmms if lmms else 1024,
        facts={
            "source": table.name,
            "profile": profile,
            "rows": len(questions),
            "groups": groups,
            "letter rules": "lmms-eval" if lmms else "VLMEvalKit",
        },
        read=read_xlsx,
    )


def from_tsv(path: Path) -> Table:
    """The official file, whose cells are empty where pandas takes them for empty."""
    tsv = read_tsv(path)
    notes = check_answers(tsv.rows, str(path))
    return Table(
        path.name, path.stem, tsv.columns, tuple(map(without_empty, tsv.rows)), tsv.pictures, tsv.fingerprint, notes
    )


def from_mirror(data: Path, edition: Edition, split: str, download: bool) -> Table:
    """The copy that lmms-eval reads, cells as they stand."""
    table = open_table(data, MIRROR, edition.config, split, download)
    records = table.records(MirrorRow)
    if not records:
        raise UserError(f"{table.where} has no rows.")
    pictures = table.pictures()
    rows: list[Row] = []
    for number, record in enumerate(records):
        row: Row = {name.lower() if name not in OPTIONS else name: cell(value) for name, value in record.items()}
        index = str(row["index"])
        if not (index.isascii() and index.isdigit() and len(index) <= LONGEST_INDEX):
            raise UserError(f"{table.where} row {number} has the index {index[:40]!r}, which should be a whole number.")
        # The word "nan" may be an option to lmms-eval, an answer it is not: that is how the test split has none.
        answer = None if row.get("answer") in EMPTY else row.get("answer")
        rows.append(row | {"picture": f"{number}/image", "answer": answer})
    if len({row["index"] for row in rows}) < len(rows):
        raise UserError(f"{table.where} has an index twice.")
    there = {*records[0], "image"}
    columns = tuple(name.lower() if name not in OPTIONS else name for name in MIRRORED if name in there and name != "E")
    stem = f"MMBench_{edition.config}_{split}"
    name = f"{table.id}, config {edition.config}"
    fingerprint = table.fingerprint([name for name in MIRRORED if name in records[0]])
    notes = check_answers(rows, table.where)
    return Table(name, stem, columns, tuple(rows), pictures, fingerprint, notes)


def check_answers(rows: Sequence[Row], where: str) -> tuple[str, ...]:
    """Refuse an answer that is no option of its row, which no model can give.

    Returns:
        A note about right options that pandas, and with it the official tools, takes for empty.
    """
    lost = []
    for row in rows:
        answer = row.get("answer")
        if answer is None or answer in EMPTY:
            continue  # of a split without answers, or refused later
        if answer not in OPTIONS or len(answer) > 1:
            raise UserError(
                f"{where}, index {row['index']}, should have a letter from A to E as answer, got {answer!r}."
            )
        if row.get(answer) is None:
            raise UserError(f"{where}, index {row['index']}, has the answer {answer}, which is an empty option.")
        if row[answer] in EMPTY:
            lost.append(str(row["index"]))
    if not lost:
        return ()
    return (
        f"the right option of {len(lost):,} rows ({first_names(lost)}) is a word that the official tools read as an "
        "empty cell: under LLaVA's profile no answer to them is right",
    )


def cell(value: Any) -> str | None:
    """A cell as text; None, and the NaN of tables that pandas wrote, as None."""
    return None if value is None or value != value else str(value)


def without_empty(row: Row) -> Row:
    """The row as pandas would read it from the official file."""
    return {name: None if value in EMPTY else value for name, value in row.items()}


def item(row: Row, lmms: bool) -> mmbench.Item:
    """What scoring needs of a row; lmms-eval takes the mirror's "nan" for an option's text and knows no option E."""
    choices = {letter: str(row[letter]) for letter in OPTIONS[: 4 if lmms else 5] if row.get(letter) is not None}
    answer, category, l2 = (row.get(name) or "" for name in ("answer", "category", "l2-category"))
    return mmbench.Item(int(str(row["index"])), answer, choices, category, l2)


def ask(row: Row, edition: Edition) -> Question:
    """LLaVA's wording: hint, question, and the options up to the first that is empty, a line each."""
    options: list[str] = []
    for letter in OPTIONS[:4]:
        option = row.get(letter)
        if is_none(option):
            break
        options.append(str(option))
    lines = [str(row["question"]), option_lines(letters(options))]
    if not is_none(row.get("hint")):
        lines.insert(0, str(row["hint"]))
    return question(row, "\n".join(lines), edition.suffix)


def ask_lmms(row: Row, edition: Edition) -> Question:
    """lmms-eval's wording: hint and question on one line, a sentence before the options, an empty line after them."""
    options = [f"{letter}. {row[letter]}" for letter in OPTIONS if row.get(letter) not in (None, "", "nan")]
    hint = row.get("hint")
    shown = hint is not None and (edition.nan_is_hint or hint != "nan")
    text = "\n".join([f"{row['question']} There are several options:", *options])
    return question(row, f"{hint} {text}" if shown else text, f"\n{edition.suffix_lmms}")


def question(row: Row, text: str, suffix: str) -> Question:
    return Question(str(row["index"]), text, suffix, (str(row["picture"]),), row.get("answer") or "")


def is_none(value: str | None) -> bool:
    """What LLaVA's script takes for empty besides empty cells."""
    return value is None or value.lower() in ("nan", "none")


def version_notes(edition: Edition, split: str, groups: int) -> tuple[str, ...]:
    """A sentence if the data is another release than that of the published numbers; groups tell them apart."""
    if split != "dev" or edition.groups in (None, groups):
        return ()
    return (f"the data has {groups:,} groups, the release of the published numbers has {edition.groups:,}",)


def scorer(
    items: Mapping[str, mmbench.Item], rule: mmbench.Rule, notes: tuple[str, ...]
) -> Callable[[Sequence[str], Mapping[str, str]], Score]:
    """Circular accuracy of the questions that were asked."""

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        found = mmbench.score({name: items[name] for name in asked}, texts, rule)
        return dataclasses.replace(found, notes=(*found.notes, *notes))

    return score


def submission(table: Table, texts: Mapping[str, str]) -> bytes:
    """The file of LLaVA's scripts/convert_mmbench_for_submission.py: every row, without a prediction where none is."""
    columns = [name for name in table.columns if name not in DROPPED]
    columns.insert(PREDICTION_AT, "prediction")
    rows = (row | {"prediction": texts.get(str(row["index"]))} for row in table.rows)
    return write_xlsx(columns, ([number_or_text(name, row.get(name)) for name in columns] for row in rows))


def submission_lmms(table: Table, texts: Mapping[str, str]) -> bytes:
    """The file of lmms-eval: the rows that were asked."""
    no_option_e: Row = {"E": "nan"}
    asked = [no_option_e | row for row in table.rows if row["index"] in texts]
    rows = (row | {"prediction": texts[str(row["index"])].strip()} for row in asked)
    names = [*COLUMNS_LMMS, *OPTIONS]
    keys = [name if name in OPTIONS else name.lower() for name in names]
    return write_xlsx(names, ([number_or_text(key, row.get(key)) for key in keys] for row in rows))


def number_or_text(column: str, value: str | None) -> str | int | None:
    return int(value) if column == "index" and value is not None else value
