"""SEED-Bench: both rules, its parts and types, ids that repeat, and the files of both sources."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import seed
from eval.benchmarks.llava_files import LETTER
from eval.score import score_file
from llava.errors import UserError
from tests.benchmark_files import cell, load, write_hub, write_image, write_lines


@pytest.mark.parametrize(
    ("text", "llava", "lmms"),
    [("B", 1, 1), ("b", 0, 1), ("B.", 0, 1), (" B", 0, 1), ("B. dog", 0, 1), ("A", 0, 0), ("", 0, 0), ("big", 0, 1)],
)
def test_llava_wants_the_letter_alone_and_lmms_eval_its_first_character(text, llava, lmms):
    assert seed.exact(text, "B") == llava
    assert seed.first_character(text, "B") == lmms


ITEMS = {
    "1": seed.SeedReference("1", "A", "image", 1),
    "2#1": seed.SeedReference("2", "A", "image", 5),
    "2#2": seed.SeedReference("2", "B", "image", 1),
    "v1": seed.SeedReference("v1", "C", "video", 10),
}


def test_of_questions_with_one_id_the_last_answer_stands_for_all():
    texts = {"1": "A", "2#1": "A", "2#2": "B", "v1": "D"}
    score = seed.evaluate(ITEMS, texts)
    assert score.values == {"accuracy": 50, "image_accuracy": pytest.approx(200 / 3), "video_accuracy": 0}
    assert score.groups["type"] == {
        "Scene Understanding": (100, 2),
        "Instances Counting": (0, 1),
        "Action Recognition": (0, 1),
    }
    assert score.correct == {"1": 1, "2#1": 0, "2#2": 1, "v1": 0}
    assert any("share an id" in note for note in score.notes)
    # "Last" is meant in the order of the answer file.
    assert seed.evaluate(ITEMS, dict(reversed(texts.items()))).correct["2#2"] == 0


def records() -> list[dict]:
    """Two questions about one image with one id, and one about a video."""
    choices = {f"choice_{letter}": word for letter, word in zip("abcd", ("one", "two", "three", "four"), strict=True)}
    image = {"data_id": "p1", "data_type": "image"}
    return [
        image | choices | {"question_id": "49", "question": "How many?", "answer": "B", "question_type_id": 5},
        image | choices | {"question_id": "49", "question": "Which?", "answer": "A", "question_type_id": 1},
        choices
        | {"data_id": "clip", "data_type": "video", "question_id": "v0", "question": "What happens?", "answer": "D"}
        | {"question_type_id": 10},
    ]


def write_official(folder: Path, prompts: bool = True) -> Path:
    data = folder / "seed_bench"
    for name in ("SEED-Bench-image/p1", "SEED-Bench-video-image/10_v0.png"):
        write_image(data / name)
    (data / "SEED-Bench.json").write_text(json.dumps({"questions": records(), "question_type": {}}))
    lines = []
    images = ["SEED-Bench-image/p1"] * 2 + ["SEED-Bench-video-image/10_v0.png"]
    for record, image in zip(records(), images, strict=True):
        name = record["question_id"] if record["data_type"] == "video" else int(record["question_id"])
        text = f"{record['question']}\nA. one\nB. two\nC. three\nD. four\n{LETTER}"
        lines.append({"question_id": name, "image": image, "text": text, "category": record["data_type"]})
    if prompts:  # in another order than SEED-Bench.json
        (data / "llava-seed-bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    return folder


def write_mirror(folder: Path) -> Path:
    images = [[cell()], [cell()], [cell(), cell("green"), cell("blue")]]
    rows = [record | {"image": shown} for record, shown in zip(records(), images, strict=True)]
    return write_hub(folder, "lmms-lab/SEED-Bench", "test", rows)


@pytest.mark.parametrize("prompts", [True, False])
def test_official_files(tmp_path, prompts):
    dataset = load("seed", write_official(tmp_path, prompts))
    questions = {question.id: question for question in dataset.questions}
    assert list(questions) == (["v0", "49#2", "49#1"] if prompts else ["49#1", "49#2", "v0"])
    first = questions["49#1"]
    assert first.message == f"How many?\nA. one\nB. two\nC. three\nD. four\n{LETTER}"
    assert (first.suffix, first.answer, first.official) == (LETTER, "B", "49")
    assert first.images == questions["49#2"].images == ("SEED-Bench-image/p1",)
    assert questions["v0"].images == ("SEED-Bench-video-image/10_v0.png",)
    dataset.check_images(dataset.questions)
    assert dataset.sample(first).image.size == (4, 4)
    assert (dataset.facts["image questions"], dataset.facts["video questions"]) == (2, 1)


def test_llavas_answer_file_and_the_file_to_upload(tmp_path):
    dataset = load("seed", write_official(tmp_path))
    prompts = {question.id: question.message for question in dataset.questions}
    rows = [
        {"question_id": "v0", "prompt": prompts["v0"], "text": "D"},
        {"question_id": 49, "prompt": prompts["49#1"], "text": "B"},
        {"question_id": 49, "prompt": prompts["49#2"], "text": "A"},
    ]
    answers = tmp_path / "merge.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = score_file(answers, dataset)
    assert record["metrics"]["accuracy"] == pytest.approx(200 / 3)
    lines = dataset.submission({"v0": "D", "49#1": "B", "49#2": "A"})["seed_upload.jsonl"].splitlines()
    # In the order of SEED-Bench.json, with the one answer that the official script keeps per id.
    assert [json.loads(line) for line in lines] == [
        {"question_id": "49", "prediction": "A"},
        {"question_id": "49", "prediction": "A"},
        {"question_id": "v0", "prediction": "D"},
    ]


def test_the_image_benchmark_takes_answers_to_everything(tmp_path):
    data = write_official(tmp_path)
    images = load("seed_img", data)
    assert [question.id for question in images.questions] == ["49#2", "49#1"]
    rows = [{"question_id": name, "text": text} for name, text in (("49#1", "A"), ("49#2", "A"), ("v0", "D"))]
    answers = write_lines(tmp_path / "answers.jsonl", rows)
    record = score_file(answers, images)
    assert (record["main"], record["metrics"]["image_accuracy"], record["questions"]) == ("image_accuracy", 50, 2)


def test_the_mirror_shows_the_middle_frame_to_llava_and_all_to_lmms_eval(tmp_path):
    data = write_mirror(tmp_path)
    llava, lmms = load("seed", data), load("seed", data, profile="lmms")
    assert [question.images for question in llava.questions] == [("0/image/0",), ("0/image/0",), ("2/image/1",)]
    assert lmms.questions[2].images == ("2/image/0", "2/image/1", "2/image/2")
    assert llava.sample(llava.questions[2]).image.getpixel((0, 0)) == (0, 128, 0)
    assert llava.questions[0].message == f"How many?\nA. one\nB. two\nC. three\nD. four\n{LETTER}"
    assert llava.facts["source"] == "lmms-lab/SEED-Bench"
    texts = {"49#1": "b.", "49#2": "A", "v0": "D"}
    assert lmms.score(list(texts), texts).values["accuracy"] == 100
    assert lmms.submission(texts)["seed_submission.json"][0] == {"question_id": "49", "prediction": "b"}


def test_bad_files_are_named(tmp_path):
    folder = write_official(tmp_path) / "seed_bench"
    prompts = (folder / "llava-seed-bench.jsonl").read_text().splitlines()
    (folder / "llava-seed-bench.jsonl").write_text("\n".join([*prompts, prompts[0]]))
    with pytest.raises(UserError, match=r"line 4 .* v0 more often"):
        load("seed", tmp_path)
    (folder / "llava-seed-bench.jsonl").write_text(prompts[0])
    with pytest.raises(UserError, match=r"lacks 2 .* 49#1"):
        load("seed", tmp_path)
