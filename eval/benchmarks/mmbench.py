"""MMBench in English and in Chinese, read from DATA/mmbench or from a copy of lmms-eval's data set.

    mmbench_dev_20230712.tsv       index, question, hint, A to D, answer, category, l2-category, image (base64), ...
    mmbench_dev_cn_20231003.tsv    the same columns; LLaVA's documentation puts the file under mmbench/, its script
                                   reads mmbench_cn/: both are looked at

Every question stands there two to four times with its options rotated; it counts as answered if all of them are. The
newer files mmbench_dev_en_20231003.tsv and MMBench_DEV_EN.tsv are read too: they have 1,164 groups instead of 1,176,
and the number of groups stands in the result. The split `test` has no public answers.

The metric: letters read from answers, and circular accuracy over groups of rotated questions. Source of the
definitions: VLMEvalKit's vlmeval/utils/matching_util.py and vlmeval/dataset/utils/multiple_choice.py (commit e8e78f0)
and lmms-eval's tasks/mmbench/mmbench_evals.py (commit 75571cf). Written from a description, equal to both on the
vectors in tests/data/mmbench. Differs from them: both ask GPT about an answer that their rules cannot read. Here it
counts as wrong, which is what VLMEvalKit does too when it runs without an LLM judge ("exact_matching").
"""

import base64
import binascii
import csv
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from eval.answers.jsonl import read_bytes
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed
from eval.benchmarks.hub import letters, official_file, open_table, option_lines, ungraded
from eval.benchmarks.llava_files import LETTER, LETTER_CN
from eval.benchmarks.media import Inline
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict, write_xlsx
from eval.metrics import Score, ratio_terms
from eval.metrics.accuracy import grouped, percent
from llava.errors import UserError

if TYPE_CHECKING:
    import pandas

MIRROR = ("lmms-lab-encoder/MMBench", "lmms-lab/MMBench")
SERVER = "MMBench's evaluation server, https://opencompass.org.cn/leaderboard-multimodal"

OPTIONS = "ABCDE"
# Columns that LLaVA's conversion leaves out, and the place it gives the prediction.
DROPPED = {"hint", "category", "source", "image", "comment", "l2-category"}
PREDICTION_AT = 6

# The mirror's columns by the names and in the order of the official file.
MIRRORED = ("index", "question", "hint", *OPTIONS, "answer", "category", "image", "source", "L2-category", "split")
COLUMNS_LMMS = ("index", "question", "answer", "prediction", "hint", "source", "split", "category", "L2-category")
# Cells that pandas, with which the official tools read these files, takes for empty: an option "None" is no option.
# Listed here because other versions of pandas have other lists.
EMPTY = frozenset(
    ("", "nan", "NaN", "-nan", "-NaN", "null", "NULL", "None", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A")
) | {"1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}


REQUIRED = ("index", "question", "A", "B")


# A shorter image is the index of another row that shows the same one.
SHORTEST_IMAGE = 64
LONGEST_CELL = 1 << 30
LONGEST_INDEX = 18

Row = dict[str, str | None]
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


@dataclass(frozen=True)
class Edition:
    """One language.

    Attributes:
        config: of the mirror, "en" or "cn".
        files: split -> paths of the official file below the data folder, the usual one first.
        suffix: LLaVA's instruction.
        suffix_lmms, tokens_lmms: lmms-eval's instruction and longest answer.
        nan_is_hint: lmms-eval's prompt starts with "nan" where the mirror has this word for "no hint".
        groups: of the dev split that published numbers are about, where that is known.
    """

    title: str
    config: str
    files: Mapping[str, tuple[str, ...]]
    suffix: str
    suffix_lmms: str
    tokens_lmms: int
    nan_is_hint: bool
    groups: int | None = None


@dataclass(frozen=True)
class Rows(Contents[Row]):
    """The rows of a split from either source; `load` adds the questions.

    Attributes:
        references: rows by index, without the image; empty cells are None, words like "None" are kept.
            "image_name" names what `images` opens.
        stem: of the file to upload.
        columns: as the official file names and orders them.
    """

    stem: str
    columns: tuple[str, ...]


Choices = Mapping[str, str]
Rule = Callable[[str, Choices], str]


@dataclass(frozen=True)
class MmbenchReference:
    """What scoring needs of a row.

    Attributes:
        index: of the row; its group is the index modulo PASS.
        choices: letter -> option text, of the options there are.
        category, l2: the row's place in both levels of abilities; "" where the data does not say.
    """

    index: int
    answer: str
    choices: Choices
    category: str = ""
    l2: str = ""


def load(edition: Edition, data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its rows is said here."""
    lmms, title = profile == "lmms", f"{edition.title} {split}"
    official = official_file(data, source, title, [data / name for name in edition.files[split]], MIRROR)
    table = read_tsv(official) if official is not None else read_mirror(data, edition, split, source)
    rows = table.references
    check_answers(rows.values(), table.images.where)
    if official is not None or not lmms:
        rows = as_pandas(rows)
    questions = []
    for index, row in rows.items():
        text, suffix = ask_lmms(row, edition) if lmms else (ask(row), edition.suffix)
        questions.append(Question(index, text, suffix, (str(row["image_name"]),), row.get("answer") or ""))
    table = replace(table, questions=tuple(questions), references=rows)
    scored = all(question.answer for question in questions)
    if not scored and any(question.answer for question in questions):
        raise UserError(f"{table.source} has rows with and rows without an answer; get it again.")
    items, shown_options = {}, OPTIONS[: 4 if lmms else 5]  # lmms-eval knows no option E
    for index, row in rows.items():
        choices = {letter: str(row[letter]) for letter in shown_options if row.get(letter) is not None}
        answer, category, l2 = (row.get(name) or "" for name in ("answer", "category", "l2-category"))
        items[index] = MmbenchReference(int(str(row["index"])), answer, choices, category, l2)
    groups = len({item.index % PASS for item in items.values()})
    notes: tuple[str, ...] = ()
    if split == "dev" and edition.groups not in (None, groups):
        # Groups tell releases apart.
        notes = (f"the data has {groups:,} groups, the release of the published numbers has {edition.groups:,}",)
    if absent := table.images.missing({str(row["image_name"]) for row in rows.values()}):
        notes += (f"{len(absent):,} images are not there, so questions about one of them count as independent",)
    rule = infer_lmms if lmms else infer
    upload = f"mmbench_{edition.config}_{split}_results.xlsx" if lmms else f"{table.stem}.xlsx"

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        score = evaluate({name: items[name] for name in asked}, texts, rule)
        return replace(score, notes=(*score.notes, *notes))

    def sample_score(question: Question, text: str) -> float:
        return float(rule(text, items[question.id].choices) == question.answer)

    facts = {"rows": len(questions), "groups": groups, "letter rules": "lmms-eval" if lmms else "VLMEvalKit"}
    return table.dataset(
        title,
        profile,
        score if scored else ungraded("accuracy", upload, SERVER),
        sample_score if scored else None,
        lambda texts: {upload: (workbook_lmms if lmms else workbook)(table, texts)},
        facts,
        # LLaVA's script for MMBench generates up to 1,024 tokens, not the 128 of its other scripts.
        max_new_tokens=edition.tokens_lmms if lmms else 1024,
    )


# -- the sources -----------------------------------------------------------------------------------------------------


def read_tsv(path: Path) -> Rows:
    """A question file of MMBench, whose images are decoded when they are asked for; scoring does without them."""
    cells = read_table(path)
    columns = tuple(cells.columns)
    if lost := [name for name in REQUIRED if name not in columns]:
        raise UserError(f"{path} has no column {', '.join(lost)}; it should be one of MMBench's .tsv files.")
    rows: dict[str, Row] = {}
    encoded: dict[str, str] = {}
    first_row: dict[str, str] = {}  # by image: many rows show the same one, most with bytes of their own
    for number, values in enumerate(cells.itertuples(index=False, name=None), start=1):
        where, there = f"{path} row {number}", sum(isinstance(cell, str) for cell in values)
        if there != len(columns):
            raise UserError(f"{where} has {there} cells, the first line names {len(columns)} columns.")
        row: Row = {name: str(cell) or None for name, cell in zip(columns, values, strict=True)}
        if row["question"] is None or row["question"] in EMPTY:
            raise UserError(f"{where} has no question.")
        name = str(int(checked_index(row["index"] or "", where)))
        cell = row.pop("image", None)
        image = name if cell is None or cell in EMPTY else cell
        if name in rows:
            raise UserError(f"{where} has the index {name}, which an earlier row has too.")
        if len(image) > SHORTEST_IMAGE:
            first = first_row.setdefault(image, name)
            encoded[first], image = image, first
        rows[name] = row | {"index": name, "image_name": image}
    if not rows:
        raise UserError(f"{path} has no rows.")
    for name, row in rows.items():
        shown = str(row["image_name"])
        if shown in encoded:
            continue
        if shown not in rows:
            raise UserError(f"Row {name} in {path} shows the image of row {shown!r}, which is not there.")
        row["image_name"] = rows[shown]["image_name"]  # its image may be that of an earlier row

    def fetch(name: str) -> bytes:
        try:
            return base64.b64decode(encoded[name], validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{path}, index {name}, has no readable image ({error}); get the file again.") from error

    images = Inline(str(path), frozenset(encoded), fetch)
    return Rows(path.name, (), rows, images, fingerprint([path]), path.stem, columns)


def as_pandas(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows with empty cells where pandas, and with it the official tools, finds them empty."""
    return {index: {name: None if cell in EMPTY else cell for name, cell in row.items()} for index, row in rows.items()}


def read_table(path: Path) -> "pandas.DataFrame":
    """The cells of a file as text; cells that a row lacks are NaN."""
    # Imported here: other benchmarks do without it.
    import pandas

    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    content = io.BytesIO(read_bytes(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # said of rows with too many cells
            # The other engine of pandas fills short rows with empty cells, so that a cut file would go unnoticed.
            return pandas.read_csv(
                content,
                sep="\t",
                dtype=str,
                keep_default_na=False,
                index_col=False,
                engine="python",
                encoding="utf-8-sig",
            )
    except (ValueError, pandas.errors.ParserWarning) as error:  # ParserError, EmptyDataError, UnicodeDecodeError
        raise UserError(f"{path} is not a table of MMBench ({str(error).splitlines()[0]}).") from error


def checked_index(index: str, where: str) -> str:
    """The index of a row, which is refused if it is no number."""
    if not (index.isascii() and index.isdigit() and len(index) <= LONGEST_INDEX):
        raise UserError(
            f"{where} has the index {index[:40]!r}, which should be a whole number of at most {LONGEST_INDEX} digits."
        )
    return index


def read_mirror(data: Path, edition: Edition, split: str, source: str) -> Rows:
    """The copy that lmms-eval reads, with its cells as they are."""
    table = open_table(data, MIRROR, edition.config, split, source)
    records = table.records(MirrorRow)
    rows: dict[str, Row] = {}
    for number, record in enumerate(records):
        # Empty cells of tables that pandas wrote are NaN, which does not equal itself.
        cells = ((column_name(name), value) for name, value in record.items())
        row: Row = {name: None if value is None or value != value else str(value) for name, value in cells}
        index = checked_index(str(row["index"]), f"{table.where} row {number}")
        if index in rows:
            raise UserError(f"{table.where} has an index twice.")
        # The word "nan" may be an option to lmms-eval, an answer it is not: that is how the test split has none.
        answer = None if row.get("answer") in EMPTY else row.get("answer")
        rows[index] = row | {"index": index, "image_name": f"{number}/image", "answer": answer}
    names = [name for name in MIRRORED if name in records[0] or name == "image"]
    source, stem = f"{table.id}, config {edition.config}", f"MMBench_{edition.config}_{split}"
    columns = tuple(column_name(name) for name in names if name != "E")
    mark = table.fingerprint([name for name in names if name != "image"])
    return Rows(source, (), rows, table.images(), mark, stem, columns)


def column_name(name: str) -> str:
    """A column of the mirror as the official file names it."""
    return name if name in OPTIONS else name.lower()


def check_answers(rows: Iterable[Row], where: str) -> None:
    """Refuse an answer that is no option of its row, which no model can give."""
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


# -- questions and files to upload -----------------------------------------------------------------------------------


def options_of(row: Row) -> list[str]:
    """The options that LLaVA shows: those up to the first that is empty."""
    return [str(option) for option in takewhile(lambda option: not is_none(option), map(row.get, OPTIONS[:4]))]


def ask(row: Row) -> str:
    """LLaVA's wording: hint, question, and the options, a line each."""
    lines = [str(row["question"]), option_lines(letters(options_of(row)))]
    if not is_none(row.get("hint")):
        lines.insert(0, str(row["hint"]))
    return "\n".join(lines)


def ask_lmms(row: Row, edition: Edition) -> tuple[str, str]:
    """lmms-eval's wording and instruction.

    Hint and question stand on one line, a sentence before the options, an empty line after them.
    """
    options = [f"{letter}. {row[letter]}" for letter in OPTIONS if row.get(letter) not in (None, "", "nan")]
    hint = row.get("hint")
    shown = hint is not None and (edition.nan_is_hint or hint != "nan")
    text = "\n".join([f"{row['question']} There are several options:", *options])
    return f"{hint} {text}" if shown else text, f"\n{edition.suffix_lmms}"


def is_none(value: str | None) -> bool:
    """Whether LLaVA's script takes a cell for empty."""
    return value is None or value.lower() in ("nan", "none")


def workbook(table: Rows, texts: Mapping[str, str]) -> bytes:
    """The file of LLaVA's scripts/convert_mmbench_for_submission.py: every row, without a prediction where none is."""
    columns = [name for name in table.columns if name not in DROPPED]
    columns.insert(PREDICTION_AT, "prediction")
    return sheet(columns, columns, (row | {"prediction": texts.get(index)} for index, row in table.references.items()))


def workbook_lmms(table: Rows, texts: Mapping[str, str]) -> bytes:
    """The file of lmms-eval: the rows that were asked."""
    names = [*COLUMNS_LMMS, *OPTIONS]
    asked = ((row, texts[index].strip()) for index, row in table.references.items() if index in texts)
    rows = ({"E": "nan"} | row | {"prediction": text} for row, text in asked)
    return sheet(names, [column_name(name) for name in names], rows)


def sheet(titles: Sequence[str], names: Sequence[str], rows: Iterable[Row]) -> bytes:
    """The cells `names` of the rows below `titles`; the index is a number."""
    cells = ([int(str(row[name])) if name == "index" else row.get(name) for name in names] for row in rows)
    return write_xlsx(titles, cells)


# -- the metric ------------------------------------------------------------------------------------------------------

# Index of a question in its first pass; every further pass adds this much.
PASS = 1_000_000


# What a refusal is read as; no option has this letter.
REFUSED = "Z"
UNREAD = ""
NO_ANSWER = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


# Case is ignored in the letter as well: "the answer is a dog" is read as option A.
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


# lmms-eval reads five letters whatever the question offers, bare or in one of these forms, tried in this order.
LETTERS_LMMS = "ABCDE"
FORMS_LMMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def infer(text: str, choices: Choices) -> str:
    """The option VLMEvalKit's rules read: its letter, REFUSED, or UNREAD."""
    return infer_letter(text, choices) or infer_text(text, choices, longest=2)


def infer_letter(text: str, choices: Choices) -> str:
    """A letter that stands alone within the last four words, or after "answer is"."""
    if NO_ANSWER in text:
        return UNREAD
    if any(refusal in text for refusal in REFUSALS):
        return REFUSED
    words = text.translate(MARKS).split()
    named = [letter for letter in choices if letter in words]
    # Where a letter occurs first is what counts: "A ... A" with a long way between them is not read.
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    named_letter = ANSWER_IS.search(text)
    letter = named_letter.group(1).upper() if named_letter else UNREAD
    return letter if letter in choices else UNREAD


def infer_text(text: str, choices: Choices, longest: float = float("inf")) -> str:
    """The only option whose words occur in the answer.

    Args:
        longest: answers with more characters than this many times all options together are not read.
    """
    text = text.lower()
    if len(text) > longest * sum(len(option) for option in choices.values()):
        return UNREAD
    named = [letter for letter, option in choices.items() if option.lower() in text]
    return named[0] if len(named) == 1 else UNREAD


def infer_lmms(text: str, choices: Choices) -> str:
    """The option lmms-eval's rules read, or UNREAD; E is a letter even of a question with four options."""
    return infer_letter_lmms(text) or infer_text(text, choices)


def infer_letter_lmms(text: str) -> str:
    """A letter that is a word of its own, bare or with the marks that lmms-eval knows."""
    if NO_ANSWER in text:
        return UNREAD
    words = text.split()
    bare = [letter for letter in LETTERS_LMMS if letter in words]
    # In a longer sentence "A" may be the article, so that a bare letter counts only without it.
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for form in FORMS_LMMS:
        marked = [letter for letter in LETTERS_LMMS if form.format(letter) in words]
        if len(marked) == 1:
            return marked[0]
    return UNREAD


def evaluate(items: Mapping[str, MmbenchReference], texts: Mapping[str, str], rule: Rule = infer) -> Score:
    """CircularEval: a group counts if every pass of it is right.

    Groups whose first pass was not asked are left out, as officially. Passes that were not asked cannot fail a group.

    Args:
        items: the rows that count.
        texts: id -> the model's text, one for every row.
    """
    read = {name: rule(texts[name], item.choices) for name, item in items.items()}
    correct = {name: float(read[name] == item.answer) for name, item in items.items()}
    firsts = {item.index: name for name, item in items.items() if item.index < PASS}
    members: dict[int, list[str]] = {index: [] for index in firsts}
    for name, item in items.items():
        if item.index % PASS in members:
            members[item.index % PASS].append(name)
    hits = {str(index): min(correct[name] for name in names) for index, names in members.items()}
    vanilla = [correct[name] for name in firsts.values()]
    unread = sum(not letter for letter in read.values())
    values: dict[str, float | None] = {
        "accuracy": percent(hits.values()) if hits else None,
        "vanilla_accuracy": percent(vanilla) if vanilla else None,
        "unmatched": float(unread),
    }
    # By the first pass of each group.
    heads = {str(index): items[name] for index, name in firsts.items()}
    abilities = {
        "category": {index: item.category for index, item in heads.items() if item.category},
        "l2-category": {index: item.l2 for index, item in heads.items() if item.l2},
    }
    notes = [
        "accuracy: groups in which every rotation of the options is answered right; vanilla_accuracy: their first pass "
        "alone"
    ]
    if unread:
        notes.append(
            f"answers that no rule reads (unmatched): {unread:,}, counted as wrong; the official scorers ask GPT about "
            "them and draw an option at random after three failures"
        )
    if left_out := len(items) - sum(map(len, members.values())):
        notes.append(f"rows of groups whose first pass was not asked, left out: {left_out:,}")
    return Score(
        values,
        {title: grouped(hits, labels) for title, labels in abilities.items() if labels},
        correct,
        tuple(notes),
        points=frozenset({"unmatched"}),
        terms=ratio_terms(hits, unit="group", proportion=True),
    )


ENGLISH = Edition(
    title="MMBench",
    config="en",
    files={
        split: (
            f"mmbench/mmbench_{split}_20230712.tsv",
            f"mmbench/mmbench_{split}_en_20231003.tsv",
            f"mmbench/MMBench_{split.upper()}_EN.tsv",
        )
        for split in ("dev", "test")
    },
    suffix=LETTER,
    suffix_lmms=LETTER,
    tokens_lmms=1024,
    nan_is_hint=False,
    groups=1176,
)

CHINESE = Edition(
    title="MMBench-CN",
    config="cn",
    files={
        split: tuple(
            f"{folder}/{name}.tsv"
            for name in (f"mmbench_{split}_cn_20231003", f"MMBench_{split.upper()}_CN")
            for folder in ("mmbench", "mmbench_cn")
        )
        for split in ("dev", "test")
    },
    suffix=LETTER_CN,
    suffix_lmms="请直接使用所提供的选项字母作为答案回答。",
    tokens_lmms=256,
    nan_is_hint=True,
)


BENCHMARKS = tuple(
    listed(name, partial(load, edition), tuple(edition.files), mirror=MIRROR)
    for name, edition in (("mmbench", ENGLISH), ("mmbench_cn", CHINESE))
)
