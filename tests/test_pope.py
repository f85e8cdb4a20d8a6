"""POPE: the metric against LLaVA's script, and the reader of its files and of its mirror."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from eval.benchmarks import pope
from eval.benchmarks.llava_files import SHORT
from eval.benchmarks.pope import PopeReference
from llava.errors import UserError
from tests.benchmark_files import cell, edit_line, load, right_answers, scored, write_hub, write_lines

VECTORS = Path(__file__).parent / "data" / "pope"
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_pope(folder: Path, images: int = 4) -> Path:
    """Two questions per image and category in the official layout, yes and no in turn as in POPE."""
    prompts = []
    for category, offset in OFFSETS.items():
        rows = []
        for k in range(2 * images):
            thing, label = (f"dog{k}", "yes") if k % 2 == 0 else (f"{category} thing{k}", "no")
            row = {"question_id": k + 1, "image": f"{k // 2}.jpg", "text": f"Is there a {thing} in the image?"}
            rows.append(row | {"label": label})
            row |= {"question_id": offset + k + 1, "text": f"{row['text']}\n{SHORT}"}
            prompts.append(row | {"category": category})
        write_lines(folder / "pope" / "coco" / f"coco_pope_{category}.json", rows)
    write_lines(folder / "pope" / "llava_pope_test.jsonl", prompts)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return write_pope(tmp_path / "data")


def answers(dataset, wrong: int = 0, seed: int = 0) -> dict[str, str]:
    """Right answers in the order of the questions but for `wrong` of them."""
    return right_answers(dataset, *random.Random(seed).sample([question.id for question in dataset.questions], wrong))


# The metric on the vectors.


def test_every_number_equals_the_official_scripts():
    expected = json.loads((VECTORS / "expected_edge.json").read_text())["official_stdout"]
    labels = [row["label"] for row in lines(VECTORS / "edge_labels.json")]
    texts = {str(row["question_id"]): row["text"] for row in lines(VECTORS / "edge_answers.jsonl")}
    items = {name: PopeReference("random", "x.jpg", label) for name, label in zip(texts, labels, strict=True)}
    found = pope.official_score(items, texts)
    printed = dict(line.split(": ") for line in expected if ": " in line)
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1"}
    for theirs, ours in (names | {"Yes ratio": "yes_ratio"}).items():
        assert found.values[ours] == pytest.approx(100 * float(printed[theirs]), rel=1e-14), ours
    counts = [int(count) for count in expected[1].split("\t")]  # TP, FP, TN, FN
    assert found.terms.sums.sum(0)[:4].tolist() == counts


def test_every_text_is_read_as_the_official_script_reads_it():
    rows = json.loads((VECTORS / "expected_edge.json").read_text())["parsed"]
    assert len(rows) == 53
    assert [pope.parse(row["text"]) for row in rows] == [row["parsed"] for row in rows]


def by_the_book(pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """F1 and accuracy in percent of (prediction, label), counted one by one."""
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    said, there = sum(said == "yes" for said, _ in pairs), sum(label == "yes" for _, label in pairs)
    return 200 * hits / (said + there), 100 * sum(said == label for said, label in pairs) / len(pairs)


def test_the_headline_is_the_mean_of_three_f1_and_follows_from_the_terms(data):
    dataset = load("pope", data)
    texts = answers(dataset, wrong=5)
    found = scored(dataset, texts)
    category = {name: ("adversarial", "random", "popular")[int(name) // 10_000_000] for name in texts}
    label = {question.id: question.answer for question in dataset.questions}
    books = [
        by_the_book([(pope.parse(texts[name]), label[name]) for name in texts if category[name] == wanted])
        for wanted in pope.CATEGORIES
    ]
    assert found.main == "f1"
    assert found.values["f1"] == pytest.approx(np.mean([f1 for f1, _ in books]))
    assert found.values["accuracy"] == pytest.approx(np.mean([accuracy for _, accuracy in books]))
    assert [share for share, _ in found.groups["f1"].values()] == pytest.approx([f1 for f1, _ in books])
    assert list(found.groups["f1"]) == list(pope.CATEGORIES)
    assert found.values["f1"] == pytest.approx(found.terms.value(found.terms.sums.sum(0)), rel=1e-14)
    assert found.terms.names == ("0.jpg", "1.jpg", "2.jpg", "3.jpg")
    assert not found.notes
    assert sum(found.correct.values()) == len(texts) - 5


def test_nothing_to_divide_by_is_zero_and_said(data):
    dataset = load("pope", data)
    found = scored(dataset, dict.fromkeys(answers(dataset), "No"))
    assert found.values["f1"] == found.values["precision"] == found.values["recall"] == 0
    assert found.values["accuracy"] == 50
    assert "random: nothing to divide by for precision and f1, counted as 0" in found.notes


def test_a_run_over_the_first_questions_says_which_category_it_saw(data):
    dataset = load("pope", data)
    asked = [question.id for question in dataset.questions[:6]]
    texts = answers(dataset)
    found = dataset.score(asked, {name: texts[name] for name in asked})
    assert found.values["f1"] == 100 and list(found.groups["f1"]) == ["adversarial"]
    assert any("adversarial alone" in note for note in found.notes)


# As lmms-eval.


def test_lmms_compares_the_whole_text_and_pools_the_categories(data):
    dataset = load("pope", data, profile="lmms")
    texts = {name: f" {text.upper()} " for name, text in answers(dataset, wrong=5, seed=2).items()}
    found = scored(dataset, texts)
    pairs = [(texts[q.id].strip().lower(), q.answer) for q in dataset.questions]
    assert (found.values["f1"], found.values["accuracy"]) == pytest.approx(by_the_book(pairs))
    assert found.values["f1"] == pytest.approx(found.terms.value(found.terms.sums.sum(0)))


def test_lmms_yes_ratio_is_that_of_the_labels_and_other_answers_are_left_out_of_its_recall(data):
    """Bugs of lmms-eval; the ratio of the answers is beside the first."""
    dataset = load("pope", data, profile="lmms")
    texts = answers(dataset)
    found = scored(dataset, dict.fromkeys(texts, "yes"))
    assert found.values["yes_ratio_lmms"] == 50 and found.values["yes_ratio"] == 100
    positive = next(question.id for question in dataset.questions if question.answer == "yes")
    found = scored(dataset, texts | {positive: "Yes."})
    assert found.values["recall"] == 100 and found.values["accuracy"] == pytest.approx(100 * 23 / 24)
    assert any(note.startswith("1 answers are neither") for note in found.notes)


# The files.


def test_questions_and_splits(data):
    whole = load("pope", data)
    first = whole.questions[0]
    assert (first.id, first.question, first.suffix) == ("1", "Is there a dog0 in the image?", SHORT)
    assert (first.images, first.answer) == (("0.jpg",), "yes")
    assert whole.facts["questions"] == {"adversarial": 8, "random": 8, "popular": 8} and whole.max_new_tokens == 128
    random_only = load("pope", data, split="random")
    assert {question.id for question in random_only.questions} == {str(10_000_001 + k) for k in range(8)}
    assert scored(random_only, answers(random_only)).values["f1"] == 100


def test_labels_of_another_version_are_found_by_words(data):
    """Later random files have 90 questions more, so that positions and numbers are those of other questions."""
    path = data / "pope" / "coco" / "coco_pope_random.json"
    rows = lines(path)
    extra = {"question_id": 9, "image": "9.jpg", "text": "Is there a cat in the image?", "label": "no"}
    write_lines(path, [extra, *({**row, "question_id": 100 + row["question_id"]} for row in rows)])
    dataset = load("pope", data)
    assert scored(dataset, answers(dataset)).values["f1"] == 100
    write_lines(path, [extra, *rows[:-1]])
    with pytest.raises(UserError, match=r"not in .*random\.json"):
        load("pope", data)


def test_the_submission_is_what_the_official_script_looks_up(data):
    dataset = load("pope", data)
    texts = answers(dataset)
    (content,) = dataset.submission(texts).values()
    rows = [json.loads(line) for line in content.splitlines()]
    prompts = lines(data / "pope" / "llava_pope_test.jsonl")
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in prompts]
    expected = [(row["text"], texts[str(row["question_id"])]) for row in prompts]
    assert [(row["prompt"], row["text"]) for row in rows] == expected


def write_mirror(folder: Path) -> Path:
    rows = []
    for category in OFFSETS:
        for k in range(4):
            row = {"question_id": str(k + 1), "question": f"Is there a {category} thing {k}?", "category": category}
            row |= {"answer": "no" if k % 2 else "yes", "image_source": f"COCO_{k // 2}", "image": cell()}
            rows.append(row)
    return write_hub(folder, "lmms-lab/POPE", "test", rows)


@pytest.mark.parametrize("profile", ["llava", "lmms"])
def test_the_mirror_is_read_without_official_files(tmp_path, profile):
    dataset = load("pope", write_mirror(tmp_path), profile=profile)
    assert dataset.facts["source"] == "lmms-lab/POPE"
    assert [q.id for q in dataset.questions[:2]] == ["adversarial/1", "adversarial/2"]
    assert dataset.questions[0].suffix == SHORT
    # The image of two questions, and of other categories, is the same.
    assert {q.images for q in dataset.questions} == {("0/image",), ("2/image",)}
    dataset.check_images(dataset.questions)
    assert scored(dataset, answers(dataset)).values["f1"] == 100


ASKED = "llava_pope_test.jsonl"
LABEL = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda pope: (pope / "coco" / "coco_pope_popular.json").unlink(), "No POPE labels at .*popular.*e3e39262"),
        (
            lambda pope: write_lines(pope / "coco" / "coco_pope_random.json", [{**LABEL, "label": "ja"}]),
            "line 1 .* label, got 'ja'",
        ),
        (lambda pope: edit_line(pope / ASKED, 1, category="randon"), "line 1 .* category, got 'randon'"),
        (lambda pope: edit_line(pope / ASKED, 1, image="../x.jpg"), r"'\.\./x\.jpg'"),
        (lambda pope: edit_line(pope / ASKED, 1, question_id=2), "line 2 asks question 2 "),
    ],
)
def test_bad_files_are_named(data, broken, message):
    broken(data / "pope")
    with pytest.raises(UserError, match=message):
        load("pope", data)


@pytest.mark.parametrize("text", ["", "banana", "yesterday"])
def test_gibberish_counts_as_yes_with_a_note(data, text):
    """Answers that say neither yes nor no gave an F1 of 66.7 without a word."""
    dataset = load("pope", data)
    names = [question.id for question in dataset.questions]
    found = dataset.score(names, dict.fromkeys(names, text))
    assert any(note.startswith(f"{len(names)} of {len(names)} answers say neither") for note in found.notes)
    for said in ("Yes", "no", "Yes, there is a dog."):
        assert not any("say neither" in note for note in dataset.score(names, dict.fromkeys(names, said)).notes)
