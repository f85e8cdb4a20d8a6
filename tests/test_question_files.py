"""Every field of every file that a benchmark reads, made absent, null or of a wrong type.

Before records were checked where they are read, most of this ended in a traceback (GQA's types, MM-Vet's capability,
POPE's ids, null in parquet), some of it in another score than the file's without a word. Now there is a sentence that
names the file, or nothing changes because nothing looks at the field.
"""

import atexit
import copy
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from eval import benchmarks
from eval.answers import jsonl
from eval.benchmarks import hub, mmbench, mme
from eval.benchmarks.base import Dataset
from eval.config import ROOT
from llava.errors import UserError

ABSENT = object()
WRONG = (ABSENT, None, {"x": [1]}, 3.5, True, [["x"]])
# Fields that a record may lack or leave empty, in which case the benchmark does without them.
OPTIONAL = {
    "answer_type",
    "category",
    "data_id",
    "domain",
    "hint",
    "image_id",
    "image_source",
    "image_url",
    "l2-category",
    "L2-category",
    "meta_info",
    "meta_info.source",
    "multiple_choice_answer",
    "question_type",
    "question_type_id",
    "question_types",
    "source",
    "subject",
    "type",
    "ucsf_document_id",
    "ucsf_document_page_no",
}
CAPTIONS = ("flickr30k", "nocaps")
SPLITS = [(name, split) for name in benchmarks.names() for split in benchmarks.get(name).splits]


def folder(name: str) -> Path:
    if name == "gqa":
        return few_of_gqa()
    return ROOT / "assets" / ("eval_video" if name == "video_qa" else "eval")


@cache
def few_of_gqa() -> Path:
    """The first questions of each split: the whole set takes a second to score."""
    data, source = Path(tempfile.mkdtemp()), ROOT / "assets" / "eval" / "gqa"
    atexit.register(shutil.rmtree, data)
    (data / "gqa" / "data").mkdir(parents=True)
    for split in ("testdev", "val"):
        lines = (source / f"llava_gqa_{split}_balanced.jsonl").read_text().splitlines()[:20]
        records = json.loads((source / "data" / f"{split}_balanced_questions.json").read_text())
        few = {name: records[name] for name in (json.loads(line)["question_id"] for line in lines)}
        (data / "gqa" / f"llava_gqa_{split}_balanced.jsonl").write_text("\n".join(lines))
        (data / "gqa" / "data" / f"{split}_balanced_questions.json").write_text(json.dumps(few))
        (data / "gqa" / "data" / f"{split}_all_questions.json").write_text(json.dumps(few))
        choices = {name: {"valid": [record["answer"]], "plausible": ["red"]} for name, record in few.items()}
        (data / "gqa" / "data" / f"{split}_choices.json").write_text(json.dumps(choices))
    return data


def load(name: str, split: str) -> Dataset:
    return benchmarks.get(name).load(folder(name), split)


def told(data: Dataset, texts: dict[str, str]) -> tuple[Any, ...]:
    """All that a data set says."""
    if data.benchmark in CAPTIONS:  # scoring starts Java, for a minute
        return data.questions, data.facts, data.submission(texts)
    score = data.score(list(texts), texts)
    asked = [(q.id, q.message, q.images, q.answer) for q in data.questions]
    return asked, score.values, score.groups, score.correct, score.notes, data.submission(texts)


@cache
def original(name: str, split: str) -> tuple[dict[str, str], tuple[Any, ...]]:
    data = load(name, split)
    texts = {question.id: question.answer or "red" for question in data.questions}
    return texts, told(data, texts)


@pytest.fixture
def files(monkeypatch):
    """Content of files to read instead of theirs, by path; None records what is read."""
    contents: dict[Path, bytes | None] = {}
    read = jsonl.read_bytes

    def read_instead(path: Path) -> bytes:
        found = contents.setdefault(path, None)
        return read(path) if found is None else found

    for module in (jsonl, mmbench, mme):
        monkeypatch.setattr(module, "read_bytes", read_instead)
    return contents


@pytest.fixture
def rows(monkeypatch):
    """(column, value) to put into the middle row of every table that has the column; None changes nothing."""
    change: dict[str, Any] = {"column": None, "seen": {}}
    select, opened = hub.Table._select, hub._open

    def select_instead(table: hub.Table, columns: Any) -> list[dict[str, Any]]:
        found = select(table, columns)
        middle = len(found) // 2
        change["seen"] |= {name: value for name, value in found[middle].items() if value is not None}
        if change["column"] in found[middle]:
            found[middle][change["column"]] = change["value"]
        return found

    def open_instead(*arguments: Any) -> hub.Table:
        table = opened_once(*arguments)
        if change["column"] in table.rows.column_names and change["value"] is ABSENT:
            return hub.Table(table.id, table.where, table.rows.remove_columns(change["column"]))
        return table

    opened_once = cache(opened)
    monkeypatch.setattr(hub.Table, "_select", select_instead)
    monkeypatch.setattr(hub, "_open", open_instead)
    return change


def check(name: str, split: str, where: str, field: str, value: Any) -> None:
    """The benchmark says what is wrong, or nothing has changed."""
    texts, before = original(name, split)
    try:
        after = told(load(name, split), texts)
    except UserError as error:
        assert where in str(error), error
        return
    if field not in OPTIONAL or value not in (ABSENT, None):
        assert after == before, f"{field} of {where} is {value!r}, and other numbers come out without a word"


def records_of(document: Any) -> list[dict[str, Any]]:
    """The records of a file: its lines, the entries of a list, the values of a map, lists in a map, or itself."""
    if isinstance(document, list):
        return [entry for entry in document if isinstance(entry, dict)]
    entries = list(document.values())
    if all(isinstance(entry, dict) for entry in entries):
        return entries
    return [document, *(entry for part in entries if isinstance(part, list) for entry in records_of(part))]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a record's fields are, and those of the objects and first entries of lists in it."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*place, key)
            yield from places(part, (*place, key))
    elif isinstance(value, list) and value:
        yield (*place, 0)
        yield from places(value[0], (*place, 0))


def changed(record: dict[str, Any], place: tuple[Any, ...], value: Any) -> None:
    *path, last = place
    target: Any = record
    for part in path:
        target = target[part]
    if value is ABSENT:
        del target[last]
    else:
        target[last] = value


def is_wrong(place: Sequence[Any], present: Any, value: Any) -> bool:
    """Whether `value` is wrong where `present` stands; a list may well be shorter."""
    if value is ABSENT:
        return not isinstance(place[-1], int)
    return value is None or type(value) is not type(present)


def parsed(path: Path) -> tuple[Any, bool]:
    """The document and whether it is one of JSON lines."""
    content = path.read_bytes()
    try:
        return json.loads(content), False
    except ValueError:
        return [json.loads(line) for line in content.splitlines()], True


@pytest.mark.parametrize(("name", "split"), SPLITS, ids=str)
def test_a_field_that_is_absent_null_or_of_a_wrong_type_is_named(name, split, files):
    original(name, split)
    load(name, split)  # fills `files`, also where an earlier test has cached the original
    read = [path for path in files if path.suffix in (".json", ".jsonl")]
    for path in read:
        document, is_lines = parsed(path)
        records = records_of(document)
        middle = len(records) // 2
        for place in list(places(records[middle])):
            present = records[middle]
            for part in place:
                present = present[part]
            for value in WRONG:
                if not is_wrong(place, present, value):
                    continue
                other = copy.deepcopy(document)
                changed(records_of(other)[middle], place, value)
                text = "\n".join(map(json.dumps, other)) if is_lines else json.dumps(other)
                files[path] = text.encode()
                field = ".".join(str(part) for part in place if not isinstance(part, int))
                check(name, split, path.name, field, value)
        files[path] = None


@pytest.mark.parametrize(("name", "split"), SPLITS, ids=str)
def test_a_cell_that_is_null_or_of_a_wrong_type_is_named(name, split, rows):
    original(name, split)
    load(name, split)  # fills "seen", also where an earlier test has cached the original
    for column, present in rows["seen"].items():
        for value in WRONG:
            if is_wrong([column], present, value):
                rows |= {"column": column, "value": value}
                check(name, split, "hub", column, value)


HOSTILE = {
    "nested": b'{"a": ' * 100_000,
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "no text": b"\xff\xfe\x00",
    "half a pair": rb'{"question_id": "\ud800"}',
    "digits": b'{"question_id": ' + b"9" * 5000 + b"}",
    "twice": b'{"question_id": 1, "question_id": 2}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(("name", "split"), SPLITS, ids=str)
def test_a_file_of_something_else_is_named(name, split, content, files):
    original(name, split)  # before the first broken file: run alone, what a broken one says was taken for it
    load(name, split)
    for path in list(files):
        files[path] = content
        check(name, split, path.name, "", ABSENT)
        files[path] = None
