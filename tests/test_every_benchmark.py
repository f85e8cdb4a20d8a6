"""What holds for every registered benchmark: full marks for right answers in every format, and files that are wrong."""

import atexit
import copy
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest

from eval import benchmarks
from eval.answers import jsonl
from eval.answers.jsonl import write_file
from eval.benchmarks import hub, mmbench, mme
from eval.benchmarks.base import Dataset, catalogue, no_submission
from eval.benchmarks.media import Videos
from eval.config import ROOT
from eval.metrics import captions
from eval.results.report import confidence
from eval.results.statistics import summed_by_cluster, terms_of
from eval.score import score_file
from llava.errors import UserError
from tests.eval_fakes import write_gqa

CASES = [
    (name, split, profile)
    for name in benchmarks.names()
    for split in benchmarks.get(name).splits
    for profile in benchmarks.get(name).profiles
]
FULL_MARKS = {"perception": 2000}
OPEN_ENDED = {"cider"}  # no largest value


def root_of(name: str) -> Path:
    return ROOT / "assets" / ("eval_video" if name == "video_qa" else "eval")


@cache
def load(name: str, split: str, profile: str) -> Dataset:
    return benchmarks.get(name).load(root_of(name), split, profile, "auto")


def right(data: Dataset) -> dict[str, str]:
    """Every reference as its answer; "red" where only a server knows it."""
    return {question.id: question.answer or "red" for question in data.questions}


def judged(data: Dataset) -> str:
    return "match" if data.judging is not None else "auto"


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """METEOR takes seconds to start; tests/test_captions.py runs it."""
    monkeypatch.setattr(captions, "has_java", lambda: False)


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[Dataset, dict[str, str]]:
    data = load(*request.param)
    return data, right(data)


def check_full_marks(record: dict) -> None:
    value, main = record["metrics"][record["main"]], record["main"]
    if value is None:
        assert any("upload" in note or "server" in note for note in record["notes"]), "who scores it then?"
    elif main in OPEN_ENDED:
        assert value > 100
    else:
        assert value == pytest.approx(FULL_MARKS.get(main, 100)), record["notes"]


def submission_of(data: Dataset, texts: dict[str, str]) -> dict:
    """The files for the official scorer or server, which hold the answers."""
    made = data.submission(texts)
    assert made or data.submission is no_submission, "no file for the official scorer: return one, or no_submission"
    others = [data.submission(dict.fromkeys(texts, text)) for text in ("A", "B", "seven")]
    assert not made or any(made != other for other in others), "the file does not hold the answers"
    return made


def without_times(made: dict) -> dict:
    """The files with the cells of Excel files in place of their bytes, which hold the time."""
    return {
        name: [*openpyxl.load_workbook(io.BytesIO(content)).active.values] if isinstance(content, bytes) else content
        for name, content in made.items()
    }


def lines_of(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_right_answers_get_full_marks_from_our_file_llavas_and_the_submission(case, tmp_path):
    data, texts = case
    ours = [{"question_id": name, "text": text} for name, text in texts.items()]
    llava = [
        {"question_id": q.official or q.id, "prompt": q.message, "text": texts[q.id], "model_id": "m"}
        for q in data.questions
    ]
    for rows in (ours, llava):
        write_file(tmp_path / "answers.jsonl", lines_of(rows))
        check_full_marks(score_file(tmp_path / "answers.jsonl", data, judge=judged(data)))
    for name, content in submission_of(data, texts).items():
        write_file(tmp_path / "made" / name, content)
    # Excel files are for servers alone; of MME's folder all files are read together.
    made = [path for path in tmp_path.glob("made/*") if path.suffix != ".xlsx"]
    for path in made:
        check_full_marks(score_file(path, data, judge=judged(data)))


def test_questions_about_one_image_are_drawn_together(case):
    """112 questions of MMBench counted as being about 112 images, 15 of which differ: every row holds its own bytes.
    The same happened in DocVQA, InfographicVQA, MMMU and, between its tasks, in MME."""
    data, texts = case
    first = {one.id: data.images.digest(one.images[0]) for one in data.questions if one.images and not one.about}
    for labels in (data.labels(), data.labels(first)):
        of_content = {(first[name], labels[name]) for name in first}
        assert len(of_content) == len({label for _, label in of_content})
        if data.images.noun == "images":
            assert len(of_content) == len({digest for digest, _ in of_content})
        score = data.score(list(texts), texts)
        for name in score.other_terms or [""]:
            drawn = terms_of(score, labels, name)
            assert set(drawn.clusters) <= {labels[one.id] for one in data.questions} or drawn.unit == "image pair"


def test_a_file_that_lacks_answers_or_has_foreign_ones_is_refused(case, tmp_path):
    data, texts = case
    rows = [{"question_id": name, "text": text} for name, text in texts.items()]
    path = tmp_path / "answers.jsonl"
    write_file(path, lines_of(rows[1:]))
    with pytest.raises(UserError, match=rf"1 question without .*\({re.escape(rows[0]['question_id'])}\)"):
        score_file(path, data, judge=judged(data))
    write_file(path, lines_of([*rows, {"question_id": "nobody's", "text": "red"}]))
    with pytest.raises(UserError, match=r"1 prediction .*\(nobody's\)"):
        score_file(path, data, judge=judged(data))
    assert any("nobody's" in note for note in score_file(path, data, partial=True, judge=judged(data))["notes"])


def test_the_headline_is_the_value_of_its_terms_and_lies_in_its_interval(case):
    data, texts = case
    names = list(texts)
    rng, given = np.random.default_rng(0), list(texts.values())
    spoiled = {n: text if rng.random() < 0.6 else given[rng.integers(len(given))] for n, text in texts.items()}
    score = data.score(names, spoiled)
    value = score.values.get(score.main)
    if value is None:
        assert not score.correct
        return
    if score.terms is not None:
        terms = score.terms
        assert float(terms.value(np.asarray(terms.sums).sum(0))) == pytest.approx(value, abs=0.06), "rounded at most"
        assert len(terms.names) == len(terms.clusters) == len(terms.sums)
    else:
        assert 100 * np.mean(list(score.correct.values())) == pytest.approx(value, abs=0.01)
    labels = data.labels()
    found = confidence(score, labels)[score.main]
    drawn = spread_of_drawn(terms_of(score, labels))
    if found["low"] is None:
        images = len({labels[question.id] for question in data.questions})
        assert images <= 20 and found["method"].startswith("n/a: "), "only few images may leave no interval"
        assert ("without spread" in found["method"]) == (drawn < 1e-6)
        return
    assert found["low"] <= value + 1e-6 and value - 1e-6 <= found["high"]
    # A rounded score has no slope: LLaVA-Bench's interval was -334 to 506, or there was none.
    assert 0.7 < (found["high"] - found["low"]) / (2 * 1.96 * drawn) < 1.5, "not what drawing the images gives"


def spread_of_drawn(terms) -> float:
    """The standard deviation of the score over 1,000 samples of its clusters, drawn with replacement."""
    rows, rng = summed_by_cluster(terms), np.random.default_rng(0)
    drawn = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=1000)
    return float(np.std([terms.value(counts @ rows) for counts in drawn]))


def test_questions_and_images_are_there(case):
    data, _ = case
    assert len({question.id for question in data.questions}) == len(data.questions)
    data.check_images(data.questions)
    shown = next((question for question in data.questions if question.images), None)
    assert shown is not None and data.max_new_tokens >= 10
    if not isinstance(data.images, Videos):
        assert data.images.open(shown.images[0]).mode == "RGB"


def test_credit_of_one_answer_agrees_with_the_score(case):
    data, texts = case
    if data.sample_score is None:
        return
    score = data.score(list(texts), texts)
    for question in data.questions[:20]:
        if question.id in score.correct:
            assert data.sample_score(question, texts[question.id]) == pytest.approx(score.correct[question.id])


def test_lmms_evals_profile_strips_answers_before_scoring(case):
    """lmms-eval strips every answer: with a newline after each, ChartQA fell from 100 to 29.49, GQA to 0."""
    data, texts = case
    if data.facts.get("profile") != "lmms" or data.benchmark in ("nocaps", "flickr30k"):
        return
    spaced = {name: f" {text}\n" for name, text in texts.items()}
    assert data.score(list(texts), spaced).values == data.score(list(texts), texts).values
    assert without_times(data.submission(spaced)) == without_times(data.submission(texts))
    if data.sample_score is not None:
        question = data.questions[0]
        assert data.sample_score(question, spaced[question.id]) == data.sample_score(question, texts[question.id])


# Every field of every file that a benchmark reads, made absent, null or of a wrong type. Before records were checked
# where they are read, most of this ended in a traceback (GQA's types, MM-Vet's capability, POPE's ids, null in
# parquet), some of it in another score than the file's without a word. Now there is a sentence that names the file,
# or nothing changes because nothing looks at the field.

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
SPLITS = [(name, split) for name in benchmarks.names() for split in benchmarks.get(name).splits]


@cache
def few_of_gqa() -> Path:
    """Few questions of each split with GQA's optional files: the whole set takes a second to score."""
    data = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, data)
    for split in benchmarks.get("gqa").splits:
        folder = write_gqa(data, count=20, split=split) / "gqa" / "data"
        questions = json.loads((folder / f"{split}_balanced_questions.json").read_text())
        choices = {name: {"valid": [record["answer"]], "plausible": ["red"]} for name, record in questions.items()}
        (folder / f"{split}_all_questions.json").write_text(json.dumps(questions))
        (folder / f"{split}_choices.json").write_text(json.dumps(choices))
    return data


def load_few(name: str, split: str) -> Dataset:
    """The data set read anew, in the first profile."""
    return benchmarks.get(name).load(few_of_gqa() if name == "gqa" else root_of(name), split)


def told(data: Dataset, texts: dict[str, str]) -> tuple[Any, ...]:
    """All that a data set says."""
    score = data.score(list(texts), texts)
    asked = [(q.id, q.message, q.images, q.answer) for q in data.questions]
    return asked, score.values, score.groups, score.correct, score.notes, without_times(data.submission(texts))


@cache
def original(name: str, split: str) -> tuple[dict[str, str], tuple[Any, ...]]:
    data = load_few(name, split)
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
    select, opened = hub.HubTable._select, hub._open

    def select_instead(table: hub.HubTable, columns: Any) -> list[dict[str, Any]]:
        found = select(table, columns)
        middle = len(found) // 2
        change["seen"] |= {name: value for name, value in found[middle].items() if value is not None}
        if change["column"] in found[middle]:
            found[middle][change["column"]] = change["value"]
        return found

    def open_instead(*arguments: Any) -> hub.HubTable:
        table = opened_once(*arguments)
        if change["column"] in table.rows.column_names and change["value"] is ABSENT:
            return hub.HubTable(table.id, table.where, table.rows.remove_columns(change["column"]))
        return table

    opened_once = cache(opened)
    monkeypatch.setattr(hub.HubTable, "_select", select_instead)
    monkeypatch.setattr(hub, "_open", open_instead)
    return change


def check(name: str, split: str, where: str, field: str, value: Any) -> None:
    """The benchmark says what is wrong, or nothing has changed."""
    texts, before = original(name, split)
    try:
        after = told(load_few(name, split), texts)
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
    load_few(name, split)  # fills `files`, also where an earlier test has cached the original
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
    load_few(name, split)  # fills "seen", also where an earlier test has cached the original
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


def test_a_name_leads_to_its_benchmark_by_its_own_module_alone():
    assert set(catalogue()) <= set(benchmarks.names())
    assert all(benchmarks.get(name) is one for name, one in benchmarks.registry().items())


def test_a_file_with_the_name_of_another_benchmark_is_not_passed_over(tmp_path, monkeypatch):
    """It was ignored once a name led to its module alone."""
    (tmp_path / "gqa.yaml").touch()
    monkeypatch.setattr(benchmarks, "SETS", tmp_path)
    monkeypatch.setattr(benchmarks, "registry", lambda: pytest.fail("all are read, of which two have one name"))
    with pytest.raises(pytest.fail.Exception, match="two have one name"):
        benchmarks.get("gqa")
    benchmarks.get("pope")


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(("name", "split"), SPLITS, ids=str)
def test_a_file_of_something_else_is_named(name, split, content, files):
    original(name, split)  # before the first broken file: run alone, what a broken one says was taken for it
    load_few(name, split)
    for path in list(files):
        files[path] = content
        check(name, split, path.name, "", ABSENT)
        files[path] = None
