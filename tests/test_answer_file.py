"""Answer files of others: every naming is read, and nothing that does not fit is scored or compared in silence."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from eval import score
from eval.answers.reading import read_answers
from eval.answers.reuse import check_images
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.media import Folder
from eval.config import RunConfig
from eval.metrics import Score
from eval.run import run
from llava.errors import UserError
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa

IMAGE_IDS = ("p1", "p1", "p2")


def dataset(**changes) -> Dataset:
    """Three questions, two about one image whose name is their official id."""
    questions = tuple(
        Question(f"{image}#{number}", f"What is thing {number}?", "Short.", (f"{image}.jpg",), "x", image)
        for number, image in enumerate(IMAGE_IDS)
    )
    images = Folder(Path("nowhere"))
    return Dataset("a set", questions, images, "0", lambda asked, texts: Score({}, {}, {}), None, dict, **changes)


def written(tmp_path: Path, *rows: object, end: str = "\n") -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + end)
    return path


OURS = [{"question_id": f"{p}#{n}", "text": f"t{n}"} for n, p in enumerate(IMAGE_IDS)]
LLAVA = [
    {"question_id": p, "prompt": f"What is thing {n}?\nShort.", "text": f"t{n}", "metadata": {}}
    for n, p in enumerate(IMAGE_IDS)
]
LMMS = [
    {"doc_id": n, "doc": {"question": f"What is thing {n}?"}, "target": "x", "resps": [[f"t{n}"]]} for n in range(3)
]
EXPECTED = {"p1#0": "t0", "p1#1": "t1", "p2#2": "t2"}
FILTERED = [row | {"resps": [["raw"]], "filtered_resps": row["resps"][0]} for row in LMMS]
VIDEO_LLAVA = [{"id": name, "answer": "reference", "pred": text} for name, text in EXPECTED.items()]


@pytest.mark.parametrize(
    "rows", [OURS, LLAVA, LMMS, FILTERED, VIDEO_LLAVA], ids=["ours", "llava", "lmms-eval", "filtered", "video-llava"]
)
def test_every_naming_is_joined(tmp_path, rows):
    found = read_answers(written(tmp_path, *rows), dataset())
    assert found.texts == EXPECTED and not found.notes


def test_lmms_evals_row_number_tells_questions_about_one_image_apart(tmp_path):
    rows = [{"doc_id": n, "doc": {"question_id": p}, "filtered_resps": [f"t{n}"]} for n, p in enumerate(IMAGE_IDS)]
    assert read_answers(written(tmp_path, *rows), dataset()).texts == EXPECTED
    rows[1]["doc_id"] = 2  # the row of a question about another image
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


def test_prompts_tell_questions_about_one_image_apart_whatever_the_order(tmp_path):
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


def test_ids_that_a_metric_knows_besides_the_questions_may_come_or_lack(tmp_path):
    path = written(tmp_path, *OURS, {"question_id": "extra", "text": "a"})
    assert read_answers(path, dataset(accepts=frozenset({"extra"}))).texts == {**EXPECTED, "extra": "a"}
    assert read_answers(written(tmp_path, *OURS), dataset(accepts=frozenset({"extra"}))).texts == EXPECTED


def test_image_ids_without_a_prompt_are_not_guessed(tmp_path):
    rows = [{"question_id": p, "text": "a"} for p in IMAGE_IDS]
    with pytest.raises(UserError, match="2 questions without"):
        read_answers(written(tmp_path, *rows), dataset())


def test_prompts_of_other_questions_are_refused(tmp_path):
    """Answers to another benchmark with the same ids got a score; a few other prompts are noted."""
    rows = [{"question_id": f"{p}#{n}", "text": "t", "prompt": f"Count the birds {n}"} for n, p in enumerate(IMAGE_IDS)]
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
        (b'{"question_id": "p1#0", "text": "a"}\n{"question_id": \n{}', "line 2 is not valid JSON"),
        (b'{"question_id": "p1#0"}\n', "entry 1 should have an id"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"", "holds no answers"),
    ],
)
def test_json_that_python_reads_in_silence_or_not_at_all_is_refused(tmp_path, content, message):
    """Deep nesting was a RecursionError, of two equal keys the last won, half a character failed when written."""
    path = tmp_path / "answers.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_answers(path, dataset())


def test_what_is_no_regular_file_is_refused(tmp_path):
    """A pipe hung, a folder was a traceback, and a broken link in the place of an optional file was "no such file"."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("pipe", "should be a regular file, not a pipe, socket or device"),
        (".", "not a folder"),
        ("loop", "Too many levels of symbolic links"),
        ("broken", "a link to .*nowhere, which does not exist"),
        ("x" * 300, "File name too long"),
        ("absent", "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_answers(tmp_path / name, dataset())


# -- vtr compare ---------------------------------------------------------------------------------------------------


def run_in(data, output, alpha=0.5, model=None, **changes) -> str:
    """The folder of a finished run of the stand-in model."""
    config = RunConfig(method="first", budget=16, data=data, output=output, batch_size=8, wandb="disabled", **changes)
    run(config, model or FakeLlava(), FakeReducer(alpha=alpha))
    return str(output)


def other_data(folder, change: str):
    """The questions of `write_gqa` with other images, labels or words."""
    data = write_gqa(folder / change)
    if change == "images":
        Image.effect_noise((32, 32), 90).convert("RGB").save(data / "gqa" / "data" / "images" / "n3.jpg")
    elif change == "labels":
        path = data / "gqa" / "data" / "testdev_balanced_questions.json"
        path.write_text(path.read_text().replace('"answer": "', '"answer": "not '))
    elif change == "questions":
        path = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
        path.write_text(path.read_text().replace("Is thing 30", "Was thing 30"))
    return data


def test_command_compares_two_runs(tmp_path, capsys):
    data, out = write_gqa(tmp_path / "data", images=7), tmp_path / "out.json"
    a, b = run_in(data, tmp_path / "a"), run_in(data, tmp_path / "b", 0.7)
    path = tmp_path / "b" / "answers.jsonl"
    wrong = [json.loads(line) | {"text": "wrong"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    assert score.compare_command([a, b, "--data", str(data), "--json", str(out)]) == 0
    record, text = json.loads(out.read_text()), capsys.readouterr().out
    assert record["difference"] == 50 and record["p"] == 2 / 2**7 and record["drawn"] == "image"
    assert "A - B  +50.00 (95 % CI n/a: 7 images" in text and "GQA testdev, accuracy over 40 questions" in text
    assert "p  0.0156, paired permutation test by image: significant at 5 %" in text
    # JSON alone, and no file of the name of a run's folder.
    assert score.compare_command([a, b, "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record
    assert score.compare_command(["--json", a, b, b, "--data", str(data)]) == 2
    assert f"--json {a} is a folder" in capsys.readouterr().err
    assert score.compare_command([a, a, "--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert "A - B  +0.00 (95 % CI n/a: " in text and "p  1.0000" in text and "not significant" in text
    assert score.compare_command([str(tmp_path), a]) == 2
    assert f"{tmp_path} has no result.json" in capsys.readouterr().err


class Fails(FakeLlava):
    """Cannot answer some questions."""

    def __init__(self, *numbers: int):
        super().__init__()
        self.lost = {str(1000 + number) for number in numbers}

    def answer(self, samples, reducer, max_new_tokens=128):
        if self.lost & {sample.id for sample in samples}:
            raise RuntimeError("no such colour")
        return super().answer(samples, reducer, max_new_tokens)


def test_images_of_which_one_run_has_no_answer_are_left_out_of_both(tmp_path, capsys):
    """A has no answer about the first of seven images, B none to question 1: 33 questions about six images are left.

    The even ones are right in A, 17 of 33, and none is in B. All six images speak for A: 2 of 2^6 exchanges.
    """
    data, out = write_gqa(tmp_path / "data", images=7), tmp_path / "out.json"
    a = run_in(data, tmp_path / "a", model=Fails(*range(0, 40, 7)))
    b = run_in(data, tmp_path / "b", 0.7, Fails(1))
    path = tmp_path / "b" / "answers.jsonl"
    wrong = [json.loads(line) | {"text": "wrong"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    assert score.compare_command([a, b, "--data", str(data)]) == 2
    assert f"6 questions have no answer in {a}" in capsys.readouterr().err
    for folders, sign in (((a, b), 1), ((b, a), -1)):
        assert score.compare_command([*folders, "--data", str(data), "--partial", "--json", str(out)]) == 0
        record = json.loads(out.read_text())
        assert record["questions"] == 33 and record["notes"] == ["compared on 33 of 40 questions"]
        assert record["difference"] == pytest.approx(sign * 100 * 17 / 33) and record["p"] == 2 / 2**6
        assert sorted((record["a"], record["b"])) == [0, pytest.approx(100 * 17 / 33)]


def test_images_are_compared_where_both_have_them():
    """An image that only one run was asked about, or whose hash an old run does not hold, is no difference."""
    one = {"x": "1", "y": "2", "old": None, "z": "4"}
    check_images(one, {"x": "1", "other": "9", "old": "3"}, "A and B")
    check_images({}, one, "A and B")
    for changed in ("x", "y", "z"):
        with pytest.raises(UserError, match=rf"A and B were asked about other images \(1 questions: {changed}\)"):
            check_images(one, one | {changed: "9"}, "A and B")


def test_a_run_off_its_budget_is_named_where_it_is_compared(tmp_path, capsys):
    """A score at 21 tokens stood beside one at 16 as if both had kept 16."""
    data = write_gqa(tmp_path / "data")
    a = run_in(data, tmp_path / "a")
    b = run_in(data, tmp_path / "b", 0.7, FakeLlava(mean_error=5, planned=False))
    assert score.compare_command([a, b, "--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert "note: B is off its budget: 21.00 visual tokens" in text and "note: A" not in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("images", "(6 questions: 1003, 1010, 1017, ...)"),
        ("labels", "labels: "),
        ("questions", "labels: "),
        ("model", "model_files: 0123abcd and ffff."),
        ("float16", "dtype: float32 and float16."),
        ("lmms", "max_new_tokens: 128 and 16; profile: absent and lmms"),
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_not_compared(tmp_path, capsys, change, named):
    """Other images, labels or a whole other data folder gave "+100.00, p 0.0000"; two profiles gave a traceback."""
    data, model, options = write_gqa(tmp_path / "data"), FakeLlava(), {}
    second = other_data(tmp_path, change) if change in ("images", "labels", "questions") else data
    if change == "model":
        model.fingerprint = "ffff"
    elif change in ("float16", "lmms"):
        options = {"dtype": change} if change == "float16" else {"profile": change}
    a, b = run_in(data, tmp_path / "a"), run_in(second, tmp_path / "b", 0.7, model, **options)
    capsys.readouterr()
    assert score.compare_command([a, b, "--data", str(data)]) == 2
    assert named in capsys.readouterr().err


def test_answers_about_other_images_are_not_scored(tmp_path, capsys):
    """Their lines hold the hashes of the images, which scoring a file did not read."""
    data, other = write_gqa(tmp_path / "data"), other_data(tmp_path, "images")
    words = ["gqa", "--answers", f"{run_in(data, tmp_path / 'a')}/answers.jsonl", "--data"]
    assert score.main([*words, str(data)]) == 0
    capsys.readouterr()
    assert score.main([*words, str(other)]) == 2
    assert "6 answers about other images" in capsys.readouterr().err
    assert score.main([*words, str(other), "--partial"]) == 0
    shown = capsys.readouterr().out
    assert "GQA testdev, 34 questions" in shown and "6 answers" in shown
    # Scoring needs no images; without them the score says that nobody compared them.
    (other / "gqa" / "data" / "images" / "n3.jpg").unlink()
    assert score.main([*words, str(other)]) == 0
    shown = capsys.readouterr().out
    assert "40 questions" in shown and "images of 6 answers" in shown


def test_what_can_move_an_answer_and_is_no_setting_is_said(tmp_path, capsys):
    """Versions of libraries were stored and never compared; half precision answers depend on the batch size."""
    data = write_gqa(tmp_path / "data")
    a, b = run_in(data, tmp_path / "a"), run_in(data, tmp_path / "b", 0.7)
    c = run_in(data, tmp_path / "c", dtype="bfloat16")
    config = RunConfig("first", 16, data=data, output=tmp_path / "d", dtype="bfloat16", wandb="disabled", batch_size=2)
    run(config, FakeLlava(), FakeReducer(alpha=0.7))
    capsys.readouterr()
    assert score.compare_command([a, b, "--data", str(data)]) == 0
    assert "note" not in capsys.readouterr().out
    record = json.loads((tmp_path / "b" / "result.json").read_text())
    torch, record["versions"]["torch"] = record["versions"]["torch"], "1.0"
    (tmp_path / "b" / "result.json").write_text(json.dumps(record))
    assert score.compare_command([a, b, "--data", str(data)]) == 0
    assert f"versions of torch: {torch} (A); 1.0 (B)" in capsys.readouterr().out
    assert score.compare_command([c, str(tmp_path / "d"), "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "batch sizes" in shown and "8 (A); 2 (B)" in shown


def test_changed_labels_are_said_and_scored_anew(tmp_path, capsys):
    """The labels changed after both runs: the stored answers hold, the stored scores do not."""
    data = write_gqa(tmp_path / "data")
    folders = [run_in(data, tmp_path / name, alpha) for name, alpha in (("a", 0.5), ("b", 0.7))]
    path = data / "gqa" / "data" / "testdev_balanced_questions.json"
    path.write_text(path.read_text().replace('"answer": "', '"answer": "not '))
    assert score.compare_command([*folders, "--data", str(data)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "a") in said and "other labels" in said
    model = FakeLlava()
    for name, alpha in (("a", 0.5), ("b", 0.7)):
        run_in(data, tmp_path / name, alpha, model)
    assert model.asked == [] and json.loads((tmp_path / "a" / "result.json").read_text())["metrics"]["accuracy"] == 0
    capsys.readouterr()
    assert score.compare_command([*folders, "--data", str(data)]) == 0
    assert "A  0.00 %" in capsys.readouterr().out


def test_folders_of_a_limit_are_compared_on_its_questions(tmp_path, capsys):
    """`vtr eval --limit 12` prints the folder limit12, and with it "--benchmark is missing"."""
    data = write_gqa(tmp_path / "data")
    a, b = run_in(data, tmp_path / "a", limit=12), run_in(data, tmp_path / "b", 0.7)
    for first in (f"{a}/limit12", a):
        assert score.compare_command([first, b, "--data", str(data)]) == 0
        shown = capsys.readouterr().out
        assert "accuracy over 12 questions" in shown and "note: compared on 12 of 40 questions" in shown
    assert score.compare_command([a, f"{tmp_path}/c", "--data", str(data)]) == 2
    assert f"There is no folder {tmp_path}/c" in capsys.readouterr().err
