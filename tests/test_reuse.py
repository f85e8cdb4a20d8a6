"""Stored answers are used again only where code, prompts and images are those that they were made with."""

import importlib.util
import json
import os
import py_compile
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import eval.ask
from eval import run as run_module
from eval.answers import source_hash
from eval.answers.source_hash import answer_sources, read_source
from eval.benchmarks.media import Folder
from eval.config import DEFAULT_MODEL, RunConfig
from eval.run import run
from llava.errors import UserError
from llava.file_state import file_state
from llava.model.checkpoint import files as checkpoint_files
from llava.places import PACKAGES
from llava.reduction import registry
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa

METHOD = '''
"""A method."""
from dataclasses import dataclass
from tests.eval_fakes import FakeReducer

@dataclass(frozen=True)
class Mine(FakeReducer):
    """Documented."""

    def rank(self, scores):
        """Larger is better."""
        return {sign}scores
'''


@pytest.fixture
def data(tmp_path) -> Path:
    return write_gqa(tmp_path / "data")


def config(data: Path, output: Path, **changes) -> RunConfig:
    return RunConfig(method="first", budget=16, data=data, output=output, batch_size=4, wandb="disabled", **changes)


def method_from(path: Path, source: str):
    """An instance of the class `Mine` of a file with this source."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mine"] = module
    spec.loader.exec_module(module)
    return module.Mine()


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


# -- code ----------------------------------------------------------------------------------------------------------


def test_edited_code_does_not_return_old_scores(data, tmp_path):
    """With the ranking of a method negated, the same command printed the old score, or a mixture of both."""
    path = tmp_path / "mine.py"
    run(config(data, tmp_path / "o", limit=8), FakeLlava(), method_from(path, METHOD.format(sign="")))
    model, edited = FakeLlava(), method_from(path, METHOD.format(sign="-"))
    with pytest.raises(UserError, match=r"\(code of the method: mine\.py\); .* --restart"):
        run(config(data, tmp_path / "o"), model, edited)
    assert model.asked == [] and len(lines_of(tmp_path / "o")) == 8
    assert run(config(data, tmp_path / "o", restart=True), model, edited)["asked"] == 40 == len(model.asked)
    # The old code is there again, as is its store.
    with pytest.raises(UserError, match=r"mine\.py\)"):
        run(config(data, tmp_path / "o"), FakeLlava(), method_from(path, METHOD.format(sign="")))


def test_code_that_is_edited_during_a_run_ends_it(data, tmp_path):
    """The run went on with the old code, and its result was taken for that of the new one."""
    path, source = tmp_path / "mine.py", METHOD.format(sign="")
    method = method_from(path, source)

    def edit(batch: int) -> None:
        path.write_text(METHOD.format(sign="-"))

    with pytest.raises(UserError, match=r"mine\.py"):
        run(config(data, tmp_path / "o"), FakeLlava(edit), method)
    assert len(lines_of(tmp_path / "o")) == 40 and not (tmp_path / "o" / "result.json").exists()
    # The edit is undone, or changed a comment only: the answers are those of this code.
    path.write_text(f"{source}# A comment.\n")
    model = FakeLlava()
    assert run(config(data, tmp_path / "o"), model, method)["asked"] == 40 and model.asked == []


def test_an_edit_ends_a_run_that_asks_for_long(data, tmp_path, monkeypatch):
    """Only the end of a run looking for edits would waste hours: batches look, too."""
    monkeypatch.setattr(eval.ask, "CHECK_SECONDS", 0)
    method = method_from(tmp_path / "mine.py", METHOD.format(sign=""))
    model = FakeLlava(lambda batch: batch == 2 and (tmp_path / "mine.py").write_text("half an ed("))
    with pytest.raises(UserError, match=r"mine\.py"):
        run(config(data, tmp_path / "o"), model, method)
    assert len(model.asked) == len(lines_of(tmp_path / "o")) == 12


def test_a_module_is_hashed_as_it_was_imported(tmp_path, monkeypatch):
    """A .pyc of the same second and size is taken for current: the old code ran, and the hash was of the new file."""
    path = tmp_path / "own_module.py"
    path.write_text("VALUE = 1")
    py_compile.compile(str(path))
    state = path.stat()
    path.write_text("VALUE = 2")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(source_hash, "FOLLOWED", ("own_module",))
    monkeypatch.setattr(source_hash, "IMPORTED", {})
    assert importlib.import_module("own_module").VALUE == 2
    path.write_text("VALUE = 3")
    assert {path: b"VALUE = 2"} == source_hash.IMPORTED, "not what is on the disk now"
    del sys.modules["own_module"]


EDITED = """
import eval.run  # the process has begun
from eval.answers.source_hash import answer_sources, check_sources
from llava.errors import UserError
from llava.places import PACKAGES as ROOT
from llava.reduction import registry
registry.load_all()
def edit(name, text):
    before = (ROOT / name).read_text()
    (ROOT / name).write_text(before + text)
    return before
def refused(known=None):
    try:
        check_sources(method, known=known)
    except UserError as error:
        return str(error)
method = registry.build("divprune", 4)
known = answer_sources(method)
assert not any(name.startswith("torch") for name in known), "libraries lie beside it"
assert refused(known) is None
before = edit("baselines/divprune.py", "EDITED = True")
assert answer_sources(method) == known, "what was imported"
assert "baselines/divprune.py" in refused() and "baselines/divprune.py" in refused(known)
(ROOT / "baselines/divprune.py").write_text(before)
assert refused(known) is None
edit("baselines/fastv.py", "EDITED = True")
assert refused(known) is None, "the code of another method"
# Imported by a function, after its file was changed; by the time of the check it is as before.
before = edit("llava/pipeline/late.py", "EDITED = True")
import llava.pipeline.late
(ROOT / "llava/pipeline/late.py").write_text(before)
assert "llava/pipeline/late.py" in refused(known)
print("as expected")
"""


@pytest.mark.process
def test_edits_of_an_installed_project_are_seen(tmp_path):
    """Files were hashed when a run was prepared, and imported before: the new code's hash stood by the old answers.

    In site-packages the imports of every library were followed, too.
    """
    for package in ("eval", *source_hash.FOLLOWED):
        shutil.copytree(PACKAGES / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "torch").symlink_to(Path(torch.__file__).parent)
    (tmp_path / "llava/pipeline/late.py").write_text("")
    with (tmp_path / "llava/pipeline/generate.py").open("a") as generate:
        generate.write("\n\ndef late():\n    import llava.pipeline.late\n")
    done = subprocess.run([sys.executable, "-c", EDITED], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "as expected", done.stderr


def test_the_packages_that_are_followed_are_those_of_models_and_methods():
    assert set(source_hash.FOLLOWED) == {"llava", *registry.PACKAGES}


def test_a_rank_with_other_code_names_it(data):
    """Ranks import later than each other: "other questions or another model" did not say that code was edited."""
    job = run_module.prepare(config(data, data / "o"), FakeLlava(), FakeReducer())
    other = {**job.settings, "code": job.settings["code"] | {"llava/pipeline/stages.py": "0"}}
    plan = {"settings": other, "planned": len(job.planned)}
    rank = SimpleNamespace(number=1, report=lambda phase: None, get=lambda key: plan)
    with pytest.raises(UserError, match=r"Rank 1 .*llava/pipeline/stages\.py"):
        run_module.follow_first_rank(job, rank)


def test_the_sources_of_a_method_are_its_own_and_the_models(tiny):
    """Editing one method must not invalidate the answers of all others."""
    found = answer_sources(tiny, registry.build("consensusdrop", 4))
    assert {"consensusdrop/method.py", "llava/model/llava_arch.py", "llava/pipeline/stages.py"} <= found.keys()
    assert {"llava/model/checkpoint/load.py", "llava/reduction/merging.py"} <= found.keys(), (
        "imports inside functions count"
    )
    folders = {name.split("/")[0] for name in found}
    assert folders == {"consensusdrop", "llava", "eval"}
    assert [name for name in found if name.startswith("eval/")] == ["eval/feature_cache.py"]
    assert "llava/hf/patch.py" not in found, "nothing of an evaluation runs there"


def write_project(root: Path, **files: str) -> None:
    for name, source in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))


def test_imports_are_followed_through_the_project(tmp_path):
    write_project(
        tmp_path,
        llava__one="import attnmix.two as two\nfrom . import near\nfrom .near import f\nimport os, json, torch",
        llava__near="def f(): from baselines import three",
        attnmix__two="from attnmix import CONSTANT",
        baselines__three="import eval.run",
        eval__run="",
        torch="# an installed project lies beside the libraries",
        llava__unused="",
    )
    (tmp_path / "attnmix" / "__init__.py").write_text("CONSTANT = 1")
    waiting, seen = [tmp_path / "llava" / "one.py"], set()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += read_source(path, tmp_path, path.read_bytes())[1]
    assert {p.relative_to(tmp_path).as_posix() for p in seen} == {
        "llava/one.py", "llava/near.py", "attnmix/two.py", "attnmix/__init__.py", "baselines/three.py"
    }  # fmt: skip


def test_differences_say_which_files_are_new_and_which_are_gone():
    """Between the settings of a store and those of now, in this order."""
    old = {"dtype": "float32", "code": {"a.py": "1", "b.py": "2", "c.py": "3"}}
    new = {"dtype": "float16", "code": {"b.py": "2", "c.py": "4", "d.py": "5"}}
    assert source_hash.differences(old, new) == [
        "dtype: float32, now float16",
        "code: a.py (gone), c.py, d.py (new)",
    ]


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("x = 1", "x = 1  # why", True),
        ("x = 1", "x = 2", False),
        ("x = 1", "x = True", False),
        ("x = 1", "x = 1.0", False),
        ("x = 'a'", "x = b'a'", False),
        ("f(a, b)", "f(b, a)", False),
        ("x = -y", "x = y", False),
        ("a - (b - c)", "(a - b) - c", False),
        ("if a:\n    b\nc", "if a:\n    b\n    c", False),
        ("def f():\n    'text'\n    return 1", "def f(): return 1", True),
        ("def f(x=1): pass", "def f(x=2): pass", False),
        ("def f(*, x): pass", "def f(x): pass", False),
        ("x = 'text'", "x = 'other'", False),
        ("f'{x:.2f}'", "f'{x:.3f}'", False),
    ],
)
def test_what_counts_as_an_edit(tmp_path, one, two, same):
    hashes = [read_source(tmp_path / "one.py", tmp_path, source.encode()) for source in (one, two)]
    assert (hashes[0] == hashes[1]) is same


def test_the_result_names_the_commit_of_its_answers(data, tmp_path, monkeypatch):
    """A finished run that was scored again was stamped with the commit of the day."""
    monkeypatch.setattr(run_module, "commit", lambda: "old")
    run(config(data, tmp_path / "o", limit=8), FakeLlava(), FakeReducer())
    monkeypatch.setattr(run_module, "commit", lambda: "new")
    again = run(config(data, tmp_path / "o", limit=8), FakeLlava(), FakeReducer())
    assert again["commit"] == "old" and again["scored_with"]["commit"] == "new"
    grown = run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
    assert grown["commit"] == "old and new"
    assert "the answers were made with different commits (old: 8 answers; new: 32 answers)" in grown["remarks"]


# -- files of the model ---------------------------------------------------------------------------------------------


def other_mean(folder: Path) -> None:
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(content | {"image_mean": [0.1, 0.9, 0.1]}))


def rotated(folder: Path) -> None:
    """Every word has the id of the next one."""
    content = json.loads((folder / "tokenizer.json").read_text())
    words = list(content["model"]["vocab"])
    content["model"]["vocab"] = {word: content["model"]["vocab"][words[i - 1]] for i, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def columns_of_zero(folder: Path) -> None:
    """All columns but every sixteenth of every down_proj."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "down_proj" in name:
            weight[:, torch.arange(weight.shape[1]) % 16 > 0] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (other_mean, "preprocessor_config.json"),
        (rotated, "tokenizer.json"),
        (columns_of_zero, "model.safetensors"),
        (
            lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 5}'),
            "generation_config.json",
        ),
    ],
)
def test_another_file_of_the_model_does_not_return_old_scores(tmp_path, change, file):
    """Preprocessing and tokenizer were in no hash, and of each weight about 4,096 strided values were."""
    folder = shutil.copytree(DEFAULT_MODEL, tmp_path / "tinyllava")
    asked = RunConfig("consensusdrop", 64, output=tmp_path / "o", limit=2, model=str(folder), wandb="disabled")
    run(asked)
    change(folder)
    with pytest.raises(UserError, match=rf"\(files of the model: {file}\)"):
        run(asked)


@pytest.mark.parametrize("moment", ["loaded", "asked"])
def test_a_file_of_the_model_that_changes_under_a_run_ends_it(tmp_path, monkeypatch, moment):
    """The model was loaded from one content and hashed from another; mapped weights even change while they are used."""
    folder = shutil.copytree(DEFAULT_MODEL, tmp_path / "tinyllava")
    home, name = (run_module, "CachingLlava") if moment == "loaded" else (eval.ask, "generate")
    real = getattr(home, name)

    def changing(*arguments, **options):
        other_mean(folder)
        return real(*arguments, **options)

    monkeypatch.setattr(home, name, changing)
    asked = RunConfig("consensusdrop", 64, output=tmp_path / "o", limit=2, model=str(folder), wandb="disabled")
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        run(asked)
    assert not (tmp_path / "o" / "limit2").exists() or not list((tmp_path / "o" / "limit2").glob("result.json"))


def test_the_hash_of_a_large_file_is_remembered(tmp_path, monkeypatch):
    """A file of gigabytes is read once, for as long as its size, times and inode stay; without a cache, each time."""
    monkeypatch.setattr(checkpoint_files, "LARGE", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, read = checkpoint_files.read_hash, []
    monkeypatch.setattr(checkpoint_files, "read_hash", lambda state, *rest: read.append(1) or real(state, *rest))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    first = checkpoint_files.hashes_of({"a": file_state(file)})
    assert checkpoint_files.hashes_of({"a": file_state(file)}) == first == {"a": sha256(b"weights").hexdigest()[:16]}
    assert len(read) == 1
    (entry,) = (tmp_path / "cache" / "visual-token-reduction").iterdir()
    entry.write_text(entry.read_text()[:5])  # its writer was killed
    assert checkpoint_files.hashes_of({"a": file_state(file)}) == first and len(read) == 2
    for damaged in (b"\xff" * 16, bytes(16), b"0123456789ABCDEF", b"0123456789abcde\n"):  # believed, or a traceback
        entry.write_bytes(damaged)
        read.clear()
        assert checkpoint_files.hashes_of({"a": file_state(file)}) == first and len(read) == 1
    read.append("again")
    state = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert checkpoint_files.hashes_of({"a": file_state(file)}) != first and len(read) == 3, (
        "the same size and time of change"
    )
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        checkpoint_files.hashes_of({"a": file_state(file)})
    assert len(read) == 5


# -- images and prompts ------------------------------------------------------------------------------------------


def test_changed_images_do_not_return_old_scores(data, tmp_path):
    """A copy of POPE with noise in place of its images still scored 100.0, with no question asked."""
    run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
    Image.effect_noise((32, 32), 90).convert("RGB").save(data / "gqa" / "data" / "images" / "n3.jpg")
    model = FakeLlava()
    with pytest.raises(UserError, match=r"holds 6 answers to other images .* \(questions 1003, 1010, 1017, \.\.\.\)"):
        run(config(data, tmp_path / "o"), model, FakeReducer())
    # Questions about the other images are not touched by it.
    assert run(config(data, tmp_path / "o", limit=3), model, FakeReducer())["asked"] == 3
    assert model.asked == []


def test_a_image_is_hashed_as_it_was_read(tmp_path, monkeypatch):
    """It was opened first and hashed after: an answer could stand beside the hash of an image that was never asked."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    real = Folder.open

    def replaced(self, name):
        image = real(self, name)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
        return image

    folder = Folder(tmp_path)
    assert folder.read("a.png")[1] == folder.digest("a.png")
    monkeypatch.setattr(Folder, "open", replaced)
    with pytest.raises(UserError, match=r"a\.png"):
        folder.read("a.png")


def test_a_changed_prompt_is_seen(data, tmp_path):
    """The prompt is made by the benchmark's code, which no other setting covers."""
    run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())
    lines = lines_of(tmp_path / "o")
    lines[5]["prompt"] = "Is there a thing?"
    (tmp_path / "o" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"holds 1 answers to other prompts .* \(questions 1005\)"):
        run(config(data, tmp_path / "o"), FakeLlava(), FakeReducer())


# -- partial results -----------------------------------------------------------------------------------------------


def test_a_limit_after_a_full_run_leaves_the_complete_result_alone(data, tmp_path):
    """`--limit 50` overwrote result.json and the submission with 50 questions, and timed all of them."""
    output = tmp_path / "o"
    run(config(data, output), FakeLlava(), FakeReducer())
    before = {name: (output / name).read_bytes() for name in ("result.json", "predictions.json")}
    part = run(config(data, output, limit=10), FakeLlava(), FakeReducer())
    assert before == {name: (output / name).read_bytes() for name in before}
    assert json.loads((output / "limit10" / "result.json").read_text())["asked"] == 10
    assert len(json.loads((output / "limit10" / "predictions.json").read_text())) == 10
    assert part["timing"]["questions"] == 8, "the third batch holds questions 11 and 12 as well"
    whole = run(config(data, output, limit=40), FakeLlava(), FakeReducer())
    assert not whole["partial"] and whole["timing"]["questions"] == 40


def test_restart_moves_partial_results_and_submissions(data, tmp_path):
    output = tmp_path / "o"
    run(config(data, output), FakeLlava(), FakeReducer())
    run(config(data, output, limit=10), FakeLlava(), FakeReducer())
    (output / "mine.txt").write_text("not of a run")
    run(config(data, output, restart=True), FakeLlava(), FakeReducer())
    moved = {path.name for path in (output / "replaced-1").iterdir()}
    assert moved == {
        "result.json", "predictions.json", "limit10", "answers.jsonl", "timing.jsonl", "runs.jsonl", "settings.json"
    }  # fmt: skip
    left = {path.name for path in output.iterdir()}
    assert left == {
        "replaced-1", "mine.txt", "lock", "answers.jsonl", "timing.jsonl", "runs.jsonl", "settings.json",
        "result.json", "predictions.json",
    }  # fmt: skip


def test_a_limited_restart_moves_no_answers_that_it_does_not_give_again(data, tmp_path):
    """`--limit 40 --restart` moved 2,642 answers aside and asked 40."""
    output = tmp_path / "o"
    run(config(data, output, limit=10), FakeLlava(), FakeReducer())
    run(config(data, output, limit=10, restart=True), FakeLlava(), FakeReducer())
    assert (output / "replaced-1").is_dir(), "all of them are asked again"
    run(config(data, output), FakeLlava(), FakeReducer())
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    for limit, lost in ((10, 30), (39, 1)):
        with pytest.raises(
            UserError, match=rf"would move {lost} more answers in .* than the {limit} questions of --limit"
        ):
            run(config(data, output, limit=limit, restart=True), FakeLlava(), FakeReducer())
    assert before == {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    shard = output / "shards" / "a-rank0"
    shard.mkdir(parents=True)
    (output / "answers.jsonl").rename(shard / "answers.jsonl")  # as ranks leave them that were killed
    with pytest.raises(UserError, match="30 more answers"):
        run(config(data, output, limit=10, restart=True), FakeLlava(), FakeReducer())


# -- what the result says ------------------------------------------------------------------------------------------


def test_notes_of_the_loading_reach_the_result(data, tmp_path, capsys):
    """Sliding window, quantisation, missing temporal attention: the notes of the checkpoint were read by nobody."""
    model = FakeLlava()
    model.notes = ("The decoder's sliding window of 4 tokens is not applied.",)
    result = run(config(data, tmp_path / "o"), model, FakeReducer())
    assert result["remarks"][0] == model.notes[0]
    assert json.loads((tmp_path / "o" / "result.json").read_text())["remarks"] == result["remarks"]
    assert capsys.readouterr().out.count(model.notes[0]) == 1


def test_a_store_of_several_batch_sizes_says_so_in_half_precision(data, tmp_path):
    """Answers in bfloat16 depend on the batch size, and a store mixed them without a word."""
    for dtype, said in (("float32", False), ("bfloat16", True)):
        output = tmp_path / dtype
        run(config(data, output, limit=8, dtype=dtype), FakeLlava(), FakeReducer())
        equal = run(config(data, output, limit=10, dtype=dtype), FakeLlava(), FakeReducer())
        assert not equal["remarks"], "its last batch is smaller, as that of any run"
        grown = replace(config(data, output, dtype=dtype), batch_size=5)
        remarks = " ".join(run(grown, FakeLlava(), FakeReducer())["remarks"])
        assert ("4: 10 answers; 5: 30 answers" in remarks) is said


# -- litter --------------------------------------------------------------------------------------------------------


def test_temporary_files_of_killed_runs_are_removed(data, tmp_path):
    """`.predictions.json.PID` stayed behind for ever after a kill."""
    output = tmp_path / "o"
    run(config(data, output), FakeLlava(), FakeReducer())
    # The folder is locked, so whatever process has the number now, it does not write here.
    alive, dead = os.getppid(), 4194305
    names = (f".predictions.json.{dead}", f".answers.jsonl.{alive}", f"limit5/.result.json.{dead}")
    litter = [output / name for name in (*names, f"limit5/mme_results/.OCR.txt.{alive}")]
    # Not a temporary file, moved aside, or in the folder of another run.
    names = (".notes.txt", ".settings.1", "other/lock", f"other/.result.json.{dead}")
    kept = [output / name for name in names]
    for path in litter + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    run(config(data, output), FakeLlava(), FakeReducer())
    assert not any(path.exists() for path in litter) and all(path.exists() for path in kept)
