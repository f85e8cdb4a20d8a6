"""Answer files of others: every naming is read, and nothing that does not fit is scored in silence."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from eval.answers.reading import read_answers
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.media import Folder
from eval.metrics import Score
from llava.errors import UserError

PICTURE_IDS = ("p1", "p1", "p2")


def dataset(**changes) -> Dataset:
    """Three questions, two about one picture whose name is their official id."""
    questions = tuple(
        Question(f"{picture}#{number}", f"What is thing {number}?", "Short.", (f"{picture}.jpg",), "x", picture)
        for number, picture in enumerate(PICTURE_IDS)
    )
    pictures = Folder(Path("nowhere"))
    return Dataset("a set", questions, pictures, "0", lambda asked, texts: Score({}, {}, {}), None, dict, **changes)


def written(tmp_path: Path, *rows: object, end: str = "\n") -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + end)
    return path


OURS = [{"question_id": f"{p}#{n}", "text": f"t{n}"} for n, p in enumerate(PICTURE_IDS)]
LLAVA = [
    {"question_id": p, "prompt": f"What is thing {n}?\nShort.", "text": f"t{n}", "metadata": {}}
    for n, p in enumerate(PICTURE_IDS)
]
LMMS = [
    {"doc_id": n, "doc": {"question": f"What is thing {n}?"}, "target": "x", "resps": [[f"t{n}"]]} for n in range(3)
]
EXPECTED = {"p1#0": "t0", "p1#1": "t1", "p2#2": "t2"}


@pytest.mark.parametrize("rows", [OURS, LLAVA, LMMS], ids=["ours", "llava", "lmms-eval"])
def test_every_naming_is_joined(tmp_path, rows):
    found = read_answers(written(tmp_path, *rows), dataset())
    assert found.texts == EXPECTED and not found.notes


def test_lmms_evals_row_number_tells_questions_about_one_picture_apart(tmp_path):
    rows = [{"doc_id": n, "doc": {"question_id": p}, "filtered_resps": [f"t{n}"]} for n, p in enumerate(PICTURE_IDS)]
    assert read_answers(written(tmp_path, *rows), dataset()).texts == EXPECTED
    rows[1]["doc_id"] = 2  # the row of a question about another picture
    with pytest.raises(UserError, match=r"without a prediction \(p1#1\)"):
        read_answers(written(tmp_path, *rows), dataset())


def test_row_numbers_of_the_mirror_are_not_joined_with_official_files(tmp_path):
    with pytest.raises(UserError, match=r"add --source mirror"):
        read_answers(written(tmp_path, *LMMS), dataset(facts={"source": "official"}))
    assert read_answers(written(tmp_path, *LMMS), dataset(facts={"source": "lmms-lab/X"})).texts == EXPECTED


def test_lists_and_maps_are_read(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"question_id": name, "answer": text} for name, text in EXPECTED.items()], indent=1))
    assert read_answers(path, dataset()).texts == EXPECTED
    for indent in (None, 2):
        path.write_text(json.dumps(EXPECTED, indent=indent))
        assert read_answers(path, dataset()).texts == EXPECTED


def test_filtered_responses_win_over_raw_ones(tmp_path):
    rows = [{**row, "filtered_resps": [f"f{row['doc_id']}"]} for row in LMMS]
    assert list(read_answers(written(tmp_path, *rows), dataset()).texts.values()) == ["f0", "f1", "f2"]


def test_video_llavas_answer_is_the_reference_and_pred_the_text(tmp_path):
    rows = [{"id": name, "answer": "reference", "pred": text} for name, text in EXPECTED.items()]
    assert read_answers(written(tmp_path, *rows), dataset()).texts == EXPECTED


def test_prompts_tell_questions_about_one_picture_apart_whatever_the_order(tmp_path):
    found = read_answers(written(tmp_path, LLAVA[1], LLAVA[2], LLAVA[0]), dataset())
    assert found.texts == EXPECTED
    assert list(found.texts) == ["p1#1", "p2#2", "p1#0"], "the file's order is kept for metrics that match by position"
    assert found.notes == ("the answers are not in the order of the question file",)


@pytest.mark.parametrize(
    ("rows", "sentence", "kept"),
    [
        (OURS[:2], r"1 question without a prediction \(p2#2\)", 2),
        ([*OURS, {"question_id": "p9", "text": "a"}], r"1 prediction for questions that are not .* \(p9\)", 3),
        ([*OURS, OURS[0]], r"1 answer given twice in the same words \(p1#0\)", 3),
        ([*OURS[:2], '{"question_id": "p2#2", "te'], r"line 3, the last one, is cut off", 2),
    ],
    ids=["missing", "foreign", "repeated", "torn"],
)
def test_what_does_not_fit_is_refused_or_noted(tmp_path, rows, sentence, kept):
    path = written(tmp_path, *rows, end="")
    with pytest.raises(UserError, match=sentence):
        read_answers(path, dataset())
    found = read_answers(path, dataset(), partial=True)
    assert len(found.texts) == kept and any("left out" in note for note in found.notes)


def test_two_different_answers_are_never_scored(tmp_path):
    path = written(tmp_path, *OURS, {"question_id": "p1#0", "text": "other"})
    with pytest.raises(UserError, match=r"1 question answered more than once .*p1#0"):
        read_answers(path, dataset(), partial=True)


def test_another_benchmarks_file_is_named(tmp_path):
    path = written(tmp_path, {"question_id": "9001", "text": "a"})
    with pytest.raises(UserError, match=r"None of the 1 answers .* belongs to a set, whose ids look like p1"):
        read_answers(path, dataset(), partial=True)


def test_a_torn_line_in_the_middle_is_no_cut_file(tmp_path):
    path = written(tmp_path, OURS[0], '{"question_id"', OURS[2])
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        read_answers(path, dataset(), partial=True)


def test_ids_that_a_metric_knows_besides_the_questions_may_come_or_lack(tmp_path):
    path = written(tmp_path, *OURS, {"question_id": "extra", "text": "a"})
    assert read_answers(path, dataset(accepts=frozenset({"extra"}))).texts == {**EXPECTED, "extra": "a"}
    assert read_answers(written(tmp_path, *OURS), dataset(accepts=frozenset({"extra"}))).texts == EXPECTED


def test_picture_ids_without_a_prompt_are_not_guessed(tmp_path):
    rows = [{"question_id": p, "text": "a"} for p in PICTURE_IDS]
    with pytest.raises(UserError, match=r"2 questions without a prediction"):
        read_answers(written(tmp_path, *rows), dataset())


def test_prompts_of_other_questions_are_refused(tmp_path):
    """Answers to another benchmark with the same ids got a score; a few other prompts are noted."""
    rows = [
        {"question_id": f"{p}#{n}", "text": "t", "prompt": f"Count the birds {n}"} for n, p in enumerate(PICTURE_IDS)
    ]
    with pytest.raises(UserError, match=r"3 of 3 recorded prompts .* p1#0 was asked 'Count the birds 0'"):
        read_answers(written(tmp_path, *rows), dataset(), partial=True)
    rows[1:] = [row | {"prompt": f"what is  THING {n}?\nOther words."} for n, row in enumerate(rows[1:], start=1)]
    assert read_answers(written(tmp_path, *rows), dataset()).notes == (
        "1 of 3 recorded prompts do not hold their question (p1#0)",
    )


def test_rows_of_another_lmms_eval_task_are_refused(tmp_path):
    """Rows are numbers: samples of AI2D were scored as LLaVA-Bench."""
    rows = [row | {"doc": {"question": f"Which planet is number {row['doc_id']}"}} for row in LMMS]
    with pytest.raises(UserError, match="answers other questions than those of a set"):
        read_answers(written(tmp_path, *rows), dataset())


def test_a_store_of_another_benchmark_is_refused_where_all_prompts_are_alike(tmp_path):
    """Captions are all asked in the same words: answers to Flickr30k were scored as NoCaps."""
    questions = tuple(Question(str(n), "Describe it.", "", (f"{n}.jpg",), "x") for n in range(3))
    data = dataclasses.replace(dataset(benchmark="nocaps"), questions=questions)
    path = written(tmp_path, *({"question_id": str(n), "prompt": "Describe it.", "text": "a"} for n in range(3)))
    assert len(read_answers(path, data).texts) == 3
    (tmp_path / "settings.json").write_text(json.dumps({"benchmark": "flickr30k"}))
    with pytest.raises(UserError, match=r"holds answers to flickr30k, as .*settings\.json says, not to nocaps"):
        read_answers(path, data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'[{"question_id": "a", "text": "x"}]'.replace(b"[", b"[" * 100_000), "nested too deeply"),
        (b'{"question_id": "a", "text": "x", "text": "y"}\n', "the key 'text' stands twice"),
        (b'{\n"p1#0": "a",\n"p1#0": "b"}', "the key 'p1#0' stands twice"),
        (rb'{"question_id": "p1#0", "text": "\ud83d"}', "half of a surrogate pair"),
        (b'{"question_id": ' + b"9" * 5000 + b', "text": "a"}\n{}', "a number with too many digits"),
    ],
)
def test_json_that_python_reads_in_silence_or_not_at_all_is_refused(tmp_path, content, message):
    """Deep nesting was a RecursionError, of two equal keys the last won, half a character failed when written."""
    path = tmp_path / "answers.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_answers(path, dataset())


def test_what_is_no_regular_file_is_refused(tmp_path):
    """A pipe hung, a folder was a traceback, and a broken link in the place of an optional file was "no such file"."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("pipe", "should be a regular file, not a pipe"),
        (".", "should be a regular file, not a folder"),
        ("loop", "Too many levels of symbolic links"),
        ("broken", "a link to .*nowhere, which does not exist"),
        ("x" * 300, "File name too long"),
        ("absent", "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_answers(tmp_path / name, dataset())
