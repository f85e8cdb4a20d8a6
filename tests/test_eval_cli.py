"""The command lines `python -m eval` and `python -m eval.score`, and the reader of GQA's files."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tqdm import tqdm

from eval import __main__ as cli
from eval import cli as vtr
from eval import run as job_module
from eval import score
from eval.benchmarks.llava_files import LETTER, SHORT, VIZ, split_suffix
from eval.command import STOPS, Terminated, exit_on_user_error
from eval.config import RunConfig, options_by_method, pairs
from eval.results import cost, report
from eval.run import Interrupted, run
from eval.versions import commit
from llava.budget import budget_text, count_or_ratio
from llava.errors import UserError
from llava.model.builder import parse
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import registry
from tests.benchmark_files import edit_line, load
from tests.eval_fakes import FakeLlava, FakeReducer, fake_text, write_gqa
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers, save_qwen_transformers

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ROOT / "tests" / "data" / "gqa"
STOPPED = "\nStopped; run the same command again.\n"


@pytest.fixture
def data(tmp_path) -> Path:
    return write_gqa(tmp_path / "data")


@pytest.fixture
def main(tmp_path, data, monkeypatch, capsys):
    """`main(...)` -> (exit code, stdout, stderr), with the fake model and the small GQA unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job_module, "load_model", lambda config: FakeLlava())

    def call(*arguments: str) -> tuple[int, str, str]:
        standard = [] if "--data" in arguments else ["--data", str(data)]
        code = cli.main([*arguments, *standard, "--wandb", "disabled"])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


# -- a run ---------------------------------------------------------------------------------------------------------


def test_the_last_line_is_the_result_in_words(main, tmp_path):
    code, out, _ = main("--method", "uniform", "--budget", "16")
    assert code == 0
    assert out.splitlines()[-1] == (
        "uniform at 16 of 64 visual tokens: 50.0 % accuracy (95 % CI n/a: 5 images, an interval needs 20) on 40 "
        "GQA testdev questions; "
        "16.0 tokens per layer, KV 0.016 MB, TTFT n/a."
    )
    folder = tmp_path / "results" / "gqa-testdev" / "fake" / "uniform-16"
    result = json.loads((folder / "result.json").read_text())
    assert result["sentence"] == out.splitlines()[-1]
    assert result["metrics"]["accuracy"] == 50 and not result["partial"]
    assert result["confidence"]["accuracy"]["low"] is None and result["timing"]["ttft"] is None
    assert result["accounting"]["entering_per_layer"] == [16, 16, 16]
    assert result["accounting"]["kv_bytes_per_sample"] == 16000
    per_question = {"preprocess": 3, "vision": 1, "selection": 0.5, "prefill": 2, "decode": 4}
    per_batch = {name: 8 * value for name, value in per_question.items()}
    assert result["timing"]["ms_per_question"] == pytest.approx(per_question)
    assert result["timing"]["batch"]["median_ms"] == pytest.approx(per_batch)
    assert result["timing"]["kv_bytes_padded"] == 17600 and result["flops_per_question"] == 10**9
    assert result["conditions"]["batch_size"] == 8 and result["conditions"]["threads"] >= 1
    assert result["settings"]["config"]["budget"] == 16
    assert {"python", "torch"} <= result["versions"].keys()


def test_time_to_first_token_needs_ten_batches(main, tmp_path):
    """Five batches are too few (above); of ten the sentence says how many there were."""
    _, out, _ = main("--method", "uniform", "--budget", "16", "--batch-size", "4", "--output", "o")
    assert out.splitlines()[-1].endswith("KV 0.016 MB, TTFT 14 ms for a batch of 4 (median of 10 batches).")
    found = json.loads((tmp_path / "o" / "result.json").read_text())["timing"]["ttft"]
    assert found == {"median_ms": pytest.approx(14), "questions": 4, "batches": 10}


def test_answers_are_in_llavas_fields(main, data, tmp_path):
    main("--method", "uniform", "--budget", "16", "--output", "o")
    lines = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    first = dict(lines[0])
    image = data / "gqa" / "data" / "images" / "n0.jpg"
    assert len(first.pop("answer_id")) == 22 and len({line["answer_id"] for line in lines}) == 40
    assert first == {
        "question_id": "1000",
        "prompt": f"Is thing 0 there?\n{SHORT}",
        "text": fake_text("1000"),
        "model_id": "fake",
        "metadata": {
            "accounting": {
                "entering": [16, 16, 16],
                "mean": 16,
                "paid": 16,
                "planned": 16,
                "asked": 16,
                "visual_tokens": 64,
                "merged": 0,
                "kv_bytes": 16000,
                "on_padding": None,
            },
            "images": hashlib.sha256(image.read_bytes()).hexdigest()[:16],
        },
    }
    predictions = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert predictions[0] == {"questionId": "1000", "prediction": fake_text("1000").lower().rstrip(".")}


def test_questions_without_an_image_neither_water_the_accounting_down_nor_hide_a_deviation():
    seen = record(20.0, entering=[20, 20], merged=0, kv_bytes=10)
    unseen = record(0.0, asked=0.0, planned=0.0, visual_tokens=0, entering=[0, 0], merged=0, kv_bytes=2)
    summary = cost.summarise_accounting([seen, unseen, unseen])
    assert summary["mean_tokens_per_layer"] == 20 and summary["samples"] == 3 and summary["without_image"] == 2
    off = cost.off_budget([seen, unseen, unseen, unseen], Mine(rounding=1.5))
    assert (off["counted"], off["asked"], off["questions"]) == (20, 16, 1)
    assert cost.off_budget([seen, unseen], Mine(rounding=4)) is None
    assert cost.off_budget([unseen], Mine()) is None
    assert cost.summarise_accounting([unseen])["mean_tokens_per_layer"] == 0


def test_tokens_on_padding_are_a_mean_over_images_or_not_known(main):
    """They are told of no run a part of whose answers was stored before they were counted."""
    costs = {"entering": [20, 20], "merged": 0, "kv_bytes": 10}
    unseen = record(0.0, visual_tokens=0, **costs | {"entering": [0, 0]}, on_padding=0.0)
    new, old = [record(20.0, **costs, on_padding=tokens) for tokens in (4.5, 1.5)], record(20.0, **costs)
    assert cost.summarise_accounting([*new, unseen])["mean_tokens_on_padding"] == 3
    for others in ([old], [record(20.0, **costs, on_padding=None)]):
        assert cost.summarise_accounting([*new, unseen, *others])["mean_tokens_on_padding"] is None
    code, printed, _ = main("--method", "uniform", "--budget", "16", "--output", "o")
    result = json.loads(Path("o/result.json").read_text())
    assert not code and "padding" not in printed and result["accounting"].pop("mean_tokens_on_padding") is None
    known = report.cost_lines(result | {"accounting": result["accounting"] | {"mean_tokens_on_padding": 2.25}})
    assert "0.0 of them merged, 2.2 on padding" in known[0] and "padding" not in report.cost_lines(result)[0]


def record(mean: float, asked: float = 16.0, planned: float | None = None, visual_tokens: int = 64, **more) -> dict:
    """An accounting."""
    return {"mean": mean, "asked": asked, "planned": planned, "visual_tokens": visual_tokens, **more}


class Mine:
    """What a method says of its counting."""

    def __init__(self, rounding: float = 0.5, otherwise: str = ""):
        self.rounding, self.otherwise = rounding, otherwise

    def deviates(self, kind: str) -> str:
        return self.otherwise


@pytest.mark.parametrize(
    ("records", "otherwise", "asked"),
    [
        ([record(24.0), record(8.0)], "", None),  # more of one image, less of another: the mean is the budget
        ([record(30.0), record(30.5)], "", 16),  # there was no plan to compare it with
        ([record(30.0, planned=30.0)] * 2, "", 16),  # nor did a plan excuse it that is no budget
        ([record(30.0, planned=30.0)] * 2, "as papers do", None),
        ([record(33.0, planned=30.0)] * 2, "as papers do", 30),
        ([record(16.0), record(9.0, asked=9.0, visual_tokens=9)], "", None),  # an image of fewer tokens than the budget
    ],
)
def test_the_mean_over_the_questions_is_compared_with_the_budget(records, otherwise, asked):
    """A method whose images decide how many tokens stay printed "64 ... 121.2 tokens per layer" without a word."""
    off = cost.off_budget(records, Mine(otherwise=otherwise))
    assert (off and off["asked"]) == asked


def test_options_and_other_precision_get_folders_of_their_own(main, tmp_path):
    for extra in ([], ["--set", "uniform.positions=original"], ["--set", "uniform.positions=renumber"]):
        assert main("--method", "uniform", "--budget", "16", *extra)[0] == 0
    assert main("--method", "uniform", "--budget", "16", "--dtype", "bfloat16")[0] == 0
    names = sorted(path.name for path in (tmp_path / "results" / "gqa-testdev" / "fake").iterdir())
    # The default, spelled out, is the default: its run was continued, not repeated.
    assert len(names) == 3 and names[0] == "uniform-16" and all(name.startswith("uniform-16-") for name in names[1:])


def test_seed_reaches_methods_that_draw(main, tmp_path):
    assert main("--method", "random", "--budget", "16", "--seed", "7", "--output", "o")[0] == 0
    settings = json.loads((tmp_path / "o" / "settings.json").read_text())
    assert settings["config"]["seed"] == 7
    assert (
        main("--method", "random", "--budget", "16", "--seed", "7", "--set", "random.seed=3", "--output", "p")[0] == 0
    )
    assert json.loads((tmp_path / "p" / "settings.json").read_text())["config"]["seed"] == 3


def test_full_needs_no_budget(monkeypatch, main):
    class Whole(FakeLlava):
        def answer(self, samples, reducer, max_new_tokens=128):
            return super().answer(samples, FakeReducer(self.visual_tokens), max_new_tokens)

    monkeypatch.setattr(job_module, "load_model", lambda config: Whole())
    code, out, _ = main("--method", "full")
    assert code == 0 and out.splitlines()[-1].startswith("full at 64 of 64 visual tokens: ")
    assert main("--method", "full", "--budget", "64")[0] == 0
    code, _, err = main("--method", "full", "--budget", "32")
    assert code == 2 and "full keeps all 64 visual tokens" in err


# -- what is wrong ends in one sentence and exit code 2 --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "uniform"], "Method uniform needs --budget"),
        (["--budget", "16"], "--method is missing"),
        (["--method", "unifrom", "--budget", "16"], "Unknown method 'unifrom'. Did you mean 'uniform'?"),
        (["--method", "uniform", "--budget", "0"], "--budget should be a whole number of visual tokens"),
        (["--method", "uniform", "--budget", "65"], "--budget should be 1 to 64 (this model's visual tokens), got 65."),
        (["--method", "uniform", "--budget", "8", "--batch-size", "0"], "--batch-size should be"),
        (["--method", "uniform", "--budget", "8", "--seed", "-1"], "--seed should be a whole number, 0 to 4294967295"),
        (["--method", "uniform", "--budget", "8", "--split", "tset"], "Unknown split of gqa 'tset'."),
        (["--method", "uniform", "--budget", "8", "--split", "val"], "No GQA val questions at"),
        (["--method", "uniform", "--budget", "8", "--set", "random.seed=1"], "is for method 'random'"),
        (["--method", "uniform", "--budget", "8", "--set", "uniform.alpah=1"], "Unknown option of uniform 'alpah'."),
        (["--method", "uniform", "--budget", "8", "--set", "seed"], "--set should look like"),
        (["--method", "random", "--budget", "8", "--set", "random.seed=x"], "random.seed must be"),
        (["--method", "uniform", "--budget", "8", "--frobnicate"], "Unrecognized arguments: --frobnicate; see --help."),
        (["--method", "uniform", "--budget", "8", "--wandb", "maybe"], "Argument --wandb: invalid choice"),
        (["--method", "uniform", "--budget", "8", "--json"], "--json goes with --dry-run"),
        (["--method", "full", "--restart", "--retry-failed"], "--restart asks every question anew"),
        # These ended in tracebacks.
        (["--method", "uniform", "--budget", "8", "--output", "a\0b"], "--output should be a path of at most"),
        (["--method", "uniform", "--budget", "8", "--output", "é" * 128], "names have at most 255 bytes each, got 'éé"),
        (["--method", "uniform", "--budget", "8", "--model", "x" * 256], "--model should be a path"),
        (["--method", "uniform", "--budget", "1.5"], "got '1.5'"),
        (["--method", "full", "--budget", "0.5"], "the ratio 0.5"),
        (["--method", "uniform", "--set", "retention_ratio=x"], "uniform.retention_ratio must be a number, got 'x'."),
        (["--method", "uniform", "--budget", "8", "--data", "/nowhere"], "--data should be the folder that holds gqa/"),
    ],
)
def test_wrong_flags(main, tmp_path, arguments, sentence):
    code, out, err = main(*arguments)
    assert code == 2 and out == ""
    assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("planned", [True, False])
def test_a_mean_off_the_budget_is_said_and_loses_nothing(data, tmp_path, capsys, planned):
    """It ended the run without a result after all questions were answered, be it for one image in sixty; and without
    a plan, where images decide how many tokens stay, nothing was said."""
    config = RunConfig("first", 16, data=data, output=tmp_path / "o", wandb="disabled", limit=30)
    result = run(config, FakeLlava(mean_error=1, planned=planned), FakeReducer())
    assert (result["off_budget"]["counted"], result["off_budget"]["asked"]) == (17, 16)
    assert result["off_budget"]["questions"] == 30 and result["accounting"]["asked_tokens_per_layer"] == 16
    found = json.loads((tmp_path / "o" / "limit30" / "result.json").read_text())
    assert found["off_budget"] == result["off_budget"]
    printed = capsys.readouterr()
    last = printed.out.splitlines()[-1]
    said = "17.0 tokens per layer where 16.0 were asked for (mean over 30 questions)"
    assert (said if planned else "tokens per layer: mean 17.0 of 16 asked, 17 to 17, KV") in last
    assert f"note: {result['off_budget']['remark']}" in printed.out
    # Said at once, as the last batch may be hours away; the mean of a few images says nothing where they decide.
    assert ("Warning, first batch: 17.00 visual tokens" in printed.err) == planned


def test_a_count_of_its_own_is_said_and_is_no_mistake(data, tmp_path, capsys):
    """The budget of a paper's own counting is another number than the mean; the sentence showed both as if equal."""

    class Otherwise(FakeReducer):
        def deviates(self, kind: str) -> str:
            return "layers before the drop are not counted" if kind == "uncounted" else ""

    class Counting(FakeLlava):
        def answer(self, samples, reducer, max_new_tokens=128):
            batch = super().answer(samples, reducer, max_new_tokens)
            answers = [replace(one, accounting=replace(one.accounting, planned=20.0)) for one in batch.answers]
            return replace(batch, answers=tuple(answers))

    config = RunConfig("first", 16, data=data, output=tmp_path / "o", wandb="disabled")
    result = run(config, Counting(mean_error=4), Otherwise())
    assert result["off_budget"] is None and not result["remarks"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "20.0 tokens per layer where 16.0 were asked for (layers before the drop are not counted), KV" in last


def test_a_count_and_a_ratio_are_two_budgets():
    """1 and 1.0 are equal, so "1,1.0" ran one token alone."""
    found = cli.sizes("1,1.0,1/9,64,64")
    assert [repr(one) for one in found] == ["1", "1.0", repr(1 / 9), "64"]


def test_a_ratio_is_said_as_a_ratio(main, tmp_path):
    """For a model whose images differ the sentence named the ratio of the largest image as its budget."""
    code, out, _ = main("--method", "uniform", "--budget", "1/4", "--output", "o")
    assert code == 0 and out.splitlines()[-1].startswith("uniform at 0.25 of each image's visual tokens: ")
    assert budget_text(1820, 1 / 9) == "1/9" and budget_text(64, 0.35) == "0.35" and budget_text(64) == "64"


def test_a_documented_rounding_is_accepted(data, tmp_path):
    class Rough(FakeReducer):
        rounding = 1.0

    config = RunConfig("first", 16, data=data, output=tmp_path / "o", wandb="disabled")
    assert run(config, FakeLlava(mean_error=1), Rough())["accounting"]["mean_tokens_per_layer"] == 17


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_ctrl_c_leaves_the_sentence_of_the_first(number, code, capsys):
    """It came while W&B and the store were closed, 20 ms after the first, and a traceback took the sentence's place."""
    before = [signal.getsignal(one) for one in STOPS]

    @exit_on_user_error
    def main() -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except KeyboardInterrupt as stop:
            for again in STOPS:
                os.kill(os.getpid(), again)
            time.sleep(0.01)
            raise Interrupted("Stopped. 3 of 4 answers are kept.") from stop

    assert main() == code and [signal.getsignal(one) for one in STOPS] == before
    assert capsys.readouterr().err == "\nStopped. 3 of 4 answers are kept.\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_within_a_destructor_is_not_lost(number, code, capsys):
    """Python drops what is raised there: the command went on, deaf to every further signal, with a traceback."""

    class Stopped:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    @exit_on_user_error
    def main() -> int:
        Stopped()
        time.sleep(10)
        return 0

    before = sys.unraisablehook
    assert main() == code and sys.unraisablehook == before
    assert capsys.readouterr().err == STOPPED


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_ctrl_c_without_words_of_its_own_is_a_sentence(stop, code, capsys):
    """Two empty lines were printed: an exception without a text is not false."""

    @exit_on_user_error
    def main() -> int:
        raise stop

    assert main() == code
    assert capsys.readouterr().err == STOPPED


def test_ctrl_c_while_a_command_is_imported_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("eval.cli.import_module", lambda name: os.kill(os.getpid(), signal.SIGINT))
    assert vtr.main(["tables", "paper"]) == 130 and capsys.readouterr().err == "\nStopped.\n"


def test_ctrl_c_says_how_to_go_on(main, monkeypatch, tmp_path):
    def stop(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(job_module, "load_model", lambda config: FakeLlava(stop))
    code, _, err = main("--method", "uniform", "--budget", "16", "--output", "o")
    assert code == 130
    assert err.endswith("Stopped. 16 of 40 answers are kept in o; run the same command again to go on.\n")
    monkeypatch.setattr(job_module, "load_model", lambda config: FakeLlava())
    assert main("--method", "uniform", "--budget", "16", "--output", "o")[0] == 0


def test_options_are_read_with_and_without_the_method_in_front():
    """`--set METHOD.KEY=VALUE` in eval and `--set KEY=VALUE` in latency: each refused the other's form."""
    read = options_by_method(["m"], ["a=0.5", "m.b=1", "m.c=x=y", "m.d="])
    assert read == {"m": {"a": "0.5", "b": "1", "c": "x=y", "d": ""}}
    for twice in (["a=1", "m.a=2"], ["m.a=1", "m.a=2"]):
        with pytest.raises(UserError, match=r"m\.a is given twice"):
            options_by_method(["m"], twice)
    found = options_by_method(["m", "n"], ["a=0.5", "n.b=1"])
    assert found == {"m": {"a": "0.5"}, "n": {"a": "0.5", "b": "1"}}
    for wrong in ("a", "=1", "m.=1", ".a=1"):
        with pytest.raises(UserError, match=r"should look like m\.key=value or key=value"):
            options_by_method(["m", "n"], [wrong])
    with pytest.raises(UserError, match="is for method 'k', but this run is of 'm, n'"):
        options_by_method(["m", "n"], ["k.a=1"])


@pytest.mark.parametrize("device", ["foo", "", "meta", "mps", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_ends_in_a_sentence(data, tmp_path, capsys, device):
    """`--device foo`, `meta`, `mps` and an empty name ended in tracebacks, some after the weights were read."""
    arguments = ["--method", "full", "--data", str(data), "--output", str(tmp_path / "o"), "--device", device]
    assert cli.main([*arguments, "--model", "/nowhere", "--wandb", "disabled"]) == 2
    err = capsys.readouterr().err
    assert re.match(r"The device should be|Device '.*' was asked for", err) and repr(device) in err
    assert err.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_model_for_images_is_not_asked_about_videos(main, monkeypatch, tiny):
    """`msvd_qa.sh --model` with an image-only model ended in "'Video' object has no attribute 'size'"."""
    model = FakeLlava()
    model.takes_videos = False
    monkeypatch.setattr(job_module, "load_model", lambda config: model)
    data = str(ROOT / "assets" / "eval")
    code, out, err = main("--method", "uniform", "--budget", "8", "--benchmark", "msvd_qa", "--data", data)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "asks about videos, and fake takes images only; choose a Video-LLaVA" in err
    frames = Video((Image.new("RGB", (32, 32)),) * 8)
    with pytest.raises(UserError, match="tiny-llava takes images only, got a video"):
        generate(tiny, [Sample("q", "what", image=frames)], registry.build("full", tiny.visual_tokens))


def test_help_and_scoring_need_no_torch(tmp_path, data):
    """Loading torch takes seconds; a typing mistake should not."""
    code = (
        "import sys\nfrom eval.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "import eval.score\n"
        f"eval.score.main(['gqa', '--answers', 'missing', '--data', {str(data)!r}])\n"
        "assert not {'torch', 'transformers', 'wandb'} & sys.modules.keys(), 'a heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(default: None)" not in done.stdout and "Cannot read missing" in done.stderr


# -- scoring without a model -----------------------------------------------------------------------------------------


@pytest.fixture
def vectors(tmp_path) -> Path:
    """The test vectors as an official GQA folder."""
    folder = tmp_path / "vectors" / "gqa" / "data"
    folder.mkdir(parents=True)
    everything = json.loads((VECTORS / "synthetic_all_questions.json").read_text())
    balanced = {name: question for name, question in everything.items() if question["isBalanced"]}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(balanced))
    (folder / "testdev_all_questions.json").write_text(json.dumps(everything))
    shutil.copy(VECTORS / "synthetic_choices.json", folder / "testdev_choices.json")
    return tmp_path / "vectors"


@pytest.mark.parametrize("name", ["synthetic_answers.jsonl", "synthetic_predictions_expected.json"])
def test_scoring_prints_the_official_numbers(vectors, tmp_path, capsys, name):
    out = tmp_path / "score.json"
    assert score.main(["gqa", "--answers", str(VECTORS / name), "--data", str(vectors), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    for line in ("73.57 %", "76.25 %", "70.00 %", "80.95 %", "87.14 %", "77.86 %", "0.02 (lower is better)"):
        assert line in printed
    record = json.loads(out.read_text())
    assert record["questions"] == 140 and f"{record['metrics']['accuracy']:.2f}" == "73.57"
    assert record["groups"]["words number"]["4"] == {"percent": 90.0, "questions": 20}


def test_a_quiet_run_prints_warnings_and_the_result_alone(main, monkeypatch):
    """Bars, single numbers and costs filled the logs of clusters."""
    code, plain, err = main("--method", "uniform", "--budget", "8")
    sentence = plain.splitlines()[-1]
    assert code == 0 and "accuracy" in plain and "question/s" in err and "key/value cache" in plain
    model = FakeLlava()
    model.notes = ("something is not as usual",)
    monkeypatch.setattr(job_module, "load_model", lambda config: next(iter(tqdm([model]))))  # a library's bar
    code, quiet, err = main("--method", "uniform", "--budget", "8", "--quiet")
    assert code == 0 and quiet == f"note: something is not as usual\n{sentence}\n" and err == ""
    assert tqdm(range(1)).disable is False


# -- GQA's files -----------------------------------------------------------------------------------------------------


def jsonl(data: Path) -> Path:
    return data / "gqa" / "llava_gqa_testdev_balanced.jsonl"


def test_questions_come_in_the_order_of_llavas_file_with_the_suffix_apart(data):
    lines = jsonl(data).read_text().splitlines()
    jsonl(data).write_text("\n".join(reversed(lines)) + "\n")
    dataset = load("gqa", data)
    first = dataset.questions[0]
    assert [q.id for q in dataset.questions] == [str(1039 - n) for n in range(40)]
    assert (first.question, first.suffix, first.image) == ("Is thing 39 there?", SHORT, "n4.jpg")
    sample = dataset.sample(first)
    assert sample.image.size == (32, 32) and sample.image_ids == (dataset.images.digest("n4.jpg"),)
    assert sample.message == json.loads(lines[39])["text"]


def test_without_llavas_file_the_official_one_is_asked(data):
    expected = load("gqa", data).questions
    jsonl(data).unlink()
    assert load("gqa", data).questions == expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": None}, r"jsonl line 7 has no image\."),
        ({"question_id": "77"}, r"jsonl line 7 asks question 77, which is not in .*questions\.json"),
        ({"question_id": "1000"}, r"jsonl line 7 asks question 1000 a second time"),
        (
            {"image": "../secret.jpg"},
            r"line 7 names the image '\.\./secret\.jpg', which is not inside the image folder",
        ),
        ({"image": "/etc/passwd"}, "'/etc/passwd'"),
    ],
)
def test_lines_that_are_wrong(data, changes, sentence):
    edit_line(jsonl(data), 7, **changes)
    with pytest.raises(UserError, match=sentence):
        load("gqa", data)


def test_a_question_left_out_is_named(data):
    lines = jsonl(data).read_text().splitlines()
    jsonl(data).write_text("\n".join(lines[:-2]))
    with pytest.raises(UserError, match=r"lacks 2 of the questions in .*, the first is 1038"):
        load("gqa", data)


def test_missing_images_are_counted_before_the_run(main, data, tmp_path):
    for name in ("n1", "n3"):
        (data / "gqa" / "data" / "images" / f"{name}.jpg").unlink()
    code, _, err = main("--method", "uniform", "--budget", "16", "--output", "o")
    assert code == 2 and "2 of 5 images are not in" in err and "n1.jpg, n3.jpg." in err
    assert not (tmp_path / "o").exists()
    assert main("--method", "uniform", "--budget", "16", "--output", "o", "--limit", "1")[0] == 0


def test_known_suffixes_are_split_off_and_unknown_ones_stay():
    assert split_suffix(f"Why?\n{SHORT}") == ("Why?", SHORT)
    assert split_suffix(f"Why?\n{VIZ}") == ("Why?", VIZ)
    assert split_suffix(f"Why?\nA. x\nB. y\n{LETTER}") == ("Why?\nA. x\nB. y", LETTER)
    assert split_suffix("Why?\nAnswer briefly.") == ("Why?\nAnswer briefly.", "")
    assert split_suffix(SHORT) == (SHORT, "")


# -- provenance ------------------------------------------------------------------------------------------------------


def test_the_commit_is_this_repositorys_or_unknown(tmp_path):
    assert commit(tmp_path) == "unknown"

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "x").write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    head = commit(tmp_path)
    assert len(head) == 40
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.py").write_text("")
    assert commit(tmp_path) == head, "no code"
    for package in ("baselines", "eval"):  # a new method's file is never tracked before its first result
        (tmp_path / package).mkdir()
        (tmp_path / package / "new.py").write_text("")
        assert commit(tmp_path) == f"{head}+changes"
        (tmp_path / package / "new.py").unlink()
    (tmp_path / "x").write_text("2")
    assert commit(tmp_path) == f"{head}+changes"
    (tmp_path / "copy").mkdir()
    assert commit(tmp_path / "copy") == "unknown", "a copy inside another repository is not that one"


# -- choices of reading images, and budgets as ratios ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64", 64), (64, 64), ("1/9", 1 / 9), ("0.111", 0.111), (0.111, 0.111), (".5", 0.5), ("1.0", 1.0), ("2/2", 1.0)],
)
def test_a_budget_is_a_number_or_a_ratio(text, expected):
    """`--budget 0.111` was refused although --help promised a ratio; `--retention 0.111` was another way to say it."""
    assert count_or_ratio(text) == expected and type(count_or_ratio(text)) is type(expected)


@pytest.mark.parametrize(
    "text", ["1/0", "3/2", "0/9", "a/b", "1/", "/9", "16.5", "0.0", "-1", "0", "1e9", 6.5, True, None, "9" * 5000]
)
def test_what_is_neither_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"got {text!r:.42}")):
        count_or_ratio(text)


def test_choices_are_parsed_and_refused():
    assert pairs("--image-option", ["merge=spatial", "force=672x672"]) == {"merge": "spatial", "force": "672x672"}
    assert [parse("force", "672x336"), parse("min_pixels", "7"), parse("merge", "a")] == [(672, 336), 7, "a"]
    for wrong in (["merge"], ["=spatial"], ["merge="]):
        with pytest.raises(UserError, match="should look like merge=spatial"):
            pairs("--image-option", wrong)
    with pytest.raises(UserError, match="given twice"):
        pairs("--image-option", ["merge=spatial", "merge=spatial_unpad"])
    for name, value in (("force", "672"), ("force", "ax3"), ("min_pixels", "on")):
        with pytest.raises(UserError, match=f"{name} should be"):
            parse(name, value)


def run_in(tmp_path, *arguments: str) -> dict:
    write_gqa(tmp_path, count=6)
    output = tmp_path / "out"
    code = cli.main(
        [*arguments, "--data", str(tmp_path), "--output", str(output), "--wandb", "disabled", "--device", "cpu"]
    )
    assert code == 0
    return json.loads((output / "result.json").read_text())


def test_the_convention_of_tiles_is_part_of_the_result(tmp_path):
    save_next_transformers(tmp_path / "next", make_tiny_next())
    arguments = ("--method", "fastervlm", "--budget", "20", "--model", str(tmp_path / "next"))
    result = run_in(tmp_path, *arguments, "--image-option", "merge=spatial", "--image-option", "force=112x112")
    assert result["settings"]["image_options"] == {"merge": "spatial", "anyres_rule": "original", "tiles": "112x112"}
    assert result["accounting"]["mean_tokens_per_layer"] == 20 and result["accounting"]["visual_tokens_before"] == 80


@pytest.mark.parametrize("flags", [["--budget", "1/4"], ["--set", "consensusdrop.retention_ratio=0.25"]])
def test_a_ratio_keeps_that_part_of_each_image(tmp_path, flags):
    save_qwen_transformers(tmp_path / "qwen")
    result = run_in(tmp_path, "--method", "consensusdrop", *flags, "--model", str(tmp_path / "qwen"))
    assert any("no CLS token" in note for note in result["remarks"])
    before = result["accounting"]["visual_tokens_before"]
    assert result["accounting"]["mean_tokens_per_layer"] == before / 4
    assert result["settings"]["config"]["retention_ratio"] == result["config"]["retention_ratio"] == 0.25


@pytest.mark.parametrize("budget", ["8", "1/2"])
def test_a_budget_beside_a_ratio_is_refused(tmp_path, capsys, budget):
    """`--budget 64 --set random.retention_ratio=0.5` printed "random at 64" and kept 288 tokens."""
    write_gqa(tmp_path, count=2)
    flags = ["--method", "random", "--budget", budget, "--set", "random.retention_ratio=0.5"]
    assert cli.main([*flags, "--data", str(tmp_path), "--wandb", "disabled"]) == 2
    err = capsys.readouterr().err
    assert "both given" in err and err.count("\n") == 1


def test_the_registry_refuses_a_budget_beside_a_ratio():
    """`reduce(model, "random", budget=8, retention_ratio=0.5)` kept 16 tokens."""
    with pytest.raises(UserError, match=r"A budget \(8\) and a retention_ratio \(0\.5\) are both given"):
        registry.build("random", 8, {"retention_ratio": 0.5})
    reducer = registry.build("random", None, {"retention_ratio": "0.5"}, visual_tokens=33)
    assert (reducer.budget, reducer.retention_ratio) == (17, 0.5)
    assert registry.build("random", 8, {"retention_ratio": 0.0}).budget == 8
    with pytest.raises(UserError, match="full keeps all"):
        registry.build("full", None, {"retention_ratio": 0.5}, visual_tokens=32)


def test_unknown_choices_end_in_one_sentence(tmp_path, tiny_path, capsys):
    write_gqa(tmp_path, count=2)
    known = ["--method", "full", "--data", str(tmp_path), "--wandb", "disabled"]
    assert cli.main([*known, "--model", str(tiny_path), "--image-option", "merge=spatial"]) == 2
    assert "no choice of merge" in capsys.readouterr().err
    save_next_transformers(tmp_path / "next", make_tiny_next())
    assert cli.main([*known, "--model", str(tmp_path / "next"), "--image-option", "merg=spatial"]) == 2
    assert "Did you mean 'merge'" in capsys.readouterr().err
