"""W&B offline, read back from its own file; and that logging never harms a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import tracking
from eval.config import RunConfig
from eval.figures.overlay import GAP
from eval.results import report
from eval.run import Interrupted, run
from eval.tracking import one_line, sync
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa
from tests.read_wandb import find_runs, read_run, without_wandb


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    without_wandb(monkeypatch, tmp_path / "nobody")


def config(tmp_path: Path, **changes) -> RunConfig:
    data = write_gqa(tmp_path / "data")
    return RunConfig("first", 16, data=data, output=tmp_path / "out", batch_size=8, **changes)


# -- logging -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without options: its folder, its result, and what W&B was told."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        without_wandb(patched, folder / "nobody")
        result = run(config(folder, wandb="auto"), FakeLlava(), FakeReducer())
    (logged,) = map(read_run, find_runs(folder / "out"))
    return folder / "out", result, logged


def test_offline_run_reads_back_whole(whole):
    folder, result, logged = whole
    assert [one.name for one in sync.find_runs(folder)] == [logged.name], "`vtr wandb sync` finds what W&B wrote"
    assert logged.config["versions"] == result["versions"]
    for name in ("accuracy", "binary", "open"):
        assert logged.summary[f"metrics/{name}"] == result["metrics"][name]
    assert logged.summary["accounting/mean_tokens_per_layer"] == 16
    assert [logged.summary[f"accounting/entering/layer {layer}"] for layer in range(3)] == [16, 16, 16]
    assert logged.summary["accounting/kv_bytes_per_sample"] == 16000
    assert logged.summary["timing/batch/median_ms/prefill"] == pytest.approx(16)
    assert logged.summary["flops/language_model_per_question"] == 3 * 10**8
    (rank,) = result["throughput"]["ranks"]
    assert logged.summary["throughput/rank 0/questions_per_second"] == pytest.approx(rank["questions_per_second"])
    assert logged.summary["failed"] == 0
    assert logged.summary["confidence/accuracy/mean"] == result["confidence"]["accuracy"]["mean"]
    assert [row["progress/answered"] for row in logged.history if "progress/answered" in row] == [8, 16, 24, 32, 40]
    assert logged.last("progress/accuracy") == result["metrics"]["accuracy"]
    assert logged.summary["sentence"] == result["sentence"]
    assert logged.exit_code == 0
    assert set(logged.tags) == {"gqa", "testdev", "fake", "first", "llava", "budget 16", "alpha=0.5"}
    assert (logged.job_type, logged.group) == ("evaluation", "gqa-testdev")


@pytest.mark.parametrize("error", [0, 10])
def test_a_run_off_its_budget_has_a_tag(tmp_path, error):
    """It looked like every other run at this budget."""
    result = run(config(tmp_path, wandb="auto"), FakeLlava(mean_error=error, planned=False), FakeReducer())
    (logged,) = map(read_run, find_runs(tmp_path / "out"))
    assert ("off budget" in logged.tags) == bool(error)
    assert logged.summary["off_budget"] == (result["off_budget"]["remark"] if error else "")
    assert logged.summary["accounting/asked_tokens_per_layer"] == 16


def test_final_numbers_are_a_summary_and_no_charts(whole):
    """Fifty final numbers were logged as history, which W&B draws as fifty charts of one point."""
    charts = {key for row in whole[2].history for key in row if not key.startswith("_")}
    assert charts == {
        "progress/answered", "progress/accuracy", "progress/batch_size", "progress/batch_prefill_ms",
        "progress/batch_decode_ms", "samples", "kept tokens",
    }  # fmt: skip


def test_settings_are_flat_and_complete(tmp_path):
    """The budget was at config.config.budget; profile, source and limit were nowhere."""
    result = run(config(tmp_path, wandb="offline", table="llava-1.5", limit=8), FakeLlava(), FakeReducer())
    logged = read_run(find_runs(tmp_path / "out" / "limit8")[0])
    found = logged.config
    for key, value in result["settings"].items():
        assert key == "config" or isinstance(value, dict) or found[key] == value
    assert re.fullmatch("[0-9a-f]{16}", found["code"]) and found["code"] != found["method_code"]
    expected = {"budget": 16, "alpha": 0.5, "profile": "llava", "limit": 8, "batch_size": 8}
    expected |= {"source": result["config"]["source"]}
    assert {key: found[key] for key in expected} == expected and "config" not in found
    assert found["hardware"] == result["conditions"]["hardware"]
    assert (logged.group, logged.job_type, found["table"]) == ("llava-1.5", "evaluation", "llava-1.5")
    assert {"llava-1.5", "fake", "first", "budget 16"} <= set(logged.tags)
    assert "table" not in json.loads((tmp_path / "out" / "settings.json").read_text()), "answers do not depend on it"


def test_runs_with_other_options_have_other_names_and_tags(tmp_path):
    """ConsensusDrop with and without merging, and in another precision, could not be told apart in W&B."""
    seen = set()
    for number, changes in enumerate(({}, {"alpha": 0.3, "weights": "none"})):
        settings = {"method": "consensusdrop", "benchmark": "gqa", "config": {"budget": 64, **changes}}
        dtype = "bfloat16" if number else "float32"
        output = tmp_path / str(number) / "gqa" / "toy" / "run"
        output.mkdir(parents=True)
        about = RunConfig("consensusdrop", 64, dtype=dtype, wandb="offline")
        tracking.start_evaluation(about, output, settings, {}).close(failed=False)
        logged = read_run(find_runs(output)[0])
        expected = {"alpha=0.3", "weights=none", "dtype=bfloat16"} if number else set()
        assert {tag for tag in logged.tags if "=" in tag} == expected
        assert all(word in logged.display_name for word in expected)
        seen.add((logged.display_name, *logged.tags))
    assert len(seen) == 2


def test_group_job_type_name_and_tags_of_the_environment_hold(tmp_path, monkeypatch):
    """Arguments of wandb.init replace W&B's own variables, so these had no effect."""
    for name, value in (("RUN_GROUP", "mine"), ("JOB_TYPE", "trial"), ("NAME", "monday"), ("TAGS", "a,b")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    run(config(tmp_path, wandb="offline", table="llava-1.5", limit=8), FakeLlava(), FakeReducer())
    logged = read_run(find_runs(tmp_path / "out" / "limit8")[0])
    assert (logged.group, logged.job_type, logged.display_name) == ("mine", "trial", "monday")
    assert {"a", "b", "llava-1.5"} <= set(logged.tags) and logged.config["table"] == "llava-1.5"


def test_the_key_is_in_no_file_of_a_run_and_never_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", key := "5ecret" * 7)
    run(config(tmp_path, wandb="offline", limit=8), FakeLlava(), FakeReducer())
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(find_runs(tmp_path / "out" / "limit8")) == 1
    assert not [path for path in files if key.encode() in path.read_bytes()]
    assert one_line(ValueError(f"refused {key} of {key}\nmore")) == "ValueError: refused *** of ***"


def test_a_continued_run_continues_its_wandb_run(tmp_path, capsys):
    """Every process made a new W&B run, also over the same answer store."""

    def stop(batch: int) -> None:
        if batch == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(config(tmp_path, wandb="offline"), FakeLlava(stop), FakeReducer())
    capsys.readouterr()
    run(config(tmp_path, wandb="offline"), FakeLlava(), FakeReducer())
    first, second = map(read_run, find_runs(tmp_path / "out"))
    assert first.name == second.name == (tmp_path / "out" / "wandb_id").read_text().strip()
    steps = [row["_step"] for one in (first, second) for row in one.history if "progress/answered" in row]
    assert steps == [8, 16, 24, 32, 40]
    assert f"wandb sync {tmp_path}/out/wandb/*run-*-{first.name}*" in capsys.readouterr().out
    run(config(tmp_path, wandb="offline", restart=True), FakeLlava(), FakeReducer())
    assert len({read_run(folder).name for folder in find_runs(tmp_path / "out")}) == 2


def test_a_run_that_dies_while_wandb_starts_keeps_its_id(tmp_path, monkeypatch):
    """The id was written after W&B had the run: a process that died in between left it a second one."""
    import wandb

    real, started = wandb.init, []

    def die(**arguments):
        started.append(arguments["id"])
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", die)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path, wandb="offline"), FakeLlava(), FakeReducer())
    monkeypatch.setattr(wandb, "init", real)
    run(config(tmp_path, wandb="offline"), FakeLlava(), FakeReducer())
    assert [read_run(folder).name for folder in find_runs(tmp_path / "out")] == started


@pytest.mark.parametrize("content", [b"\xff" * 12, bytes(12), b"two words\n", b""])
def test_a_damaged_id_is_replaced(tmp_path, capsys, content):
    """A binary file in its place ended the logging, and `vtr wandb sync` with a traceback."""
    (tmp_path / "out" / "replaced-1").mkdir(parents=True)
    for folder in (tmp_path / "out", tmp_path / "out" / "replaced-1"):
        (folder / "wandb_id").write_bytes(content)
    run(config(tmp_path, wandb="offline"), FakeLlava(), FakeReducer())
    (found,) = find_runs(tmp_path / "out")
    assert read_run(found).name == (tmp_path / "out" / "wandb_id").read_text().strip()
    assert sync.main([str(tmp_path / "out"), "--dry-run"]) == 0 and ": 1 to upload" in capsys.readouterr().out


def test_percent_of_full_needs_the_same_settings(tmp_path):
    def result(method, score, **changes):
        settings = {"method": method, "dtype": "float32", "config": {}} | changes
        return {"method": method, "main": "f1", "metrics": {"f1": score}, "asked": 3, "settings": settings}

    for name, content in (("x", result("full", 80.0)), ("y", result("full", 50.0, dtype="float16"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(content))
    assert report.percent_of_full(result("first", 60.0), tmp_path / "z") == 75
    assert report.percent_of_full(result("first", 60.0, dtype="float16"), tmp_path / "z") == 120
    assert report.percent_of_full(result("first", 60.0, dtype="bfloat16"), tmp_path / "z") is None
    assert report.percent_of_full(result("first", None), tmp_path / "z") is None


def test_offline_run_holds_the_samples_and_the_images(whole):
    folder, _, logged = whole
    table = logged.table("samples")
    assert table["columns"] == list(tracking.COLUMNS)
    assert len(table["data"]) == 40
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row[5] for row in table["data"]] == [answer["text"] for answer in answers]
    assert table["data"][1][3:] == ["Is thing 1 there?", "something else", answers[1]["text"], 0, 16]
    for number, row in enumerate(table["data"]):
        drawn = number < tracking.TABLE_IMAGES
        assert [cell is not None for cell in row[1:3]] == [drawn, drawn], "the table had no image at all"
    files = logged.table_files("samples")
    original, kept = (Image.open(files[cell["path"]]) for cell in table["data"][1][1:3])
    assert original.size == kept.size == (64, 64)
    assert np.asarray(original).mean() > 1.5 * np.asarray(kept).mean()

    images = logged.last("kept tokens")
    assert images["count"] == tracking.IMAGES
    assert "right, 16 of 64 tokens" in images["captions"][0]
    files = [logged.folder / "files" / name for name in images["filenames"]]
    first = np.asarray(Image.open(files[0]).convert("RGB")).astype(int)
    # 32 x 32 enlarged twice, the unreduced original in front of the overlay.
    assert first.shape == (64, 2 * 64 + GAP, 3)
    assert (first[:, :64] == first[0, 0]).all()
    # 64 tokens are 8 x 8; the first 16 patches are the upper quarter.
    overlay = first[:, 64 + GAP :]
    assert overlay[:16].mean() > 2 * overlay[16:].mean()


def test_disabled_leaves_no_trace_and_missing_is_no_obstacle(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(config(tmp_path, wandb="auto"), FakeLlava(), FakeReducer())
    assert not (tmp_path / "out" / "wandb").exists() and "W&B" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(config(tmp_path, wandb="offline"), FakeLlava(), FakeReducer())
    assert "package wandb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "disabled"),
        ("offline", {"WANDB_MODE": "online", "WANDB_API_KEY": "k"}, "offline"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
    ],
)
def test_the_flag_wins_then_the_environment_then_the_key(monkeypatch, flag, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracking.resolve_mode(flag) == expected


def test_a_netrc_counts_as_a_key_only_if_it_names_the_server(tmp_path, monkeypatch):
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    assert not tracking.has_key()
    file.write_text("machine github.com login a password b\n")
    assert not tracking.has_key()
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):  # `wandb login` of 0.31 writes the second one
        file.write_text(f"machine {host} login user password k\n")
        assert tracking.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not tracking.has_key()


def test_online_that_cannot_connect_goes_offline(tmp_path, monkeypatch, capsys):
    """The server refuses; the run is logged offline and its result is the same."""
    import wandb

    real = wandb.init

    def refuse(**arguments):
        if arguments["mode"] == "online":
            assert arguments["settings"].init_timeout == 15
            raise wandb.errors.CommError("Run initialization has timed out\nmore")
        return real(**arguments)

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    result = run(config(tmp_path, wandb="auto"), FakeLlava(), FakeReducer())
    assert result["asked"] == 40
    assert "(CommError: Run initialization has timed out)" in capsys.readouterr().err
    assert len(find_runs(tmp_path / "out")) == 1


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failure_of_wandb_never_loses_the_result(tmp_path, monkeypatch, capsys, broken):
    import wandb

    class Run:
        offline, dir, url, summary = True, str(tmp_path / "x" / "files"), None, {}

        def log(self, _, step=None):
            if broken == "log":
                raise OSError("disk")

        def finish(self, exit_code):
            if broken == "finish":
                raise RuntimeError("service gone")

    def init(**_):
        if broken == "init":
            raise RuntimeError("no service")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    result = run(config(tmp_path, wandb="offline"), FakeLlava(), FakeReducer())
    assert json.loads((tmp_path / "out" / "result.json").read_text())["metrics"] == result["metrics"]
    err = capsys.readouterr().err
    assert err.count("W&B") == 1 and "Traceback" not in err


@pytest.mark.process
def test_nothing_is_written_to_the_home_folder(tmp_path):
    """A container's home is often read-only; W&B keeps data, cache and configuration there by default."""
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa\n"
        "from eval.config import RunConfig\nfrom eval.run import run\n"
        "data = write_gqa(Path('data'))\n"
        "run(RunConfig('first', 16, data=data, output=Path('out'), wandb='auto'), FakeLlava(), FakeReducer())\n"
    )
    root = Path(__file__).resolve().parent.parent
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "XDG_"))}
    environment = clean | {"HOME": str(home), "PYTHONPATH": str(root)}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []
    assert len(find_runs(tmp_path / "out")) == 1
