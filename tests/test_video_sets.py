"""The video sets: official aggregation of verdicts, layouts, quirks, and ActivityNet-QA's mirror."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import video
from eval.results.statistics import interval
from llava.errors import UserError
from tests.benchmark_files import judged, load, write_hub, write_json

VECTORS = Path(__file__).parent / "data"
VIDEO_SETS = {
    "msvd_qa": ("MSVD_Zero_Shot_QA", "videos"),
    "msrvtt_qa": ("MSRVTT_Zero_Shot_QA", "videos/all"),
    "tgif_qa": ("TGIF_Zero_Shot_QA", "mp4"),
    "activitynet_qa": ("Activitynet_Zero_Shot_QA", "all_test"),
}


def write_videos(data: Path, name="msvd_qa", rows=None) -> Path:
    folder, videos = VIDEO_SETS[name]
    root = data / "GPT_Zero_Shot_QA" / folder
    rows = rows or [(f"v_{i}", "clip", f"q{i}?", "x") for i in range(14)]
    asked = [{"video_name": video, "question": text, "question_id": qid} for qid, video, text, _ in rows]
    write_json(root / "test_q.json", asked)
    answers = [{"answer": answer, "question_id": qid, "type": 3 + i % 2} for i, (qid, _, _, answer) in enumerate(rows)]
    write_json(root / "test_a.json", answers)
    (root / videos).mkdir(parents=True, exist_ok=True)
    return root / videos


def test_video_aggregation_equals_the_official_script(tmp_path):
    write_videos(tmp_path)
    data = load("msvd_qa", tmp_path)
    texts = {f"v_{i}": "y" for i in range(14)}
    expected = json.loads((VECTORS / "video_judge" / "expected.json").read_text())["official_stdout"]
    found = judged(data, VECTORS / "video_judge" / "judgements.json", texts)
    assert f"Accuracy: {found.values['accuracy'] / 100}" == expected[2]
    assert f"Average score: {found.values['score']}" == expected[3]
    assert found.terms.sums.sum(0).tolist() == [5, 9] and found.main == "accuracy" and found.points == {"score"}
    assert interval(found.terms).mean == pytest.approx(found.values["accuracy"])


def test_video_judgements_are_read_from_a_folder_too(tmp_path):
    write_videos(tmp_path)
    folder = tmp_path / "gpt3.5"
    for name, entry in json.loads((VECTORS / "video_judge" / "judgements.json").read_text()).items():
        write_json(folder / f"{name}.json", entry)
    texts = {f"v_{i}": "y" for i in range(14)}
    assert judged(load("msvd_qa", tmp_path), folder, texts).values["score"] == pytest.approx(32 / 14)
    with pytest.raises(UserError, match="1 of 14 questions"):
        judged(load("msvd_qa", tmp_path), folder, texts | {"v_3": "z"})


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        ({"pred": "yes", "score": 4.8}, (4, True)),  # cut, not rounded
        ({"pred": "yes", "score": "4.8"}, (0, None)),  # int("4.8") raises before the verdict is read
        ({"pred": "yes", "score": "4"}, (4, True)),
        ({"pred": "no, but yes partly", "score": 3}, (3, True)),  # "yes" is looked for first
        ({"pred": "unknown", "score": 1}, (1, False)),  # "no" inside a word
        ({"pred": None, "score": 2}, (2, None)),
        ({"score": 5}, (5, None)),
        ({"pred": "no"}, (0, None)),
        (["yes", 5], (0, None)),
        ("text", (0, None)),
        ({"pred": "yes", "score": float("inf")}, (0, None)),
    ],
)
def test_video_quirks(judgement, expected):
    assert video.points_and_verdict(judgement) == expected


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("{'pred': 'yes', 'score': 4}", {"pred": "yes", "score": 4}),
        (' {"pred": "no", "score": 0}\n', {"pred": "no", "score": 0}),
        ("Here: {'pred': 'yes'}", None),
        ("{'pred': yes}", None),
        ("{1, 2}", None),
        ("__import__('os').getcwd()", None),
        ("(" * 5000, None),
    ],
)
def test_video_replies_are_literals_and_nothing_else(reply, found):
    assert video.parse_literal(reply) == found


def test_the_video_judge_is_asked_in_the_official_words(tmp_path):
    write_videos(tmp_path, rows=[("a", "clip", "what {answer}?", "{pred}")])
    judging = load("msvd_qa", tmp_path).judging
    (request,) = judging.requests(["a"], {"a": "{question}"})
    assert [message["role"] for message in request.messages] == ["system", "user"]
    filled = "Question: what {answer}?\nCorrect Answer: {pred}\nPredicted Answer: {question}\n\n"
    assert filled in request.messages[1]["content"]
    assert request.messages[1]["content"].endswith("{'pred': 'yes', 'score': 4.8}.")
    assert request.temperature is None and request.max_tokens is None


@pytest.mark.parametrize("name", VIDEO_SETS)
def test_video_layouts(tmp_path, name):
    videos = write_videos(tmp_path, name, [("q1", "clip", "what", "dog"), ("q2", "clip", "who", "man")])
    prefix = "v_" if name == "activitynet_qa" else ""
    (videos / f"{prefix}clip.avi").touch()
    data = load(name, tmp_path)
    data.check_images(data.questions)
    first = data.questions[0]
    assert (first.id, first.message, first.images) == ("q1", "what", (f"{prefix}clip.avi",))
    (line, _) = data.submission({"q1": " a dog\n", "q2": "men"})["merge.jsonl"].splitlines()
    assert json.loads(line) == {"id": "q1", "question": "what", "answer": "dog", "pred": "a dog"}
    found = data.score(["q1", "q2"], {"q1": "A dog.", "q2": "women"})
    assert found.main == "accuracy_match"
    assert (found.values["accuracy_match"], found.values["score_match"]) == (50, 2.5)
    assert any("the question file holds 2 questions" in note for note in found.notes)
    moved = tmp_path / "elsewhere" / "eval"
    moved.mkdir(parents=True)
    (tmp_path / "GPT_Zero_Shot_QA").rename(moved / "GPT_Zero_Shot_QA")
    assert load(name, moved.parent).questions == data.questions
    with pytest.raises(UserError, match="GPT_Zero_Shot_QA/"):
        load(name, tmp_path)


def test_answers_are_joined_by_id_and_repeated_ids_in_order(tmp_path):
    write_videos(tmp_path, rows=[("a", "c", "1", "x"), ("b", "c", "2", "y"), ("b", "c", "3", "z")])
    path = tmp_path / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA" / "test_a.json"
    write_json(path, json.loads(path.read_text())[1:] + json.loads(path.read_text())[:1])
    data = load("msvd_qa", tmp_path)
    assert [(q.id, q.official, q.answer) for q in data.questions] == [
        ("a", "a", "x"),
        ("b#1", "b", "y"),
        ("b#2", "b", "z"),
    ]
    write_json(path, json.loads(path.read_text())[:2])
    with pytest.raises(UserError, match="question a,"):
        load("msvd_qa", tmp_path)


def test_activitynet_from_its_mirror(tmp_path):
    folder = tmp_path / "hub" / "lmms-eval" / "ActivityNetQA"
    (folder / "all_test").mkdir(parents=True)
    (folder / "all_test" / "v_abc.mkv").touch()
    row = {"video_name": "v_abc", "question": "is IT red", "answer": "yes", "type": "3", "question_id": "v_abc_1"}
    write_hub(tmp_path, "lmms-eval/ActivityNetQA", "test", [row], "Generation")
    data = load("activitynet_qa", tmp_path, profile="lmms")
    data.check_images(data.questions)
    assert data.questions[0].message == "Is it red? Answer the question using a single word or phrase."
    assert data.max_new_tokens == 64 and data.facts["source"] == str(folder)
    # The judge sees the question as the data set words it.
    assert "Question: is IT red\n" in data.judging.requests(["v_abc_1"], {"v_abc_1": "x"})[0].messages[1]["content"]
    assert load("activitynet_qa", tmp_path).questions[0].message == "is IT red"
    with pytest.raises(UserError, match="MSVD-QA has no mirror"):
        load("msvd_qa", tmp_path, source="mirror")
