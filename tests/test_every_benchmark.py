"""What holds for every registered benchmark on its embedded data, and full marks for right answers in every format."""

import io
import json
import subprocess
from functools import cache

import numpy as np
import openpyxl
import pytest

from eval import benchmarks
from eval.answers.jsonl import write_file
from eval.benchmarks.base import Dataset, no_submission
from eval.benchmarks.media import Videos
from eval.config import ROOT
from eval.results.report import confidence
from eval.results.statistics import summed_by_cluster, terms_of
from eval.score import score_file
from eval.tables import benchmarks as pages
from llava.errors import UserError

CASES = [
    (name, split, profile)
    for name in benchmarks.names()
    for split in benchmarks.get(name).splits
    for profile in benchmarks.get(name).profiles
]
NAMES = [benchmark.name for benchmark in pages.reported()]
FULL_MARKS = {"perception": 2000}
OPEN_ENDED = {"cider"}  # no largest value


@cache
def load(name: str, split: str, profile: str) -> Dataset:
    root = ROOT / "assets" / ("eval_video" if name == "video_qa" else "eval")
    return benchmarks.get(name).load(root, split, profile, "auto")


def right(data: Dataset) -> dict[str, str]:
    """Every reference as its answer; "red" where only a server knows it."""
    return {question.id: question.answer or "red" for question in data.questions}


def judged(data: Dataset) -> str:
    return "match" if data.judging is not None else "auto"


IN_JAVA = ("flickr30k", "nocaps")  # METEOR and the official tokenizer


@pytest.fixture(
    params=[pytest.param(case, marks=pytest.mark.java) if case[0] in IN_JAVA else case for case in CASES],
    ids="-".join,
)
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


def test_a_file_that_lacks_answers_or_has_foreign_ones_is_refused(case, tmp_path):
    data, texts = case
    rows = [{"question_id": name, "text": text} for name, text in texts.items()]
    path = tmp_path / "answers.jsonl"
    write_file(path, lines_of(rows[1:]))
    with pytest.raises(UserError, match="1 question without a prediction"):
        score_file(path, data, judge=judged(data))
    write_file(path, lines_of([*rows, {"question_id": "nobody's", "text": "red"}]))
    with pytest.raises(UserError, match="1 prediction for questions that are not in the question file"):
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
    found = confidence(score, data.questions)[score.main]
    drawn = spread_of_drawn(terms_of(score, {question.id: question.image for question in data.questions}))
    if found["low"] is None:
        images = len({question.image for question in data.questions})
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


def test_questions_and_pictures_are_there(case):
    data, _ = case
    assert len({question.id for question in data.questions}) == len(data.questions)
    data.check_images(data.questions)
    shown = next((question for question in data.questions if question.images), None)
    assert shown is not None and data.max_new_tokens >= 10
    if not isinstance(data.pictures, Videos):
        assert data.pictures.open(shown.images[0]).mode == "RGB"


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


# The script and the section in docs/evaluation.md of each.


@pytest.mark.parametrize("name", NAMES)
def test_script_asks_its_own_benchmark_and_explains_itself(name):
    script = ROOT / "scripts" / "eval" / f"{name}.sh"
    assert f'/../benchmark.sh" {name} "$@"' in script.read_text()
    shown = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and f"bash scripts/eval/{name}.sh METHOD [BUDGET]" in shown.stderr


def test_there_is_no_script_without_a_benchmark():
    scripts = {path.stem for path in (ROOT / "scripts" / "eval").glob("*.sh")}
    assert scripts == set(NAMES)


def test_pages_are_up_to_date():
    assert pages.data_sections() in pages.PAGE.read_text(), "run `vtr tables benchmarks pages`"


@pytest.mark.parametrize("name", benchmarks.names())
def test_benchmark_is_described(name):
    found = benchmarks.get(name)
    assert found.name == name and found.summary.endswith(".") and found.licence
    assert found.needs or found.mirror, "nobody could get the data"
    assert set(found.split_files) <= set(found.splits)
    assert (ROOT / "assets" / found.model / "config.json").is_file()
    assert bool(found.published) == bool(found.published_by)
