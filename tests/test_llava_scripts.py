"""LLaVA's evaluation scripts run as they are: `llava.eval.*` and scripts/convert_*.py, with LLaVA's arguments.

`python -m llava.eval.model_vqa_loader`, which they begin with, was a ModuleNotFoundError.
"""

import base64
import io
import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import openpyxl
import pytest
import torch

from eval import benchmarks, llava_scripts
from eval.answers.jsonl import read_jsonl
from eval.benchmarks import gqa
from eval.config import ROOT, RunConfig
from eval.run import run
from eval.score import score_file
from llava import load
from llava.errors import UserError
from llava.eval import (
    eval_pope,
    eval_science_qa,
    eval_textvqa,
    model_vqa,
    model_vqa_loader,
    model_vqa_mmbench,
    model_vqa_science,
    run_llava,
)
from llava.eval.m4c_evaluator import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextVQAAccuracyEvaluator,
)
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.reduction import registry
from tests.benchmark_files import png, write_lines
from tests.conftest import QUESTIONS, SHORT, drawn_image
from tests.llava_playground import EACH, MODEL, write_playground

DATA = "./playground/data/eval"
CKPT = "llava-v1.5-13b"
GREEDY = ("--temperature", "0", "--conv-mode", "vicuna_v1")
BY_PATH = [
    *(path for path in sorted((ROOT / "llava" / "eval").glob("*.py")) if "__main__" in path.read_text()),
    *sorted((ROOT / "scripts").glob("convert_*.py")),
]


@pytest.fixture
def root(tmp_path, monkeypatch, tiny_path):
    """The folder that the scripts run in. The tiny model speaks at random; all but a few words end its answers."""
    write_playground(tmp_path, tiny_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(Llava, "end_ids", frozenset({*range(200)} - {39, 42, 51, 75, 84, 106, 108}))
    assert llava_scripts.DTYPE == "float16"
    monkeypatch.setattr(llava_scripts, "DTYPE", "float32")  # faster on a processor
    monkeypatch.delenv("VTR_METHOD", raising=False)
    monkeypatch.delenv("VTR_BUDGET", raising=False)
    return tmp_path


def script(name: str, *flags: str) -> None:
    """As `python scripts/NAME FLAGS`."""
    before, sys.argv = sys.argv, [name, *map(str, flags)]
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    finally:
        sys.argv = before
    assert stopped.value.code == 0


def asking(module, questions: str, answers: str, *more: str) -> int:
    """As the scripts start a module; paths are below DATA."""
    files = ("--question-file", f"{DATA}/{questions}", "--answers-file", f"{DATA}/{answers}")
    return module.main(["--model-path", MODEL, *files, *more, *GREEDY])


def texts_of(path: str) -> list[str]:
    return [row["text"] for _, row in read_jsonl(Path(path))]


def gqa_sh() -> tuple[str, float]:
    split = "llava_gqa_testdev_balanced"
    part = f"gqa/answers/{split}/{CKPT}/1_0.jsonl"
    images = ("--image-folder", f"{DATA}/gqa/data/images", "--num-chunks", "1", "--chunk-idx", "0")
    assert asking(model_vqa_loader, f"gqa/{split}.jsonl", part, *images) == 0
    predictions = Path(DATA, "gqa", "data", "testdev_balanced_predictions.json")
    script("convert_gqa_for_eval.py", "--src", f"{DATA}/{part}", "--dst", predictions)
    official = json.loads(predictions.with_name("testdev_balanced_questions.json").read_text())
    said = {row["questionId"]: row["prediction"] for row in json.loads(predictions.read_text())}
    return f"{DATA}/{part}", gqa.evaluate(official, said).values["accuracy"]


def pope_sh(printed) -> tuple[str, float]:
    questions, answers = "pope/llava_pope_test.jsonl", f"pope/answers/{CKPT}.jsonl"
    assert asking(model_vqa_loader, questions, answers, "--image-folder", f"{DATA}/pope/val2014") == 0
    files = ("--question-file", f"{DATA}/{questions}", "--result-file", f"{DATA}/{answers}")
    assert eval_pope.main(["--annotation-dir", f"{DATA}/pope/coco", *files]) == 0
    lines = printed().splitlines()
    assert [line for line in lines if line.startswith("Category")] == [
        f"Category: {name}, # samples: 2" for name in ("random", "popular", "adversarial")
    ]
    found = [float(line.removeprefix("F1 score: ")) for line in lines if line.startswith("F1")]
    return f"{DATA}/{answers}", 100 * sum(found) / 3


def textvqa_sh(printed) -> tuple[str, float]:
    answers = f"textvqa/answers/{CKPT}.jsonl"
    images = ("--image-folder", f"{DATA}/textvqa/train_images")
    assert asking(model_vqa_loader, "textvqa/llava_textvqa_val_v051_ocr.jsonl", answers, *images) == 0
    labels = f"{DATA}/textvqa/TextVQA_0.5.1_val.json"
    assert eval_textvqa.main(["--annotation-file", labels, "--result-file", f"{DATA}/{answers}"]) == 0
    name, samples, accuracy, _ = printed().split("\n", 3)
    assert (name, samples) == (CKPT, f"Samples: {EACH}")
    return f"{DATA}/{answers}", float(accuracy.removeprefix("Accuracy: ").removesuffix("%"))


def sqa_sh(printed) -> tuple[str, float]:
    base, answers = f"{DATA}/scienceqa", f"scienceqa/answers/{CKPT}"
    images = ("--image-folder", f"{base}/images/test", "--single-pred-prompt")
    assert asking(model_vqa_science, "scienceqa/llava_test_CQM-A.json", f"{answers}.jsonl", *images) == 0
    files = ("--result-file", f"{DATA}/{answers}.jsonl", "--output-file", f"{DATA}/{answers}_output.jsonl")
    result = f"{DATA}/{answers}_result.json"
    assert eval_science_qa.main(["--base-dir", base, *files, "--output-result", result]) == 0
    line, number = printed().strip(), json.loads(Path(result).read_text())
    right = len(json.loads(Path(f"{DATA}/{answers}_output.jsonl").read_text())["correct"])
    assert line.startswith(f"Total: {EACH}, Correct: {right}, Accuracy: {number['acc']:.2f}%, IMG-Accuracy: ")
    return f"{DATA}/{answers}.jsonl", float(line.split("IMG-Accuracy: ")[1].removesuffix("%"))


def mmbench_sh() -> tuple[str, float]:
    split = "mmbench_dev_20230712"
    answers = f"mmbench/answers/{split}"
    assert asking(model_vqa_mmbench, f"mmbench/{split}.tsv", f"{answers}/{CKPT}.jsonl", "--single-pred-prompt") == 0
    upload, table = Path(DATA, "mmbench", "answers_upload", split), f"{DATA}/mmbench/{split}.tsv"
    folders = ("--result-dir", f"{DATA}/{answers}", "--upload-dir", upload, "--experiment", CKPT)
    script("convert_mmbench_for_submission.py", "--annotation-file", table, *folders)
    data = benchmarks.get("mmbench").load(Path(DATA), "dev")
    texts = dict(zip((one.id for one in data.questions), texts_of(f"{DATA}/{answers}/{CKPT}.jsonl"), strict=True))
    (book,) = data.submission(texts).values()
    ours, wanted = (cells(file) for file in (upload / f"{CKPT}.xlsx", io.BytesIO(book)))
    assert ours == wanted and len(ours) == EACH + 1
    return f"{DATA}/{answers}/{CKPT}.jsonl", data.score(list(texts), texts).values["accuracy"]


def cells(file) -> list[tuple]:
    return list(openpyxl.load_workbook(file).active.values)


@pytest.mark.parametrize("budget", [None, 6])
def test_whole_scripts_give_the_answers_and_numbers_of_our_own_commands(root, monkeypatch, capsys, budget):
    """What gqa.sh, pope.sh, textvqa.sh, sqa.sh and mmbench.sh start, in their order and with their arguments."""
    if budget:
        monkeypatch.setenv("VTR_METHOD", "consensusdrop")
        monkeypatch.setenv("VTR_BUDGET", str(budget))
    said = []

    def printed() -> str:
        shown = capsys.readouterr()
        said.append(shown.err)
        return shown.out

    found, spoken = {"gqa": gqa_sh()}, set()
    if budget:
        found |= {"pope": pope_sh(printed), "textvqa": textvqa_sh(printed), "scienceqa": sqa_sh(printed)}
        found["mmbench"] = mmbench_sh()
    printed()
    for name, (answers, number) in found.items():
        method = "consensusdrop" if budget else "full"
        own = {"data": Path(DATA), "output": root / name, "wandb": "disabled", "dtype": "float32"}
        result = run(RunConfig(method, budget, name, model=MODEL, **own), timed=False)
        ids = [question.id for question in benchmarks.get(name).load(Path(DATA), result["settings"]["split"]).questions]
        ours = {row["question_id"]: row["text"] for _, row in read_jsonl(root / name / "answers.jsonl")}
        assert texts_of(answers) == [ours[one] for one in ids]
        spoken |= set(ours.values())
        assert result["metrics"][result["main"]] == pytest.approx(number, abs=0.005)
        data = benchmarks.get(name).load(Path(DATA), result["settings"]["split"])
        assert score_file(Path(answers), data)["metrics"] == result["metrics"]
        first = next(row for _, row in read_jsonl(Path(answers)))
        assert first["model_id"] == CKPT and isinstance(first["answer_id"], str) and "metadata" in first
    assert len(spoken) > 1
    for told in ("VTR_BUDGET=6 in the environment: method consensusdrop", "consensusdrop at 6: 6.0 "):
        assert "".join(said).count(told) == (5 if budget else 0)


def pope(*more: str) -> int:
    images = ("--image-folder", f"{DATA}/pope/val2014")
    return asking(model_vqa_loader, "pope/llava_pope_test.jsonl", "a/answers.jsonl", *images, *more)


def test_an_unknown_method_ends_in_the_usual_sentence_and_leaves_no_old_answers(root, monkeypatch, capsys):
    """LLaVA's scripts go on after an error: the next step scored what an earlier run had left."""
    old = write_lines(Path(DATA, "a", "answers.jsonl"), [{"question_id": 1, "text": "Yes"}])
    monkeypatch.setenv("VTR_METHOD", "visiondrip")
    assert pope() == 2 and not old.exists()
    assert "Did you mean 'visiondrop'" in capsys.readouterr().err
    for name, value, sentence in (
        ("VTR_METHOD", "", "A budget of x needs a method"),
        ("VTR_METHOD", "visiondrop", "got 'x'"),
    ):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv("VTR_BUDGET", "x")
        assert pope() == 2 and sentence in capsys.readouterr().err


def test_what_benchmarks_are_not_asked_with_is_refused(root, capsys):
    for flags, sentence in (
        (("--temperature", "0.2"), "add --temperature 0"),
        (("--num_beams", "3"), "answered greedily"),
        (("--model-base", "vicuna"), "--model-base is not supported"),
        (("--num-chunks", "2", "--chunk-idx", "2"), "--chunk-idx should be 0 to 1"),
        (("--conv-mode", "vicuna_v9"), "Did you mean 'vicuna_v1'"),
        (("--conv-mode", "qwen2_vl"), "is no template of tiny-llava"),
        (("--method", "consensusdrop", "--budget", "64", "--set", "alhpa=1"), "alhpa"),
        (("--max-tokens", "3"), "nrecognized arguments"),
    ):
        files = ("--question-file", f"{DATA}/pope/llava_pope_test.jsonl", "--answers-file", "a.jsonl")
        usual = ("--model-path", MODEL, "--image-folder", f"{DATA}/pope/val2014", *files, *GREEDY)
        assert model_vqa_loader.main([*usual, *flags]) == 2
        assert sentence in capsys.readouterr().err


def test_a_failing_question_ends_the_run_with_whole_lines_of_those_before_it(root, capsys, monkeypatch):
    """LLaVA's own buffer can end in the middle of a line."""
    monkeypatch.setattr(RunConfig, "batch_size", 2)
    questions = [row for _, row in read_jsonl(Path(DATA, "pope", "llava_pope_test.jsonl"))]
    for row in questions[:3]:
        (root / row["image"]).unlink(missing_ok=True)
        (root / row["image"]).symlink_to(Path(DATA, "pope", "val2014", row["image"]).resolve())
    Path(root, "broken.png").write_bytes(b"no image")
    write_lines(root / "q.jsonl", [*questions[:3], questions[3] | {"image": "broken.png"}])
    files = ("--image-folder", str(root), "--question-file", "q.jsonl", "--answers-file", "a.jsonl")
    assert model_vqa.main(["--model-path", MODEL, *files, *GREEDY]) == 2
    assert f"Question {questions[3]['question_id']} failed: " in capsys.readouterr().err
    assert [row["question_id"] for _, row in read_jsonl(root / "a.jsonl")] == [q["question_id"] for q in questions[:3]]


@pytest.mark.parametrize(("count", "parts"), [(5, 4), (6, 3), (2, 8), (0, 1)])
def test_parts_are_cut_as_llava_cuts_them(count, parts):
    """LLaVA takes ceil(count / parts) questions for each; of five questions in four parts the last one is empty."""
    found = [llava_scripts.chunk(list(range(count)), parts, number) for number in range(parts)]
    size = -(-count // parts)
    assert [one for part in found for one in part] == list(range(count))
    assert [len(part) for part in found] == [min(size, max(0, count - size * number)) for number in range(parts)]


def test_every_round_of_mmbench_moves_the_options(tmp_path):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "image"]
    image = base64.b64encode(png(size=9)).decode()
    rows = ["7", "Which?", "Look.", "red", "None", "blue", "x", "A", image], ["8", "What?", "", *"pqr", "", "B", image]
    path = tmp_path / "t.tsv"
    path.write_text("\n".join("\t".join(row) for row in (columns, *rows)))
    read = partial(model_vqa_mmbench.questions, SimpleNamespace(question_file=str(path), lang="cn"))
    args = read.args[0]
    args.single_pred_prompt, args.all_rounds = True, True
    found = [(one.fields["round_id"], one.fields["options"], one.fields["option_char"]) for one in read()[0][1:]]
    assert found == [(0, [*"pqr"], [*"ABC"]), (1, [*"qrp"], [*"BCA"]), (2, [*"rpq"], [*"CAB"])]
    first, *_, last = llava_scripts.told_apart(read()[0])
    # An option "None" is empty, and the ones behind it are not shown; letters stay where they are.
    assert first.fields["prompt"] == "Look.\nWhich?\nA. red" and first.question.suffix == "请直接回答选项字母。"
    assert last.fields["prompt"] == "What?\nA. r\nB. p\nC. q" and (last.question.id, last.fields["question_id"]) == (
        "8/2",
        8,
    )


def test_conversions_write_the_files_of_our_own_runs(root, capsys):
    """With LLaVA's arguments; each file was compared with the one of LLaVA's script, byte by byte."""
    for name in ("vizwiz", "vqav2", "mm-vet", "seed_bench"):
        Path(DATA, name).symlink_to(ROOT / "assets" / "eval" / name)
    wanted = {}
    for name, split, file in (
        ("vizwiz", "test", "vizwiz/llava_test.jsonl"),
        ("vqav2", "testdev", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"),
        ("mmvet", "test", "mm-vet/llava-mm-vet.jsonl"),
        ("seed", "test", "seed_bench/llava-seed-bench.jsonl"),
    ):
        data = benchmarks.get(name).load(Path(DATA), split)
        rows = [row for _, row in read_jsonl(Path(DATA, file))]
        said = dict(zip((one.id for one in data.questions), ("None", "A", "The two dogs.", "B") * 99, strict=False))
        write_lines(root / f"{name}.jsonl", [r | {"text": t} for r, t in zip(rows, said.values(), strict=True)])
        ((_, content),) = data.submission(said).items()
        wanted[name] = content if isinstance(content, str) else json.loads(json.dumps(content))
    out = root / "new" / "folder"
    script("convert_mmvet_for_eval.py", "--src", root / "mmvet.jsonl", "--dst", out / "mmvet.json")
    files = ("--result-file", root / "vizwiz.jsonl", "--result-upload-file", out / "vizwiz.json")
    script("convert_vizwiz_for_submission.py", "--annotation-file", f"{DATA}/vizwiz/llava_test.jsonl", *files)
    split, folder = "llava_vqav2_mscoco_test-dev2015", root / "vqav2"
    write_lines(folder / "answers" / split / CKPT / "merge.jsonl", [row for _, row in read_jsonl(root / "vqav2.jsonl")])
    (folder / "llava_vqav2_mscoco_test2015.jsonl").symlink_to(
        ROOT / "assets/eval/vqav2/llava_vqav2_mscoco_test2015.jsonl"
    )
    script("convert_vqav2_for_submission.py", "--dir", folder, "--split", split, "--ckpt", CKPT)
    capsys.readouterr()
    files = ("--result-file", root / "seed.jsonl", "--result-upload-file", out / "seed.jsonl")
    script("convert_seed_for_submission.py", "--annotation-file", f"{DATA}/seed_bench/SEED-Bench.json", *files)
    printed = capsys.readouterr().out
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in ("vizwiz", "mmvet")}
    found |= {"vqav2": json.loads((folder / "answers_upload" / split / f"{CKPT}.json").read_text())}
    assert found == {name: wanted[name] for name in found} and (out / "seed.jsonl").read_text() == wanted["seed"]
    score = score_file(root / "seed.jsonl", benchmarks.get("seed").load(Path(DATA), "test"))["metrics"]
    assert [line.rpartition(": ")[2] for line in printed.splitlines()[-3:]] == [
        f"{score[name]:.2f}%" for name in ("accuracy", "image_accuracy", "video_accuracy")
    ]
    assert printed.startswith("Scene Understanding: ")


def test_run_llava_answers_as_our_own_generate(tiny_path, tmp_path, capsys, monkeypatch):
    """Called as LLaVA's README calls it, with an object that has none of our flags."""
    monkeypatch.setattr(
        run_llava, "load_pretrained_model", partial(run_llava.load_pretrained_model, torch_dtype="float32")
    )
    drawn_image(0).save(tmp_path / "a.png")
    names = {"model_path": str(tiny_path), "model_base": None, "model_name": "x", "conv_mode": "vicuna_v1", "sep": ","}
    names |= {"query": QUESTIONS[0], "image_file": str(tmp_path / "a.png"), "temperature": 0, "top_p": None}
    args = type("Args", (), names | {"num_beams": 1, "max_new_tokens": 6})()
    monkeypatch.setenv("VTR_METHOD", "consensusdrop")
    monkeypatch.setenv("VTR_BUDGET", "6")
    run_llava.eval_model(args)
    shown = capsys.readouterr()
    model = load(tiny_path, device="cpu")
    reducer = registry.build("consensusdrop", 6, {})
    sample = Sample("q", QUESTIONS[0], "", drawn_image(0))
    assert shown.out == f"{generate(model, [sample], reducer, max_new_tokens=6).answers[0].text}\n"
    assert "method consensusdrop, budget 6" in shown.err
    args.temperature, args.query = 5.0, f"<image-placeholder>\n{QUESTIONS[0]}"
    for _ in range(3):
        run_llava.eval_model(args)
    torch.manual_seed(0)
    assert len({*capsys.readouterr().out.splitlines()}) > 1, "sampling draws"
    args.image_file = f"{tmp_path}/a.png,{tmp_path}/a.png"
    with pytest.raises(UserError, match="all images but 1"):
        run_llava.eval_model(args)


def test_names_of_the_m4c_evaluator():
    people = ["red"] * 2 + ["The Red"] + ["blue"] * 7
    entries = [{"pred_answer": "a red", "gt_answers": people}, {"pred_answer": "Blue.", "gt_answers": people}]
    assert EvalAIAnswerProcessor()("The two dogs.") == "2 dogs"
    assert TextVQAAccuracyEvaluator().eval_pred_list(entries) == pytest.approx((0.9 + 1) / 2)
    assert STVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": "x", "gt_answers": ["y"]}, *entries]) == 2 / 3
    assert STVQAANLSEvaluator().eval_pred_list([{"pred_answer": "abcd", "gt_answers": ["ABCE", "zz"]}]) == 0.75
    with pytest.raises(UserError, match="needs 10 answers"):
        TextVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": "x", "gt_answers": ["x"]}])


def test_questions_are_found_in_every_wording_of_textvqa():
    for prompt in (
        f"What is it?\nReference OCR token: a, b\n{SHORT}",
        f"Reference OCR token: a\nWhat is it?\n{SHORT}",
        f"What is it?\n{SHORT}",
        "OCR tokens: a. Question: What is it? Short answer:",
    ):
        assert eval_textvqa.prompt_processor(prompt) == "what is it?"
    with pytest.raises(UserError, match="on a line of its own"):
        eval_textvqa.prompt_processor("What is it?")


def test_numbers_of_answers_are_those_of_our_scorer(tmp_path, capsys):
    """LLaVA's own scripts print the same numbers for such files."""
    data, said = ROOT / "assets" / "eval", ("Yes", "No, not. Yes", "NO", "A", "B. cat", "The answer is C.", "red", "")
    found = {}
    for name, file in (
        ("pope", "pope/llava_pope_test.jsonl"),
        ("textvqa", "textvqa/llava_textvqa_val_v051_ocr.jsonl"),
        ("scienceqa", "scienceqa/llava_test_CQM-A.json"),
    ):
        dataset = benchmarks.get(name).load(data, benchmarks.get(name).splits[0])
        rows = []
        for number, one in enumerate(dataset.questions):
            text = one.answer if number % 3 == 0 else said[number % len(said)]
            prompt = "<image>\n" * (name == "scienceqa" and bool(one.images)) + one.message
            official = int(one.id) if name == "pope" else one.official or one.id
            rows.append({"question_id": official, "prompt": prompt, "text": text})
        found[name] = score_file(write_lines(tmp_path / f"{name}.jsonl", rows), dataset)["metrics"]
        assert 0 < found[name]["accuracy"] < 100, file
    results = ("--result-file", str(tmp_path / "pope.jsonl"), "--annotation-dir", str(data / "pope" / "coco"))
    assert eval_pope.main(["--question-file", str(data / "pope" / "llava_pope_test.jsonl"), *results]) == 0
    values = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("F1")]
    assert found["pope"]["f1"] == pytest.approx(100 * sum(map(float, values)) / 3)
    results = ("--result-dir", str(tmp_path / "textvqa"), "--annotation-file")
    (tmp_path / "textvqa").mkdir()
    (tmp_path / "textvqa.jsonl").rename(tmp_path / "textvqa" / "b.jsonl")
    (tmp_path / "textvqa" / "a.txt").touch()
    assert eval_textvqa.main([*results, str(data / "textvqa" / "TextVQA_0.5.1_val.json")]) == 0
    accuracy = f"{found['textvqa']['accuracy']:.2f}%"
    assert capsys.readouterr().out == f"Skipping a.txt\nb\nSamples: 251\nAccuracy: {accuracy}\n\n"
    files = [f"--{name}={tmp_path / name}" for name in ("output-file", "output-result")]
    answers = ("--result-file", str(tmp_path / "scienceqa.jsonl"))
    assert eval_science_qa.main(["--base-dir", str(data / "scienceqa"), *answers, *files]) == 0
    both = (f"{found['scienceqa'][name]:.2f}%" for name in ("accuracy", "img_accuracy"))
    assert capsys.readouterr().out.endswith(", Accuracy: {}, IMG-Accuracy: {}\n".format(*both))


def test_an_answer_that_is_missing_is_no_number(root, capsys):
    """LLaVA's eval_pope.py goes by place, so that a file without a line gave the numbers of other questions."""
    questions = Path(DATA, "pope", "llava_pope_test.jsonl")
    rows = [{"question_id": row["question_id"], "text": "Yes"} for _, row in read_jsonl(questions)]
    rows[0]["text"] = "No"
    labels = ("--annotation-dir", f"{DATA}/pope/coco", "--question-file", str(questions), "--result-file")
    printed = []
    for name, lines, code in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows[1:], 2)):
        assert eval_pope.main([*labels, str(write_lines(root / name, lines))]) == code
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out and "1 question without" in printed[2].err


@pytest.mark.process
def test_files_started_by_their_path_import_this_checkout(tmp_path):
    """`python llava/eval/eval_pope.py` has the folder of the file in its path, not that of the packages."""
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("raise ImportError('another package')\n")
    for path in (ROOT / "llava" / "eval" / "eval_pope.py", ROOT / "scripts" / "convert_gqa_for_eval.py"):
        done = subprocess.run(
            [sys.executable, str(path), "--help"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    lines = {"convert": "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"}
    lines["llava"] = "    sys.path[0] = str(Path(__file__).resolve().parents[2])\n"
    for path in BY_PATH:
        before = path.read_text().partition("from eval.")[0]
        assert lines["convert" if path.parent.name == "scripts" else "llava"] in before, path
    assert len(BY_PATH) == 14
