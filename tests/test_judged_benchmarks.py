"""MM-Vet and LLaVA-Bench: official numbers, formats and quirks, on small files in their layouts."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import score
from eval.answers.store import answer_id, settings_hash
from eval.benchmarks import llava_bench, mmvet
from eval.judging.choice import line as verdict_line
from eval.results.report import percent_of_full
from eval.statistics import command
from llava.errors import UserError
from tests.benchmark_files import cell, judged, load, write_hub, write_json, write_lines

VECTORS = Path(__file__).parent / "data"


# -- LLaVA-Bench ---------------------------------------------------------------------------------------------------


def test_reviews_are_read_as_llava_reads_them():
    rows = json.loads((VECTORS / "llavabench" / "parse_score_table.json").read_text())
    assert len(rows) == 14
    assert [list(llava_bench.parse_review(row["review"])) for row in rows] == [row["tuple"] for row in rows]


def test_means_are_rounded_before_the_ratio():
    pairs = {"a": (8.0, 7.0), "b": (8.0, 6.0), "c": (9.0, 7.0)}
    found = llava_bench.evaluate(dict.fromkeys(pairs, "conv"), pairs, dict.fromkeys(pairs, "i"))
    assert found.values == {"relative_score": 80.0, "reference_points": 83.3, "model_points": 66.7}
    pairs |= {"d": llava_bench.UNREADABLE}
    found = llava_bench.evaluate(dict.fromkeys(pairs, "conv"), pairs, dict.fromkeys(pairs, "i"))
    assert found.values["relative_score"] == round(round(19 / 4, 3) / round(24 / 4, 3) * 100, 1) == 79.2
    assert "1 reviews could not be read" in found.notes[0] and found.correct == {}
    assert float(found.terms.value(found.terms.sums.sum(0))) == pytest.approx(79.1667, abs=1e-4)
    # A mean of 0.0014 is 0.001 by then: a tenth of 0.01, where the unrounded means have 14 %.
    assert llava_bench.official_ratio(np.array([0.01, 0.0014, 1.0])) == 10.0
    assert llava_bench.ratio(np.zeros((2, 3))).tolist() == [0, 0] and llava_bench.official_ratio(np.zeros(3)) == 0


def write_bench(data: Path) -> Path:
    folder = data / "llava-bench-in-the-wild"
    (folder / "images").mkdir(parents=True)
    asked = [("0", "conv"), ("1", "detail"), ("2", "complex")]
    write_lines(
        folder / "questions.jsonl",
        [{"question_id": int(n), "image": "001.jpg", "text": f"q{n}", "category": kind} for n, kind in asked],
    )
    write_lines(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": ["one", "two"]}])
    rows = [{"question_id": n, "text": f"red cat {n}", "answer_id": "x"} for n in (2, 0, 1)]
    write_lines(folder / "answers_gpt4.jsonl", rows)
    return folder


def test_llava_bench_is_asked_and_judged_in_the_official_words(tmp_path):
    folder = write_bench(tmp_path)
    data = load("llava_bench", tmp_path)
    assert [question.message for question in data.questions] == ["q0", "q1", "q2"] and data.max_new_tokens == 1024
    texts = {"0": "a", "1": "b", "2": "c"}
    system, user = data.judging.requests(["2"], texts)[0].messages
    assert system["content"].startswith("You are a helpful and precise assistant")
    # The reference is joined by id; by position it would be that of question 1.
    assert user["content"].startswith(
        "[Context]\none\ntwo\n\n[Question]\nq2\n\n[Assistant 1]\nred cat 2\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nc\n\n[End of Assistant 2]\n\n[System]\nWe would like to request your feedback"
    )
    reviews = [{"question_id": int(n), "category": "x", "content": "8 6", "tuple": [8, 6]} for n in texts]
    found = judged(data, write_lines(tmp_path / "reviews.jsonl", reviews), texts)
    assert found.values["relative_score"] == 75.0 and found.groups["category"]["conv"] == (75.0, 1)
    assert data.judging.parse("0", "8, 6\nno") == {"tuple": [-1, -1]} and data.judging.tries == 1
    write_lines(folder / "answers_gpt4.jsonl", [{"question_id": 0, "text": "x"}])
    with pytest.raises(UserError, match="no answer to question 1"):
        load("llava_bench", tmp_path)


def test_llava_bench_from_its_mirror(tmp_path):
    row = {"image": cell(), "question": "q", "caption": "c", "gpt_answer": "g", "category": "conv"}
    write_hub(tmp_path, "lmms-lab/llava-bench-in-the-wild", "train", [row])
    data = load("llava_bench", tmp_path)
    data.check_images(data.questions)
    assert (data.questions[0].id, data.questions[0].answer) == ("0", "g")
    (request,) = data.judging.requests(["0"], {"0": "t"})
    assert request.messages[1]["content"] == llava_bench.message(llava_bench.Entry("i", "q", "conv", "c", "g"), "t")


# -- MM-Vet --------------------------------------------------------------------------------------------------------

NEEDED = {"v1_0": ["ocr", "math"], "v1_1": ["math", "ocr"], "v1_2": ["rec"]}


def test_mmvet_runs_capabilities_and_combinations():
    scores = {"v1_0": [1.0, 0.0], "v1_1": [0.5, 0.5], "v1_2": [0.0, 0.3, 1.0]}
    found = mmvet.evaluate(NEEDED, scores)
    assert found.values["score"] == pytest.approx(100 * (0.5 + 0.5 + 0.15) / 3)
    totals = np.array([1.5 / 3, 0.8 / 3]) * 100
    assert found.values["score"] == pytest.approx(totals.mean()) and found.values["std"] == pytest.approx(totals.std())
    assert found.groups["capability"] == {"math": (50.0, 2), "ocr": (50.0, 2), "rec": (pytest.approx(15.0), 1)}
    assert found.groups["combination"] == {"ocr_math": (50.0, 2), "rec": (pytest.approx(15.0), 1)}
    assert found.values["score"] == pytest.approx(100 * sum(found.correct.values()) / 3)
    assert "std" not in mmvet.evaluate(NEEDED, {name: [1.0] for name in NEEDED}).values


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("0.5", 0.5), ("1.0 |", 1.0), ("0", 0.0), ("0.7\n", 0.7), ("1.5", None), ("-0.1", None), ("nan", None)],
)
def test_mmvet_replies(reply, expected):
    assert mmvet.parse_score(reply) == expected and mmvet.parse_score(f" {reply}") is None


@pytest.mark.parametrize(
    ("answer", "text", "sample_score"),
    [
        ("-1<AND>-5", "x = 1 or x = -5", 0.5),
        ("yellow<OR>golden brown", "It is golden brown.", 1),
        ("a<AND>b<OR>c", "c", 1),
        ("cat", "catalogue", 0),
        ("1,000", "about 1000 people", 1),
    ],
)
def test_mmvet_word_match(answer, text, sample_score):
    assert mmvet.match(text, answer) == sample_score


def write_mmvet(data: Path, folder="mm-vet", with_prompts=True) -> Path:
    root = data / folder
    (root / "images").mkdir(parents=True)
    records = {
        name: {"imagename": f"{name}.png", "question": f"q {name}?", "answer": "a<OR>b", "capability": needed}
        for name, needed in NEEDED.items()
    }
    write_json(root / "mm-vet.json", records)
    if with_prompts:
        rows = [{"question_id": i, "image": f"v1_{i}.png", "text": f"q v1_{i}?", "category": "x"} for i in (2, 0, 1)]
        write_lines(root / "llava-mm-vet.jsonl", rows)
    return root


def test_mmvet_layouts_and_profiles(tmp_path):
    write_mmvet(tmp_path / "one")
    data = load("mmvet", tmp_path / "one")
    assert [(q.id, q.official) for q in data.questions] == [("v1_2", "2"), ("v1_0", "0"), ("v1_1", "1")]
    assert data.submission({"v1_2": "t"}) == {"mmvet_results.json": {"v1_2": "t"}}
    assert data.facts["size"] == "3 questions, the published set has 218"
    write_mmvet(tmp_path / "two", "mmvet", with_prompts=False)
    lmms = load("mmvet", tmp_path / "two", profile="lmms")
    assert lmms.questions[0].message == mmvet.STEP_BY_STEP + "q v1_0?" and lmms.questions[0].images == ("v1_0.png",)
    assert lmms.judging.requests(["v1_0"], {"v1_0": "t"}) == data.judging.requests(["v1_0"], {"v1_0": "t"})
    with pytest.raises(UserError, match="MM-Vet"):
        load("mmvet", tmp_path / "three")


def judged_run(folder: Path, data: Path, method: str, judge: str, score: float) -> str:
    """A finished run whose answers `judge` gave `score`; its result was written before."""
    found = load("mmvet", data)
    settings = {"benchmark": "mmvet", "split": "test", "questions": found.questions_digest, "method": method}
    settings["config"] = {"budget": 4}
    texts = {question.id: f"text {method}" for question in found.questions}
    hashed = settings_hash(settings)
    rows = [{"question_id": name, "text": texts[name], "answer_id": answer_id(hashed, name)} for name in texts]
    write_lines(folder / "answers.jsonl", rows)
    requests = found.judging.requests(list(texts), texts)
    lines = [verdict_line(one, {"score": [score]}, str(score), judge, 1, False) for one in requests]
    write_lines(folder / f"judgements-{judge}.jsonl", lines)
    facts = {**found.facts, "judge": {"name": judge, "verdicts": str(folder / f"judgements-{judge}.jsonl")}}
    result = {"method": method, "budget": 4, "asked": 3, "limit": None, "main": "score", "failed": [], "facts": facts}
    result |= {"settings": settings, "labels": found.fingerprint, "metrics": {"score": 100 * score}}
    write_json(folder / "result.json", result | {"accounting": {"mean_tokens_per_layer": 4.0}})
    return str(folder)


def test_verdicts_of_one_judge_are_compared_and_those_of_two_are_not(tmp_path, capsys):
    """`vtr compare` printed a difference that was one of judges, and the path of verdicts counted as a difference."""
    write_mmvet(tmp_path / "data")
    full = judged_run(tmp_path / "full", tmp_path / "data", "full", "gpt-4-0613", 0.8)
    other = judged_run(tmp_path / "other", tmp_path / "data", "first", "gpt-3.5-turbo", 0.4)
    same = judged_run(tmp_path / "same", tmp_path / "data", "first", "gpt-4-0613", 0.4)
    where = ["--data", str(tmp_path / "data")]
    assert score.compare_command([full, other, *where]) == 2
    assert "gpt-4-0613 and B by gpt-3.5-turbo" in capsys.readouterr().err
    assert command.main([full, other, *where]) == 2
    assert "facts.judge: gpt-4-0613 and gpt-3.5-turbo" in capsys.readouterr().err
    assert score.compare_command([full, same, *where]) == 0
    assert percent_of_full(json.loads((tmp_path / "same" / "result.json").read_text()), Path(same)) == 50
    capsys.readouterr()
    assert command.main([full, same, *where, "--share", "0.1"]) == 0
    assert "| first | 4 | 40.0 [n/a] | 50.0" in capsys.readouterr().out
    (tmp_path / "same" / "judgements-gpt-4-0613.jsonl").unlink()
    assert command.main([full, same, *where]) == 2, "its verdicts are gone"


def test_mmvets_judge_is_asked_again_with_a_hint_and_more_heat(tmp_path):
    write_mmvet(tmp_path)
    judging = load("mmvet", tmp_path).judging
    (first,) = judging.requests(["v1_0"], {"v1_0": "the text"})
    assert first.messages[0]["content"].endswith("| 1.0\n\nq v1_0? | a <OR> b | the text | ")
    assert (first.temperature, first.max_tokens, judging.tries, judging.failed) == (0.0, 3, 5, {"score": [0.0]})
    later = [judging.again(first, failures) for failures in (1, 2, 3, 4)]
    assert [request.temperature for request in later] == [0, 0.5, 1.0, 1.5]
    hint = "\nPredict the correctness of the answer (digit): "
    assert later[0].messages[0]["content"] == first.messages[0]["content"] + hint


def test_mmvet_grades_of_the_official_script(tmp_path):
    write_mmvet(tmp_path)
    data = load("mmvet", tmp_path)
    grades = {n: {"model": ["gpt-4-0613"] * 2, "content": ["1", "0.5"], "score": [1.0, 0.5]} for n in NEEDED}
    found = judged(data, write_json(tmp_path / "grade.json", grades), dict.fromkeys(NEEDED, "t"))
    assert found.values == {"score": 75.0, "std": 25.0}
    assert any(note.startswith("judged by gpt-4-0613,") for note in found.notes)
    for wrong in ({"v1_0": {"score": []}}, ["x"], {"v1_0": {"score": ["1"]}}):
        with pytest.raises(UserError, match=r"grade\.json"):
            judged(data, write_json(tmp_path / "grade.json", wrong), dict.fromkeys(NEEDED, "t"))


def test_mmvet_from_its_mirror(tmp_path):
    row = {"question_id": "v1_0", "image": cell(), "question": "q", "answer": "a", "capability": "rec,ocr"}
    write_hub(tmp_path, "lmms-lab-encoder/MMVet", "test", [row])
    data = load("mmvet", tmp_path)
    data.check_images(data.questions)
    assert data.questions[0].id == "v1_0"
    assert data.score(["v1_0"], {"v1_0": "a"}).groups["combination"] == {"rec_ocr": (100.0, 1)}
