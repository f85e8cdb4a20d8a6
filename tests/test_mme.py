"""MME: the metric against the official script, and the readers of its release, its result files and its mirror."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest

from eval import benchmarks, score
from eval.answers.jsonl import write_file
from eval.benchmarks import mme
from eval.benchmarks.llava_files import SHORT
from eval.benchmarks.mme import PLEASE, Line, score_folder
from llava.errors import UserError
from tests.benchmark_files import cell, write_hub, write_lines

VECTORS = Path(__file__).parent / "data" / "mme"
# Of the fourteen, one with its pictures in images/ and one with everything in one folder, and one of cognition.
TASKS = ("code_reasoning", "artwork", "count")
NESTED = {"artwork"}


def write_mme(folder: Path, images: int = 3) -> Path:
    """The official layout; the second question of picture 2 has two spaces before its instruction."""
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


def load(data: Path, profile: str = "llava", source: str = "auto"):
    return benchmarks.get("mme").load(data, "test", profile, source)


def answers(dataset, *wrong: str) -> dict[str, str]:
    """Right answers, but for the ids in `wrong`."""
    turned = {"yes": "No", "no": "Yes"}
    return {q.id: turned[q.answer] if q.id in wrong else q.answer.capitalize() for q in dataset.questions}


def scored(dataset, texts):
    return dataset.score([question.id for question in dataset.questions], texts)


# The metric.


def test_every_task_equals_the_official_script_to_the_last_digit():
    expected = json.loads((VECTORS / "expected.json").read_text())
    found = score_folder(VECTORS / "answer_files", partial=True)
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
        ("No, it is not", "no", "no"),
        ("know", "no", "no"),
        ("nope", "no", "no"),
        ("eyes", "yes", "yes"),
        ("unknown", "other", "other"),
        ("  yes", "other", "yes"),
        ("..No", "no", "no"),
        ("...yes", "other", "yes"),
        ("Y", "other", "yes"),
        ("n.", "other", "no"),
        ("", "other", "other"),
        ("noyes", "no", "no"),
        ("yesno", "yes", "yes"),
    ],
)
def test_a_text_is_read_by_its_first_four_characters(text, official, lmms):
    assert (mme.parse_official(text), mme.parse_lmms(text)) == (official, lmms)


def pairs(task: str, rights: list[tuple[bool, bool]]) -> list[Line]:
    return [
        Line(f"{task}/{k}#{n}", f"{task}/{k}", "Yes", "Yes" if right else "No")
        for k, pair in enumerate(rights)
        for n, right in enumerate(pair)
    ]


def test_a_tasks_score_is_accuracy_plus_that_of_whole_images():
    found = mme.official_score({"count": pairs("count", [(True, True), (True, False), (False, False), (True, True)])})
    assert found.values["perception"] == pytest.approx(100 * 5 / 8 + 100 * 2 / 4)
    assert found.groups["accuracy"]["count"] == (62.5, 8) and found.groups["accuracy+"]["count"] == (50, 8)
    assert found.values["cognition"] is None and found.values["total"] is None
    assert any(note.startswith("perception is without existence, position") for note in found.notes)


def test_two_lines_are_an_image_and_the_right_pairs_stand_beside():
    """A quirk of the official script: it never looks at the file names."""
    a, b, c, d = pairs("OCR", [(True, True), (False, False)])
    straight, mixed = mme.official_score({"OCR": [a, b, c, d]}), mme.official_score({"OCR": [a, c, b, d]})
    assert straight.values["perception"] == 100 and mixed.values["perception"] == 50
    assert mixed.values["perception_paired_by_image"] == 100
    assert "perception_paired_by_image" in mixed.points and "perception_paired_by_image" not in straight.values
    assert any("2 of its 2 pairs" in note for note in mixed.notes)
    assert mme.lmms_score({"OCR": [a, c, b, d]}).values["perception"] == 100


def test_an_image_with_one_answer_counts_in_the_accuracy_alone():
    """The official script stops there; a run over the first questions does not have to."""
    found = mme.official_score({"OCR": pairs("OCR", [(True, True), (True, True)])[:3]})
    assert found.values["perception"] == 200
    assert any("1 images without exactly two answers" in note for note in found.notes)


def test_terms_do_not_depend_on_the_order_of_images():
    rows = {task: pairs(task, [(True, k % 2 == 0) for k in range(6)]) for task in ("scene", "count")}
    turned = {task: [line for k in (4, 2, 0) for line in lines[2 * k : 2 * k + 4]] for task, lines in rows.items()}
    a, b = mme.official_score(rows).terms, mme.official_score(turned).terms
    assert a.names == b.names and a.clusters == b.clusters and (a.sums == b.sums).all()


def test_terms_give_what_a_redrawn_set_would_score():
    """Drawing images twice is the same as scoring their lines twice."""
    generator = random.Random(3)
    rows = {
        t: pairs(t, [(generator.random() < 0.7, generator.random() < 0.5) for _ in range(5)]) for t in ("scene", "OCR")
    }
    terms = mme.official_score(rows).terms
    times = [generator.randrange(3) for _ in terms.names]
    drawn = {task: [] for task in rows}
    for copy, task in itertools.product(range(3), rows):
        for line in (line for line in rows[task] if copy < times[terms.names.index(line.image)]):
            drawn[task].append(Line(f"{line.id} {copy}", f"{line.image} {copy}", line.truth, line.text))
    assert terms.value((terms.sums.T * times).sum(1)) == pytest.approx(mme.official_score(drawn).values["perception"])


def test_the_total_has_an_interval_and_terms_of_its_own():
    """Columns of papers show the total; it had no interval, and tests and averages beside it were of perception."""
    from eval.results import report

    generator = random.Random(3)
    tasks = ("scene", "OCR", "code_reasoning")
    rows = {t: pairs(t, [(generator.random() < 0.7, generator.random() < 0.5) for _ in range(12)]) for t in tasks}
    found = mme.official_score(rows)
    terms = found.other_terms["total"]
    assert terms.value(terms.sums.sum(0)) == pytest.approx(found.values["total"]) != found.values["perception"]
    known = report.confidence(found, [])
    assert known["total"]["mean"] == pytest.approx(found.values["total"])
    assert known["total"]["low"] < known["total"]["mean"] < known["total"]["high"]
    assert known["perception"]["mean"] == pytest.approx(found.values["perception"])
    assert not mme.official_score({"scene": rows["scene"]}).values["cognition"]


def test_a_wrong_task_or_truth_is_an_error():
    with pytest.raises(UserError, match=r"Unknown MME task 'scenes'.* Did you mean 'scene'"):
        mme.official_score({"scenes": pairs("scenes", [(True, True)])})
    with pytest.raises(UserError, match="should be yes or no, got 'Maybe'"):
        mme.official_score({"OCR": [Line("a", "a", "Maybe", "Yes")]})


# The files.


def test_questions_of_both_layouts_with_one_or_two_spaces(data):
    dataset = load(data)
    assert len(dataset.questions) == 18 and dataset.facts["images"] == 9
    second = dataset.questions[9]
    assert second.id == "artwork/images/0002.jpg#2" and second.official == "artwork/images/0002.jpg"
    assert (second.question, second.suffix) == ("Is there a artwork ghost 2?", SHORT)
    assert (second.images, second.answer) == (("artwork/images/0002.jpg",), "no")


def test_lmms_keeps_the_second_space(data):
    question = load(data, "lmms").questions[9]
    assert question.message == f"Is there a artwork ghost 2? \n{SHORT}"
    assert load(data, "lmms").max_new_tokens == 16 and load(data).max_new_tokens == 128


def test_scores_of_answers_in_our_order(data):
    dataset = load(data)
    found = scored(dataset, answers(dataset, "count/0001.jpg#2"))
    assert found.values["cognition"] == 200
    assert found.values["perception"] == pytest.approx(200 + 100 * 5 / 6 + 100 * 2 / 3)
    assert found.correct["count/0001.jpg#2"] == 0 and sum(found.correct.values()) == 17
    with pytest.raises(UserError, match="18 questions without a prediction"):
        scored(dataset, {})


def test_the_submission_is_what_the_official_conversion_writes(data):
    dataset = load(data)
    files = dataset.submission(answers(dataset) | {"count/0002.jpg#2": "No,\tit\nis not"})
    assert set(files) == {f"mme_results/{task}.txt" for task in TASKS}
    lines = files["mme_results/count.txt"].splitlines()
    assert lines[0] == "0001.txt\tIs there a count thing 1? Please answer yes or no.\tYes\tYes"
    assert lines[3] == "0002.txt\tIs there a count ghost 2?  Please answer yes or no.\tNo\tNo, it is not"


def test_result_files_are_read_back_as_answers(data, tmp_path):
    dataset = load(data)
    texts = answers(dataset, "artwork/images/0003.jpg#1")
    for name, content in dataset.submission(texts).items():
        # The official files of other models name pictures, not text files.
        write_file(tmp_path / name, content.replace(".txt\t", ".jpg\t"))
    out = tmp_path / "score.json"
    assert score.main(["mme", "--answers", str(tmp_path / "mme_results"), "--data", str(data), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["metrics"] == scored(dataset, texts).values
    assert score_folder(tmp_path / "mme_results", partial=True).values == scored(dataset, texts).values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "0001.jpg\tIs there a count thing 1?\tNo\tYes",
            "gives the right answer as 'No', the benchmark's files as 'Yes'",
        ),
        ("0001.jpg\tIs there a count thing 1?\tYes", "should have file, question, answer and prediction"),
        ("0001.jpg\tIs it late?\tYes\tYes", "None of the 1 answers"),
    ],
)
def test_bad_result_files_are_named(data, tmp_path, capsys, line, message):
    write_file(tmp_path / "results" / "count.txt", line + "\n")
    assert score.main(["mme", "--answers", str(tmp_path / "results"), "--data", str(data)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_result_files_is_named(data, tmp_path):
    with pytest.raises(UserError, match=r"has no MME result files; expected existence\.txt"):
        load(data).read(tmp_path)


@pytest.mark.parametrize("profile", ["llava", "lmms"])
def test_the_mirror_is_read_without_official_files(tmp_path, profile):
    rows = []
    for k in range(3):
        for thing, answer, space in ((f"dog {k}", "Yes", ""), ("ghost", "No", " ")):
            row = {"question_id": f"count/{k}.jpg", "question": f"Is there a {thing}?{space}{PLEASE}"}
            rows.append(row | {"answer": answer, "category": "count", "image": cell()})
    write_hub(tmp_path, "lmms-lab-encoder/MME", "test", rows)
    dataset = load(tmp_path, profile)
    assert dataset.facts["source"] == "lmms-lab-encoder/MME"
    assert [q.id for q in dataset.questions[:2]] == ["count/0.jpg#1", "count/0.jpg#2"]
    assert [q.images for q in dataset.questions[:3]] == [("0/image",), ("0/image",), ("2/image",)]
    assert dataset.questions[1].question == ("Is there a ghost? " if profile == "lmms" else "Is there a ghost?")
    dataset.check_images(dataset.questions)
    texts = answers(dataset) | {"count/0.jpg#1": "y"}
    assert scored(dataset, texts).values["perception"] == pytest.approx(
        200 if profile == "lmms" else 100 * 5 / 6 + 100 * 2 / 3
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda folder: (folder / RELEASE).rename(folder / "x"), "No MME release at"),
        (lambda folder: (folder / RELEASE / "count").rename(folder / "x"), "No MME task folder at .*count"),
        (
            lambda folder: (folder / RELEASE / "count/0001.txt").unlink(),
            "asks 'Is there a count thing 1\\?', which 0001",
        ),
        (lambda folder: write_file(folder / RELEASE / "count/0001.txt", "no tab\n"), "a question, a tab and Yes or No"),
        (
            lambda folder: edit_first(folder, question_id="cout/1.jpg"),
            "line 1 'cout/1.jpg'|'cout'. Did you mean 'count'",
        ),
        (lambda folder: edit_first(folder, image="/etc/passwd"), "not inside the image folder"),
    ],
)
def test_bad_files_are_named(data, broken, message):
    broken(data / "MME")
    with pytest.raises(UserError, match=message):
        load(data)


RELEASE = "MME_Benchmark_release_version"


def edit_first(folder: Path, **changes) -> None:
    path = folder / "llava_mme.jsonl"
    first, *rest = path.read_text().splitlines()
    write_file(path, "\n".join([json.dumps({**json.loads(first), **changes}), *rest]) + "\n")


def test_a_folder_of_results_is_scored_without_any_data(tmp_path, capsys):
    expected = json.loads((VECTORS / "expected.json").read_text())
    out = tmp_path / "score.json"
    for extra in ([], ["--data", str(tmp_path)]):
        assert (
            score.main(["mme", "--answers", str(VECTORS / "answer_files"), "--partial", "--json", str(out), *extra])
            == 0
        )
        record = json.loads(out.read_text())
        assert record["metrics"]["perception"] == pytest.approx(expected["perception"]["total"], abs=1e-9)
        assert "scored with the references in the answer file itself" in capsys.readouterr().out
    assert score.main(["mme", "--answers", str(out), "--data", str(tmp_path)]) == 2, "no folder: the data are needed"


def copy_of_vectors(folder: Path) -> Path:
    shutil.copytree(VECTORS / "answer_files", folder / "results")
    return folder / "results"


def alone(folder: Path, *flags: str) -> int:
    return score.main(["mme", "--answers", str(folder), *flags])


def test_a_result_folder_with_a_line_less_needs_partial(tmp_path, capsys):
    """One line less gave 974.23 instead of 963.61 points with exit 0; the official script stops at it."""
    folder = copy_of_vectors(tmp_path)
    path = folder / "existence.txt"
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    assert alone(folder) == 2
    assert "odd number of lines, two belong to each image, in existence (11)" in capsys.readouterr().err
    assert alone(folder, "--partial") == 0
    assert "note: an odd number of lines" in capsys.readouterr().out


def test_a_result_folder_without_a_task_or_with_an_empty_file_needs_partial(tmp_path, capsys):
    folder = copy_of_vectors(tmp_path)
    (folder / "count.txt").unlink()
    write_file(folder / "posters.txt", "")
    assert alone(folder) == 2
    assert "no answers to count, posters" in capsys.readouterr().err
    assert alone(folder, "--partial") == 0


def test_a_result_folder_of_empty_files_is_no_result(tmp_path, capsys):
    """Exit 0 and "n/a" before."""
    folder = copy_of_vectors(tmp_path)
    for path in folder.iterdir():
        path.write_text("")
    assert alone(folder, "--partial") == 2
    assert "every result file is empty" in capsys.readouterr().err


def test_a_result_folder_of_another_size_than_the_release_needs_partial(tmp_path, capsys, monkeypatch):
    """A whole image less, two lines, gave another score with exit 0."""
    folder = copy_of_vectors(tmp_path)
    sizes = {task: len(mme.text_lines(folder / f"{task}.txt")) for task in mme.TASKS}
    monkeypatch.setattr(mme, "TASKS", sizes)
    assert alone(folder) == 0
    path = folder / "existence.txt"
    path.write_text("\n".join(path.read_text().splitlines()[2:]) + "\n")
    assert alone(folder) == 2
    assert "hold 144 answers, MME's release asks 146 questions (existence 10 of 12)" in capsys.readouterr().err
    assert alone(folder, "--partial") == 0
    assert "note: the files hold 144 answers" in capsys.readouterr().out
