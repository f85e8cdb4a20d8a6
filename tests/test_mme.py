"""MME: the metric against the official script, and the readers of its release, its result files and its mirror."""

import json
import random
from pathlib import Path

import pytest

from eval import score
from eval.answers.jsonl import write_file
from eval.benchmarks import mme
from eval.benchmarks.llava_files import SHORT
from eval.benchmarks.mme import PLEASE, MmeReference
from eval.results import report
from llava.errors import UserError
from tests.benchmark_files import cell, edit_line, load, right_answers, scored, write_hub, write_lines

VECTORS = Path(__file__).parent / "data" / "mme"
# Of the fourteen, one with its images in images/ and one with everything in one folder, and one of cognition.
TASKS = ("code_reasoning", "artwork", "count")
NESTED = {"artwork"}


def write_mme(folder: Path, images: int = 3) -> Path:
    """The official layout; the second question of image 2 has two spaces before its instruction."""
    release = folder / "MME" / "MME_Benchmark_release_version"
    prompts = []
    for task in TASKS:
        inner = "images/" if task in NESTED else ""
        for k in range(1, images + 1):
            good, bad = f"Is there a {task} thing {k}?", f"Is there a {task} ghost {k}?"
            space = " " if k == 2 else ""
            answers = release / task / ("questions_answers_YN" if task in NESTED else "") / f"{k:04d}.txt"
            write_file(answers, f"{good}{PLEASE}\tYes\n{bad}{space}{PLEASE}\tNo\n")
            name = f"{task}/{inner}{k:04d}.jpg"
            prompts += [
                {"question_id": name, "image": name, "text": f"{text}\n{SHORT}", "category": task}
                for text in (good, bad)
            ]
    write_lines(folder / "MME" / "llava_mme.jsonl", prompts)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return write_mme(tmp_path / "data")


# The metric.


def test_every_task_equals_the_official_script_to_the_last_digit():
    expected = json.loads((VECTORS / "expected.json").read_text())
    items, texts = {}, {}
    for path in sorted((VECTORS / "answer_files").iterdir()):
        for number, line in enumerate(path.read_text().split("\n")[:-1]):
            file, question, truth, text = line.split("\t")
            name = f"{path.stem} {number}"
            items[name], texts[name] = MmeReference(path.stem, f"{path.stem}/{file}", file, question, truth), text
    found = mme.evaluate(items, texts)
    for kind, table in expected.items():
        assert found.values[kind] == table.pop("total")
        assert {task: found.groups["task score"][task][0] for task in table} == table
    assert found.values["total"] == found.values["perception"] + found.values["cognition"]
    assert found.main == "perception" and {"perception", "cognition", "total", "task score"} <= found.points
    assert found.values["perception"] == pytest.approx(found.terms.value(found.terms.sums.sum(0)), rel=1e-14)


@pytest.mark.parametrize(
    ("text", "official", "lmms"),
    [
        ("Yes", "yes", "yes"),
        ("know", "no", "no"),
        ("unknown", "other", "other"),
        ("  yes", "other", "yes"),
        ("..No", "no", "no"),
        ("...yes", "other", "yes"),
        ("Y", "other", "yes"),
        ("n.", "other", "no"),
    ],
)
def test_a_text_is_read_by_its_first_four_characters(text, official, lmms):
    assert (mme.parse_official(text), mme.parse_lmms(text)) == (official, lmms)


def scores_of(rights: dict[str, list[tuple[bool, bool]]], order=lambda names: names):
    """The score of images whose two answers are right or wrong, by task.

    Args:
        order: in which the questions are asked.
    """
    items, texts = {}, {}
    for task, images in rights.items():
        for k, pair in enumerate(images):
            for n, right in enumerate(pair):
                name = f"{task}/{k}#{n}"
                items[name] = MmeReference(task, f"{task}/{k}", f"{k}.txt", "q", "Yes")
                texts[name] = "Yes" if right else "No"
    asked = order(list(items))
    return mme.evaluate({name: items[name] for name in asked}, {name: texts[name] for name in asked})


def test_a_tasks_score_is_accuracy_plus_that_of_whole_images():
    found = scores_of({"count": [(True, True), (True, False), (False, False), (True, True)]})
    assert found.values["perception"] == pytest.approx(100 * 5 / 8 + 100 * 2 / 4)
    assert found.groups["accuracy"]["count"] == (62.5, 8) and found.groups["accuracy+"]["count"] == (50, 8)
    assert found.values["cognition"] is None and found.values["total"] is None
    assert any(note.startswith("perception is without existence, position") for note in found.notes)


def test_an_image_with_one_answer_counts_in_the_accuracy_alone():
    """The official script stops there; a run over the first questions does not have to."""
    found = scores_of({"OCR": [(True, True), (True, True)]}, order=lambda names: names[:3])
    assert found.values["perception"] == 200
    assert any("1 images without exactly two answers" in note for note in found.notes)


def test_numbers_and_terms_do_not_depend_on_the_order_of_questions():
    rights = {task: [(True, k % 2 == 0) for k in range(6)] for task in ("scene", "count")}
    straight, turned = scores_of(rights), scores_of(rights, order=lambda names: names[::2] + names[1::2][::-1])
    a, b = straight.terms, turned.terms
    assert straight.values == turned.values
    assert a.names == b.names and a.clusters == b.clusters and (a.sums == b.sums).all()


def test_terms_give_what_a_redrawn_set_would_score():
    """Drawing images twice is the same as scoring their lines twice."""
    generator = random.Random(3)
    tasks = ("scene", "OCR")
    rights = {t: [(generator.random() < 0.7, generator.random() < 0.5) for _ in range(5)] for t in tasks}
    terms = scores_of(rights).terms
    times = [generator.randrange(3) for _ in terms.names]
    drawn = {task: [] for task in rights}
    for count, name in zip(times, terms.names, strict=True):
        task, k = name.split("/")
        drawn[task] += [rights[task][int(k)]] * count
    assert terms.value((terms.sums.T * times).sum(1)) == pytest.approx(scores_of(drawn).values["perception"])


def test_the_total_has_an_interval_and_terms_of_its_own():
    """Columns of papers show the total; it had no interval, and tests and averages beside it were of perception."""
    generator = random.Random(3)
    tasks = ("scene", "OCR", "code_reasoning")
    found = scores_of({t: [(generator.random() < 0.7, generator.random() < 0.5) for _ in range(12)] for t in tasks})
    terms = found.other_terms["total"]
    assert terms.value(terms.sums.sum(0)) == pytest.approx(found.values["total"]) != found.values["perception"]
    known = report.confidence(found, {})
    assert known["total"]["mean"] == pytest.approx(found.values["total"])
    assert known["total"]["low"] < known["total"]["mean"] < known["total"]["high"]
    assert known["perception"]["mean"] == pytest.approx(found.values["perception"])


# The files.


def test_questions_of_both_layouts_with_one_or_two_spaces(data):
    dataset = load("mme", data)
    assert len(dataset.questions) == 18 and dataset.facts["images"] == 9
    second = dataset.questions[9]
    assert second.id == "artwork/images/0002.jpg#2" and second.official == "artwork/images/0002.jpg"
    assert (second.question, second.suffix) == ("Is there a artwork ghost 2?", SHORT)
    assert (second.images, second.answer) == (("artwork/images/0002.jpg",), "no")
    lmms = load("mme", data, "lmms")
    assert lmms.questions[9].message == f"Is there a artwork ghost 2? \n{SHORT}", "it keeps the second space"
    assert (lmms.max_new_tokens, dataset.max_new_tokens) == (16, 128)


def test_the_submission_is_what_the_official_conversion_writes(data):
    dataset = load("mme", data)
    files = dataset.submission(right_answers(dataset) | {"count/0002.jpg#2": "No,\tit\nis not"})
    assert set(files) == {f"mme_results/{task}.txt" for task in TASKS}
    lines = files["mme_results/count.txt"].splitlines()
    assert lines[0] == "0001.txt\tIs there a count thing 1? Please answer yes or no.\tYes\tYes"
    assert lines[3] == "0002.txt\tIs there a count ghost 2?  Please answer yes or no.\tNo\tNo, it is not"


def test_result_files_are_read_back_as_answers(data, tmp_path):
    dataset = load("mme", data)
    texts = right_answers(dataset, "artwork/images/0003.jpg#1")
    for name, content in dataset.submission(texts).items():
        # The official files of other models name images, not text files.
        write_file(tmp_path / name, content.replace(".txt\t", ".jpg\t"))
    out = tmp_path / "score.json"
    assert score.main(["mme", "--answers", str(tmp_path / "mme_results"), "--data", str(data), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["metrics"] == scored(dataset, texts).values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0001.jpg\tIs there a count thing 1?\tNo\tYes", "as 'No', the benchmark's files as 'Yes'"),
        ("0001.jpg\tIs there a count thing 1?\tYes", "file, question, answer and prediction"),
        ("0001.jpg\tIs it late?\tYes\tYes", "None of the 1 answers"),
        ("", "expected existence.txt"),
    ],
)
def test_bad_result_files_are_named(data, tmp_path, capsys, line, message):
    write_file(tmp_path / "results" / ("count.txt" if line else "README"), line + "\n")
    assert score.main(["mme", "--answers", str(tmp_path / "results"), "--data", str(data)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("profile", ["llava", "lmms"])
def test_the_mirror_is_read_without_official_files(tmp_path, profile):
    rows = []
    for k in range(3):
        for thing, answer, space in ((f"dog {k}", "Yes", ""), ("ghost", "No", " ")):
            row = {"question_id": f"count/{k}.jpg", "question": f"Is there a {thing}?{space}{PLEASE}"}
            rows.append(row | {"answer": answer, "category": "count", "image": cell()})
    write_hub(tmp_path, "lmms-lab-encoder/MME", "test", rows)
    dataset = load("mme", tmp_path, profile)
    assert dataset.facts["source"] == "lmms-lab-encoder/MME"
    assert [q.id for q in dataset.questions[:2]] == ["count/0.jpg#1", "count/0.jpg#2"]
    assert [q.images for q in dataset.questions[:3]] == [("0/image",), ("0/image",), ("2/image",)]
    assert dataset.questions[1].question == ("Is there a ghost? " if profile == "lmms" else "Is there a ghost?")
    dataset.check_images(dataset.questions)
    texts = right_answers(dataset) | {"count/0.jpg#1": "y"}
    assert scored(dataset, texts).values["perception"] == pytest.approx(
        200 if profile == "lmms" else 100 * 5 / 6 + 100 * 2 / 3
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda folder: (folder / RELEASE).rename(folder / "x"), "No MME release at"),
        (lambda folder: (folder / RELEASE / "count").rename(folder / "x"), "No MME task folder at .*count"),
        (lambda folder: (folder / RELEASE / "count/0001.txt").unlink(), "'Is there a count thing 1\\?', which 0001"),
        (lambda folder: write_file(folder / RELEASE / "count/0001.txt", "no tab\n"), "a question, a tab and Yes or No"),
        (
            lambda folder: edit_line(folder / "llava_mme.jsonl", 1, question_id="cout/1.jpg"),
            "line 1 'cout/1.jpg'|'cout'. Did you mean 'count'",
        ),
        (lambda folder: edit_line(folder / "llava_mme.jsonl", 1, image="/etc/passwd"), "'/etc/passwd'"),
    ],
)
def test_bad_files_are_named(data, broken, message):
    broken(data / "MME")
    with pytest.raises(UserError, match=message):
        load("mme", data)


RELEASE = "MME_Benchmark_release_version"
