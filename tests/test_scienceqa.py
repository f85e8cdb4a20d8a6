"""ScienceQA: the official script's numbers on its edge cases, and the files of both sources."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import scienceqa
from eval.score import score_file
from llava.errors import UserError
from tests.benchmark_files import cell, load, write_hub, write_image

EDGE = json.loads((Path(__file__).parent / "data" / "scienceqa" / "edge.json").read_text())
PROBLEMS = {
    name: scienceqa.Problem(len(problem["choices"]), problem["answer"]) for name, problem in EDGE["problems"].items()
}
TEXTS = {row["question_id"]: row["text"] for row in EDGE["answers"]}
SHOWN = {row["question_id"] for row in EDGE["answers"] if "<image>" in row["prompt"]}
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize("name", EDGE["problems"])
def test_the_letter_is_the_official_scripts(name):
    letter = scienceqa.parse(TEXTS.get(name, "FAILED"))
    assert letter == EDGE["expected_parsed"][name]
    assert scienceqa.OPTIONS[: PROBLEMS[name].choices].find(letter) == EDGE["expected_index"][name]


def test_both_accuracies_are_the_official_scripts():
    score = scienceqa.evaluate(PROBLEMS, TEXTS, SHOWN)
    right = [name for name, sample_score in score.correct.items() if sample_score]
    printed = (
        f"Total: {len(score.correct)}, Correct: {len(right)}, Accuracy: {score.values['accuracy']:.2f}%, "
        f"IMG-Accuracy: {score.values['img_accuracy']:.2f}%"
    )
    assert printed == EDGE["expected_stdout"]
    assert sorted(right) == sorted(EDGE["correct_ids"])
    assert score.main == "img_accuracy"
    assert score.terms.value(score.terms.sums.sum(0)) == pytest.approx(score.values["img_accuracy"])


def test_a_missing_image_prediction_leaves_the_image_denominator_alone():
    problems = {"1": scienceqa.Problem(2, 0), "2": scienceqa.Problem(2, 0)}
    score = scienceqa.evaluate(problems, {"1": "A"}, {"1", "2"})
    assert (score.values["img_accuracy"], score.values["accuracy"]) == (100, 50)
    assert score.values["failed"] == 1
    assert any("questions without a prediction: 1" in note for note in score.notes)


@pytest.mark.parametrize(
    ("text", "letter"),
    [(" b ", "B"), ("B.", "B"), ("B.x", "B"), ("b. x", "FAILED"), ("B x", "FAILED"), ("", "FAILED"), ("(B)", "FAILED")],
)
def test_lmms_eval_reads_a_bare_letter_or_an_upper_case_one_with_a_full_stop(text, letter):
    assert scienceqa.parse_lmms(text) == letter


IMAGE = {"question": "Which is red?", "choices": ["sky", "rose"], "answer": 1, "hint": "Look.", "image": "image.png"}
PROSE = {"question": "How much is 1 + 1?", "choices": ["1", "2", "3"], "answer": 1, "hint": "", "image": None}


def write_official(folder: Path, prompts: bool = True) -> Path:
    data = folder / "scienceqa"
    write_image(data / "images" / "test" / "7" / "image.png")
    subjects = {"7": "natural science", "4": "social science"}
    problems = {"7": IMAGE, "4": PROSE, "9": PROSE}
    problems = {name: problem | {"subject": subjects.get(name, "")} for name, problem in problems.items()}
    (data / "problems.json").write_text(json.dumps(problems))
    (data / "pid_splits.json").write_text(json.dumps({"test": ["4", "7"], "val": ["9"]}))
    if prompts:
        asked = {"from": "human", "value": "<image>\nContext: Look.\nWhich is red?\nA. sky\nB. rose"}
        rows = [
            {"id": "4", "conversations": [{"from": "human", "value": "How much is 1 + 1?\nA. 1\nB. 2\nC. 3"}]},
            {"id": "7", "image": "7/image.png", "conversations": [asked, {"from": "gpt", "value": "B"}]},
        ]
        (data / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    return folder


def write_mirror(folder: Path) -> Path:
    rows = [PROSE | {"image": None}, IMAGE | {"image": cell()}]
    return write_hub(folder, "lmms-lab/ScienceQA", "test", rows, "ScienceQA-FULL")


@pytest.mark.parametrize("prompts", [True, False])
def test_official_questions_with_and_without_an_image(tmp_path, prompts):
    data = load("scienceqa", write_official(tmp_path, prompts))
    prose, image = data.questions
    assert image.question == "Context: Look.\nWhich is red?\nA. sky\nB. rose"
    assert image.message == f"{image.question}\n{LETTER}"
    assert (image.images, image.answer) == (("7/image.png",), "B")
    assert (prose.images, prose.answer) == ((), "B")
    assert data.max_new_tokens == 1024
    assert data.facts == {"source": "official files", "profile": "llava", "questions": 2, "with an image": 1}
    data.check_images(data.questions)
    assert data.sample(image).image.size == (4, 4)
    assert data.sample(prose).image is None


def test_lmms_eval_asks_the_questions_with_an_image_only(tmp_path):
    data = load("scienceqa", write_official(tmp_path), "lmms")
    assert [question.id for question in data.questions] == ["7"]
    assert data.max_new_tokens == 16
    answers = tmp_path / "merge.jsonl"
    answers.write_text("".join(json.dumps({"question_id": n, "text": "b"}) + "\n" for n in ("4", "7")))
    assert score_file(answers, data)["metrics"]["img_accuracy"] == 100


def test_the_mirror_words_questions_as_the_official_files(tmp_path):
    mirror = load("scienceqa", write_mirror(tmp_path))
    official = load("scienceqa", write_official(tmp_path / "other"))
    assert [q.message for q in mirror.questions] == [q.message for q in official.questions]
    assert [q.images for q in mirror.questions] == [(), ("1/image",)]
    assert mirror.facts["source"] == "lmms-lab/ScienceQA"
    assert mirror.sample(mirror.questions[1]).image.size == (4, 4)


def test_scoring_a_file_and_the_official_scorers_input(tmp_path):
    data = load("scienceqa", write_official(tmp_path))
    texts = {"4": "A", "7": "B. rose"}
    lines = data.submission(texts)["scienceqa_answers.jsonl"]
    (tmp_path / "merge.jsonl").write_text(lines)
    record = score_file(tmp_path / "merge.jsonl", data)
    assert record["metrics"] == {"img_accuracy": 100, "accuracy": 50, "failed": 0}
    assert record["groups"] == {"subject": {"natural science": {"percent": 100, "questions": 1}}}
    prompts = {row["question_id"]: row["prompt"] for row in map(json.loads, lines.splitlines())}
    assert prompts["7"].startswith("<image>\nContext: Look.") and prompts["7"].endswith(LETTER)
    assert "<image>" not in prompts["4"]
    assert [data.sample_score(question, texts[question.id]) for question in data.questions] == [0, 1]


def test_bad_files_are_named(tmp_path):
    folder = write_official(tmp_path) / "scienceqa"
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["4", "8"]}))
    with pytest.raises(UserError, match=r"lacks problems .* 1 in all: 8\."):
        load("scienceqa", tmp_path)
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["4", "7", "9"]}))
    with pytest.raises(UserError, match=r"lacks 1 of the questions in .*pid_splits\.json, the first is 9\."):
        load("scienceqa", tmp_path)
    (folder / "problems.json").write_text(json.dumps({"4": PROSE | {"answer": 3}, "7": IMAGE, "9": PROSE}))
    with pytest.raises(UserError, match=r"Problem 4 .* 3 choices .* got 3\."):
        load("scienceqa", tmp_path)
