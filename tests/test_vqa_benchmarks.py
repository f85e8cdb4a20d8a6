"""VQAv2, TextVQA and VizWiz from tiny files and mirrors, and their metrics against the official scripts."""

import json
from pathlib import Path

import pytest

from eval import score
from eval.answers.reading import read_answers
from eval.benchmarks.llava_files import SHORT, VIZ
from eval.metrics import vqa
from eval.metrics.accuracy import mean_score
from eval.score import score_file
from llava.errors import UserError
from tests.benchmark_files import cell, load, write_hub, write_image, write_json

VECTORS = Path(__file__).parent / "data" / "vqa"
YES = ["yes"] * 10
COKE = ["coke"] * 2 + ["pepsi"] * 8


def with_images(rows: list[dict]) -> list[dict]:
    return [row | {"image": cell("blue")} for row in rows]


def scored(data, texts: dict[str, str]):
    return data.score(list(texts), texts)


# The metrics


def vector(name: str):
    return json.loads((VECTORS / name).read_text())


@pytest.fixture(scope="module")
def annotations() -> list[dict]:
    return vector("annotations.json")["annotations"]


@pytest.fixture(scope="module")
def answers(annotations) -> dict[str, list[str]]:
    return {str(row["question_id"]): [answer["answer"] for answer in row["answers"]] for row in annotations}


@pytest.fixture(scope="module")
def predictions() -> dict[str, str]:
    return {str(row["question_id"]): row["answer"] for row in vector("results.json")}


def test_words_are_those_of_the_toolkit():
    tables = vector("tables.json")
    assert tables["contractions"] == vqa.CONTRACTIONS and len(vqa.CONTRACTIONS) == 120
    assert tables["number_words"] == vqa.NUMBERS
    assert tables["punctuation_in_order"] == list(vqa.PUNCTUATION)
    assert set(tables["articles"]) == vqa.ARTICLES


def test_the_processor_on_every_string_of_the_table():
    table = vector("evalai_processor_table.json")
    assert len(table) == 246
    assert {row["in"]: vqa.process(row["in"]) for row in table} == {row["in"]: row["out"] for row in table}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what's", "what 's"),  # split before the contraction table is asked
        ("x-y - z", "xy z"),  # one dash beside a space deletes all dashes
        ("it costs $5.99.", "it costs $5.99"),
        ("a." * 40, "a" * 32 + "a." * 8),  # at most 32 full stops
    ],
)
def test_oddities_of_the_processor(text, expected):
    assert vqa.process(text) == expected


def test_official_toolkit_overall_per_type_and_per_question(annotations, answers, predictions):
    expected = vector("expected.json")["official_vqa_eval"]
    kinds = {
        kind: {str(row["question_id"]): row[kind] for row in annotations} for kind in ("answer_type", "question_type")
    }
    score = mean_score(answers, predictions, vqa.vqa_eval, kinds)
    assert round(score.values["accuracy"], 2) == expected["overall"] == 59.40
    printed = {
        kind: {group: round(share, 2) for group, (share, _) in table.items()} for kind, table in score.groups.items()
    }
    assert printed == {"answer_type": expected["perAnswerType"], "question_type": expected["perQuestionType"]}
    sample_scores = {name: round(100 * sample_score, 2) for name, sample_score in score.correct.items()}
    assert sample_scores == expected["per_question_percent"] and len(sample_scores) == 200


def test_m4c_overall_and_per_question(answers, predictions):
    expected = vector("expected.json")["m4c_textvqa_evaluator"]
    score = mean_score(answers, predictions, vqa.m4c)
    assert score.values["accuracy"] == pytest.approx(expected["overall_percent"], abs=1e-9)
    assert f"{score.values['accuracy']:.2f}" == "69.90"
    assert score.correct == pytest.approx(expected["per_question"], abs=1e-12) and len(score.correct) == 200


def test_the_rules_differ_where_all_people_agree():
    """The toolkit compares strings there; LLaVA's uploads are safe because the processor ran before."""
    people = ["yes"] * 10
    assert vqa.vqa_eval("Yes", people) == vqa.vqa_eval("yes.", people) == 0
    assert vqa.vqa_eval(" yes\n", people) == 1
    assert vqa.m4c("Yes.", people) == vqa.lmms_vqa("Yes.", people) == vqa.vizwiz("Yes.", people) == 1
    assert vqa.after_processor(vqa.vqa_eval)("Yes.", people) == 1


def test_lmms_takes_no_notice_of_a_possessive():
    """It leaves out the step that splits off 's, which the processor has."""
    people = ["man s"] * 5 + ["mans"] * 5
    assert vqa.lmms_vqa("man's", people) == 0
    assert vqa.process("man's") == "man 's" and vqa.normalise("man's") == "man's"
    # The toolkit keeps commas longer, so all marks of the text are deleted rather than replaced.
    assert vqa.process("1,000-2") == "1000 2" and vqa.normalise("1,000-2") == "10002"


# VQAv2


def vqav2_prompt(name: int, text: str = "Is it red?") -> dict:
    image = f"COCO_test2015_{name // 1000:012d}.jpg"
    return {"question_id": name, "image": image, "text": f"{text}\n{SHORT}", "category": "default"}


@pytest.fixture
def vqav2(tmp_path) -> Path:
    """Test-dev is two of the four test questions; val is the vectors."""
    folder = tmp_path / "vqav2"
    everything = [vqav2_prompt(1000), vqav2_prompt(2000), vqav2_prompt(2001, "How many?"), vqav2_prompt(3000)]
    write_json(folder / "llava_vqav2_mscoco_test2015.jsonl", everything)
    write_json(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", [everything[2], everything[0]])
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", vector("questions.json"))
    write_json(folder / "v2_mscoco_val2014_annotations.json", vector("annotations.json"))
    return tmp_path


def test_vqav2_uploads_the_whole_test_list_in_its_order(vqav2):
    data = load("vqav2", vqav2)
    assert [question.id for question in data.questions] == ["2001", "1000"]
    assert data.questions[0].question == "How many?" and data.questions[0].suffix == SHORT
    (upload,) = data.submission({"1000": "None.", "2001": "What's up"}).items()
    assert upload == (
        "answers_upload.json",
        [
            {"question_id": 1000, "answer": "0"},
            {"question_id": 2000, "answer": ""},
            {"question_id": 2001, "answer": "what 's up"},
            {"question_id": 3000, "answer": ""},
        ],
    )


def test_vqav2_lists_of_two_versions_are_refused(vqav2):
    write_json(vqav2 / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", [vqav2_prompt(1000)])
    with pytest.raises(UserError, match=r"not in .*test2015\.jsonl, such as 2001"):
        load("vqav2", vqav2)


def test_vqav2_val_is_the_official_toolkit_behind_the_answer_processor(vqav2, answers, predictions):
    data = load("vqav2", vqav2, split="val")
    assert data.questions[1].images == ("COCO_val2014_000000000001.jpg",) and data.questions[1].answer == "yes"
    record = score_file(VECTORS / "results.json", data)
    uploaded = {name: vqa.process(text) for name, text in predictions.items()}
    assert record["metrics"] == mean_score(answers, uploaded, vqa.vqa_eval).values
    # More than the raw predictions' 59.40: the toolkit compares strings where all people agree.
    assert record["metrics"]["accuracy"] > 59.41 and record["questions"] == 200
    assert set(record["groups"]) == {"answer type", "question type"}
    assert data.sample_score(data.questions[1], "Yes.") == 1
    assert data.submission({"1000": "Yes."}) == {"predictions.json": [{"question_id": 1000, "answer": "yes"}]}


def test_vqav2_from_the_mirror(tmp_path):
    people = [{"answer": answer, "answer_id": number} for number, answer in enumerate(YES)]
    row = {"question_id": 7, "question": "Is it red?", "answers": people, "answer_type": "yes/no"}
    write_hub(tmp_path, "lmms-lab/VQAv2", "validation", with_images([row]))
    for profile, limit in (("llava", 128), ("lmms", 16)):
        data = load("vqav2", tmp_path, profile, "val")
        data.check_images(data.questions)
        assert data.sample(data.questions[0]).image.getpixel((0, 0)) == (0, 0, 255)
        assert data.questions[0].message == f"Is it red?\n{SHORT}" and data.max_new_tokens == limit
        score = scored(data, {"7": "Yes"})
        assert score.values == {"accuracy": 100} and score.groups == {"answer type": {"yes/no": (100, 1)}}
        assert data.facts["source"] == "lmms-lab/VQAv2" and "published split has 214,354" in data.facts["size"]


# TextVQA

TEXTVQA = (
    {"question_id": 34602, "image_id": "a1", "question": "What brand is it?", "answers": COKE},
    {"question_id": 34603, "image_id": "a1", "question": "is it open?", "answers": YES},
    {"question_id": 34604, "image_id": "b2", "question": "is it open?", "answers": YES},
)
OCR = {"a1": "COKE, 5c", "b2": ""}


def textvqa_prompt(record: dict) -> str:
    return f"{record['question'].capitalize()}\nReference OCR token: {OCR[record['image_id']]}\n{SHORT}"


@pytest.fixture
def textvqa(tmp_path) -> Path:
    folder = tmp_path / "textvqa"
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": list(TEXTVQA)})
    rows = [
        {"question_id": record["image_id"], "image": f"{record['image_id']}.jpg", "text": textvqa_prompt(record)}
        for record in reversed(TEXTVQA)
    ]
    write_json(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    for name in OCR:
        write_image(folder / "train_images" / f"{name}.jpg")
    return tmp_path


def llava_answers(path: Path) -> Path:
    """As model_vqa_loader.py writes them: image ids, which do not say which question it was."""
    texts = ("Coke.", "Yes", "no")
    rows = [
        {"question_id": record["image_id"], "prompt": textvqa_prompt(record), "text": text}
        for record, text in zip(TEXTVQA, texts, strict=True)
    ]
    return write_json(path, rows)


def test_textvqa_ids_prompts_and_images(textvqa):
    data = load("textvqa", textvqa)
    data.check_images(data.questions)
    assert [(q.id, q.official) for q in data.questions] == [("34604", "b2"), ("34603", "a1"), ("34602", "a1")]
    last = data.questions[-1]
    assert last.question == "What brand is it?\nReference OCR token: COKE, 5c" and last.suffix == SHORT
    assert last.message == textvqa_prompt(TEXTVQA[0]) and last.answer == "pepsi"
    assert data.facts["ocr_tokens"] == "on" and data.max_new_tokens == 128
    assert data.sample_score(last, "Coke.") == 0.6 and data.sample_score(data.questions[0], "Yes") == 1


def test_textvqa_answers_are_joined_by_image_and_question(textvqa, tmp_path):
    data = load("textvqa", textvqa)
    path = llava_answers(tmp_path / "answers.jsonl")
    assert read_answers(path, data).texts == {"34602": "Coke.", "34603": "Yes", "34604": "no"}
    record = score_file(path, data)
    assert record["metrics"]["accuracy"] == pytest.approx(100 * (0.6 + 1 + 0) / 3)
    assert record["questions"] == 3
    path.write_text(path.read_text() + '{"question_id": "b2", "pro')
    with pytest.raises(UserError, match="cut off"):
        read_answers(path, data)
    assert read_answers(path, data, partial=True).texts == {"34602": "Coke.", "34603": "Yes", "34604": "no"}


def test_textvqa_of_lmms_has_no_ocr_tokens(textvqa):
    data = load("textvqa", textvqa, profile="lmms")
    assert [question.message for question in data.questions][1] == f"Is it open?\n{SHORT}"
    assert data.facts["ocr_tokens"] == "off" and data.max_new_tokens == 1024
    assert scored(data, {"34603": "Yes."}).values == {"accuracy": 100}


def test_textvqa_from_the_mirror(tmp_path):
    rows = [{**record, "ocr_tokens": OCR[record["image_id"]].split(", ")} for record in TEXTVQA]
    write_hub(tmp_path, "lmms-lab-encoder/textvqa", "validation", with_images(rows))
    data = load("textvqa", tmp_path)
    data.check_images(data.questions)
    assert data.questions[0].message == textvqa_prompt(TEXTVQA[0])
    path = llava_answers(tmp_path / "answers.jsonl")
    assert score_file(path, data)["metrics"]["accuracy"] == pytest.approx(100 * 1.6 / 3)
    assert load("textvqa", tmp_path, profile="lmms").questions[0].message == f"What brand is it?\n{SHORT}"


def test_textvqa_needs_ten_answers(textvqa):
    write_json(textvqa / "textvqa" / "TextVQA_0.5.1_val.json", {"data": [{**r, "answers": YES[:9]} for r in TEXTVQA]})
    with pytest.raises(UserError, match=r"10 answers .* 3 have another number, such as question 34602"):
        load("textvqa", textvqa)


# VizWiz


@pytest.fixture
def vizwiz(tmp_path) -> Path:
    folder = tmp_path / "vizwiz"
    rows = [
        {"question_id": number, "image": f"VizWiz_test_{number:08d}.jpg", "text": f"What is this?\n{VIZ}"}
        for number in range(3)
    ]
    write_json(folder / "llava_test.jsonl", rows)
    records = [
        {"image": "VizWiz_val_00000000.jpg", "question": "What IS this?", "answers": COKE, "answer_type": "other"},
        {"image": "VizWiz_val_00000001.jpg", "question": "Is it on", "answers": YES, "answer_type": "yes/no"},
    ]
    for record in records:
        record["answers"] = [{"answer": answer, "answer_confidence": "yes"} for answer in record["answers"]]
    write_json(folder / "val.json", records)
    return tmp_path


def test_vizwiz_test_is_for_the_server(vizwiz):
    data = load("vizwiz", vizwiz)
    assert data.questions[0].question == "What is this?" and data.questions[0].suffix == VIZ
    upload = data.submission({"2": "Unanswerable", "0": "A can.", "1": "two"})
    assert upload == {
        "answers_upload.json": [
            {"image": "VizWiz_test_00000000.jpg", "answer": "can"},
            {"image": "VizWiz_test_00000001.jpg", "answer": "2"},
            {"image": "VizWiz_test_00000002.jpg", "answer": "unanswerable"},
        ]
    }
    score = scored(data, {"0": "a", "1": "b", "2": "c"})
    assert score.values == {"accuracy": None} and "2185" in score.notes[0] and "refuses" not in score.notes[0]
    assert "answers 1 of 3 questions" in scored(data, {"0": "a"}).notes[0]
    assert len(data.submission({"0": "a"})["answers_upload.json"]) == 1


def test_scoring_writes_the_file_for_the_server(vizwiz, tmp_path, capsys):
    """`vtr score vizwiz` said "upload answers_upload.json" and wrote none."""
    answers = write_json(tmp_path / "answers.jsonl", [{"question_id": n, "text": "A can."} for n in range(3)])
    words = ["vizwiz", "--split", "test", "--answers", str(answers), "--data", str(vizwiz)]
    assert score.main(words) == 0
    assert "note: --submission FOLDER" in capsys.readouterr().out
    assert score.main([*words, "--submission", str(tmp_path / "up")]) == 0
    printed = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'up' / 'answers_upload.json'}." in printed and "--submission" not in printed
    upload = json.loads((tmp_path / "up" / "answers_upload.json").read_text())
    assert upload[2] == {"image": "VizWiz_test_00000002.jpg", "answer": "can"} and len(upload) == 3


def test_vizwiz_val_is_scored_here(vizwiz, tmp_path):
    data = load("vizwiz", vizwiz, split="val")
    assert [q.message for q in data.questions] == [f"What is this?\n{VIZ}", f"Is it on\n{VIZ}"]
    upload = data.submission({"VizWiz_val_00000000": "The coke", "VizWiz_val_00000001": "Yes."})
    record = score_file(write_json(tmp_path / "upload.json", upload["answers_upload.json"]), data)
    assert record["metrics"]["accuracy"] == pytest.approx(100 * (0.6 + 1) / 2)
    assert record["groups"]["answer type"]["yes/no"] == {"percent": 100, "questions": 1}
    assert data.sample_score(data.questions[0], "Coke") == 0.6


def test_vizwiz_from_the_mirror(tmp_path):
    """lmms-eval puts the people's answers through the processor, VizWiz's own rule does not."""
    people = ["The can"] * 10
    rows = [{"question_id": "VizWiz_val_00000000", "question": "what IS this?", "answers": people, "category": "other"}]
    write_hub(tmp_path, "lmms-lab/VizWiz-VQA", "val", with_images(rows))
    for profile, limit, accuracy in (("lmms", 1024, 100), ("llava", 128, 0)):
        data = load("vizwiz", tmp_path, profile, "val")
        data.check_images(data.questions)
        assert data.questions[0].message == f"What is this?\n{VIZ}" and data.max_new_tokens == limit
        score = scored(data, {"VizWiz_val_00000000": "A can."})
        assert score.values == {"accuracy": accuracy}
        assert score.groups == {"answer type": {"other": (accuracy, 1)}}


def test_a_question_file_that_asks_twice_is_refused(vqav2):
    path = vqav2 / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl"
    write_json(path, [vqav2_prompt(1000), vqav2_prompt(1000)])
    with pytest.raises(UserError, match="question ids more than once: 1000"):
        load("vqav2", vqav2)
