"""The answer store: what is acknowledged stays, what is torn is cut, what does not belong is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from eval.answers import AnswerStore, answer_id, settings_hash
from eval.answers.jsonl import write_json
from eval.config import RunConfig
from eval.run import run
from llava.errors import UserError
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"model": "m", "config": {"alpha": 0.5}, "dtype": "float32"}
KNOWN = [str(i) for i in range(100)]


def line(name: str, text: str = "yes") -> dict:
    return {"question_id": name, "text": text, "answer_id": answer_id(settings_hash(SETTINGS), name)}


def open_store(folder: Path, settings: dict = SETTINGS, **options) -> AnswerStore:
    return AnswerStore(folder, settings, KNOWN, **options)


def read(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "answers.jsonl").read_text().splitlines()]


# -- one store -----------------------------------------------------------------------------------------------------


def test_answers_come_back_in_order(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("3", "a\u2028b\n"), line("1")], {})
        store.add([line("2")], {})
    with open_store(tmp_path) as store:
        assert list(store.answers) == ["3", "1", "2"]
        assert store.answers["3"]["text"] == "a\u2028b\n"
        assert [t["question_ids"] for t in store.timing] == [["3", "1"], ["2"]]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_last_line_is_cut_and_nothing_else(tmp_path, cut):
    with open_store(tmp_path) as store:
        store.add([line("1"), line("2"), line("3", "é" * 4)], {})
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    last = len(whole.splitlines()[-1])
    with open_store(tmp_path) as store:
        # Without its newline only, the last answer is whole and stays.
        assert list(store.answers) == (["1", "2", "3"] if cut == 1 else ["1", "2"])
        assert cut <= last
    assert path.read_bytes() == (whole if cut == 1 else whole[: -last - 1])


def test_a_broken_line_in_the_middle_is_not_repaired(tmp_path):
    """A crash cannot tear a line that has another one after it: that file was edited, and guessing would lose data."""
    with open_store(tmp_path) as store:
        store.add([line("1"), line("2")], {})
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"question_id": "7", "te\n' + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"answers\.jsonl line 1 is not valid JSON"):
        open_store(tmp_path)
    assert path.read_bytes() == before


def test_a_torn_timing_line_is_cut_too(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("1")], {})
    with open(tmp_path / "timing.jsonl", "ab") as file:
        file.write(b'{"questions": 1, "vis')
    with open_store(tmp_path) as store:
        assert [t["question_ids"] for t in store.timing] == [["1"]]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('{"question_id": "1", "text": "no"}', "line 2 answers question 1 a second time"),
        ('{"question_id": "900", "text": "no"}', "line 2 answers question 900, which this benchmark does not have"),
        ('{"question_id": 1, "text": "no"}', "line 2 needs question_id and text"),
        ('{"question_id": "2"}', "line 2 needs question_id and text"),
        ("[1]", "line 2 should be a JSON object, got list"),
    ],
)
def test_lines_that_do_not_belong_are_refused(tmp_path, extra, message):
    with open_store(tmp_path) as store:
        store.add([line("1")], {})
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write(extra + "\n")
    with pytest.raises(UserError, match=message):
        open_store(tmp_path)


def test_other_settings_are_refused_by_name_and_value(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("1")], {})
    other = {"model": "m", "config": {"alpha": 0.7, "beta": 1}, "dtype": "float32"}
    with pytest.raises(UserError, match=r"config\.alpha: 0\.5, now 0\.7; config\.beta: absent, now 1\); choose"):
        open_store(tmp_path, other)
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    with open_store(tmp_path) as store:
        assert list(store.answers) == ["1"]


def test_answers_of_another_store_are_refused(tmp_path):
    """A copied answers.jsonl was taken: answer_id was compared for shards only."""
    for folder, settings in ((tmp_path / "a", SETTINGS), (tmp_path / "b", SETTINGS | {"dtype": "float16"})):
        with open_store(folder, settings) as store:
            store.add([line("1") | {"answer_id": answer_id(settings_hash(settings), "1")}], {})
    (tmp_path / "b" / "answers.jsonl").write_bytes((tmp_path / "a" / "answers.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"answers\.jsonl holds 1 answers of another store, the first to question 1"):
        open_store(tmp_path / "b", SETTINGS | {"dtype": "float16"})


def test_settings_of_a_store_without_answers_may_change(tmp_path):
    with open_store(tmp_path):
        pass
    with open_store(tmp_path, {"model": "other"}) as store:
        store.add([line("1")], {})
    with pytest.raises(UserError, match="other settings"):
        open_store(tmp_path)


def test_answers_without_settings_are_refused(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("1")], {})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match=r"no settings\.json beside them"):
        open_store(tmp_path)


def test_restart_moves_the_old_store_aside_and_deletes_nothing(tmp_path):
    for number in (1, 2):
        with open_store(tmp_path, restart=True) as store:
            assert not store.answers and not store.timing
            store.add([line(str(number))], {})
    with open_store(tmp_path, {"model": "other"}, restart=True) as store:
        assert not store.answers
    assert [row["question_id"] for row in read(tmp_path / "replaced-1")] == ["1"]
    assert [row["question_id"] for row in read(tmp_path / "replaced-2")] == ["2"]
    assert json.loads((tmp_path / "replaced-2" / "settings.json").read_text()) == SETTINGS


def test_a_refused_store_lets_go_of_the_lock(tmp_path):
    with open_store(tmp_path) as store:
        store.add([line("1")], {})
    with pytest.raises(UserError):
        open_store(tmp_path, {})
    with open_store(tmp_path):
        pass


def test_full_disk_leaves_a_valid_store(tmp_path, monkeypatch):
    """The disk takes half of the batch and then no more."""
    real = os.write

    def half(descriptor: int, data) -> int:
        if len(data) == 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, bytes(data)[:-60] if b"long" in bytes(data) else data)

    with open_store(tmp_path) as store:
        store.add([line("1"), line("2")], {})
        before = (tmp_path / "answers.jsonl").read_bytes()
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(UserError, match="No space left on device; everything before this batch is kept"):
            store.add([line("3", "long " * 20), line("4", "long " * 20)], {})
        monkeypatch.undo()
        assert (tmp_path / "answers.jsonl").read_bytes() == before
        assert list(store.answers) == ["1", "2"]
        store.add([line("3")], {})
    with open_store(tmp_path) as store:
        assert list(store.answers) == ["1", "2", "3"]
        assert [t["question_ids"] for t in store.timing] == [["1", "2"], ["3"]]


def test_an_unwritable_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write to the output folder"):
        open_store(tmp_path / "file" / "below")


def test_settings_are_replaced_in_one_step(tmp_path, monkeypatch):
    """A crash while writing leaves the old file: the new one appears only when it is complete."""
    path = tmp_path / "settings.json"
    write_json(path, {"a": 1})

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


# -- whole runs ----------------------------------------------------------------------------------------------------


def config(data: Path, output: Path, **changes) -> RunConfig:
    return RunConfig(method="first", budget=16, data=data, output=output, batch_size=4, wandb="disabled", **changes)


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.eval_fakes import FakeLlava, FakeReducer
from eval.config import RunConfig
from eval.run import run

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before_answer(number):
    if {where!r} == "between batches" and number == 3:
        die()

real_write, real_fsync = os.write, os.fsync
seen = 0

def write(descriptor, data):
    global seen
    if b"answer_id" in bytes(data):
        seen += 1
        if {where!r} == "inside a line" and seen == 3:
            real_write(descriptor, bytes(data)[: len(data) * 2 // 3])
            die()
        done = real_write(descriptor, data)
        if {where!r} == "after the answers" and seen == 3:
            die()
        return done
    return real_write(descriptor, data)

os.write = write
run(RunConfig(method="first", budget=16, data=Path({data!r}), output=Path({output!r}), batch_size=4, wandb="disabled"),
    model=FakeLlava(before_answer), reducer=FakeReducer())
"""


@pytest.mark.process
@pytest.mark.parametrize("where", ["between batches", "inside a line", "after the answers"])
def test_killed_run_goes_on_and_equals_an_uninterrupted_one(tmp_path, where):
    data = write_gqa(tmp_path / "data")
    output = tmp_path / "killed"
    names = {"root": str(ROOT), "data": str(data), "output": str(output)}
    script = textwrap.dedent(KILLED_RUN).format(where=where, **names)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Two thirds of a batch of four are two whole lines and a torn one.
    safe = {"between batches": 12, "inside a line": 10, "after the answers": 12}[where]
    assert not (output / "result.json").exists()
    # As a kill inside the replacement of a file leaves it; the system has given the number to another process since.
    (output / f".predictions.json.{os.getppid()}").write_text("half")

    model = FakeLlava()
    resumed = run(config(data, output), model, FakeReducer())
    whole = run(config(data, tmp_path / "whole"), FakeLlava(), FakeReducer())
    assert len(model.asked) == 40 - safe
    assert (output / "answers.jsonl").read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()
    for part in ("metrics", "confidence", "groups", "audit", "settings"):
        assert resumed[part] == whole[part]
    assert {path.name for path in output.iterdir()} == {
        "answers.jsonl", "timing.jsonl", "runs.jsonl", "settings.json", "result.json", "predictions.json", "lock"
    }  # fmt: skip
    timed = {"between batches": 40, "inside a line": 38, "after the answers": 40}[where]
    assert resumed["timing"]["questions"] == timed
    assert resumed["timing"]["this_run"]["questions"] == 40 - safe
    assert resumed["timing"]["runs"] == 2 and whole["timing"]["runs"] == 1


def test_growing_the_limit_continues_and_shrinking_it_scores_fewer(tmp_path):
    data = write_gqa(tmp_path / "data")
    first = run(config(data, tmp_path / "o", limit=10), FakeLlava(), FakeReducer())
    assert first["partial"] and first["asked"] == 10
    model = FakeLlava()
    grown = run(config(data, tmp_path / "o", limit=14), model, FakeReducer())
    assert model.asked == [str(1000 + n) for n in range(10, 14)]
    assert grown["asked"] == 14 and len(read(tmp_path / "o")) == 14
    shrunk = run(config(data, tmp_path / "o", limit=10), FakeLlava(), FakeReducer())
    assert shrunk["metrics"] == first["metrics"] and len(read(tmp_path / "o")) == 14


def test_a_finished_run_asks_nothing_again(tmp_path):
    data = write_gqa(tmp_path / "data")
    run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
    model = FakeLlava()
    again = run(config(data, tmp_path / "o"), model, FakeReducer())
    assert model.asked == []
    assert again["timing"]["this_run"]["questions"] == 0 and again["timing"]["questions"] == 40


def test_the_batch_size_may_change_between_runs_and_is_reported(tmp_path):
    data = write_gqa(tmp_path / "data")
    run(config(data, tmp_path / "o", limit=8), FakeLlava(), FakeReducer())
    other = RunConfig("first", 16, data=data, output=tmp_path / "o", batch_size=16, wandb="disabled")
    result = run(other, FakeLlava(), FakeReducer())
    assert [c["batch_size"] for c in result["timing"]["conditions"]] == [16, 4]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model, options: setattr(model, "fingerprint", "ffff"), "model_files: 0123abcd, now ffff"),
        (lambda model, options: setattr(model, "conversation", "plain"), "conversation: vicuna_v1, now plain"),
        (lambda model, options: options.update(reducer=FakeReducer(alpha=0.9)), "config.alpha: 0.5, now 0.9"),
        (lambda model, options: options.update(max_new_tokens=5), "max_new_tokens: 128, now 5"),
        (lambda model, options: options.update(seed=3), "seed: 0, now 3"),
    ],
)
def test_a_run_never_mixes_answers_of_different_settings(tmp_path, change, named):
    data = write_gqa(tmp_path / "data")
    run(config(data, tmp_path / "o", limit=4), FakeLlava(), FakeReducer())
    model, options = FakeLlava(), {}
    change(model, options)
    reducer = options.pop("reducer", FakeReducer())
    with pytest.raises(UserError) as error:
        run(config(data, tmp_path / "o", **options), model, reducer)
    assert named in str(error.value)
    assert len(read(tmp_path / "o")) == 4


def test_changed_questions_are_other_settings(tmp_path):
    data = write_gqa(tmp_path / "data")
    run(config(data, tmp_path / "o", limit=4), FakeLlava(), FakeReducer())
    jsonl = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    jsonl.write_text(jsonl.read_text().replace("Is thing 30", "Was thing 30"))
    with pytest.raises(UserError, match="other settings \\(questions: "):
        run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
