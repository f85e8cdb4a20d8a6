"""Questions that cannot be answered: they are recorded with the reason, the rest goes on, and the result says so."""

import errno
import json
import os
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import __main__ as command
from eval import ask as asking
from eval import run as job
from eval.ask import ERRORS_IN_A_ROW, BatchLimit, Failure, LoadedQuestion, Progress, ReadAhead, ask, outcomes
from eval.benchmarks.media import Folder
from eval.config import RunConfig
from eval.parallel.ranks import Rank
from eval.run import run
from eval.tracking import Tracker
from llava.errors import UserError, is_out_of_memory, release_memory
from llava.processing.prompt import Sample
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa


@pytest.fixture
def data(tmp_path):
    return write_gqa(tmp_path / "data")


def config(tmp_path, data, **more) -> RunConfig:
    return RunConfig("first", 16, data=data, output=tmp_path / "o", wandb="disabled", **more)


class Picky(FakeLlava):
    """Cannot answer some questions, alone or in a batch."""

    def __init__(self, *names: str, error: Exception | None = None):
        super().__init__()
        self.names, self.error = names, error or RuntimeError("no such colour")

    def answer(self, samples, reducer, max_new_tokens=128):
        if any(sample.id in self.names for sample in samples):
            raise self.error
        return super().answer(samples, reducer, max_new_tokens)


CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has")
# As they come; of those without a class of their own the text is all there is.
OUT_OF_MEMORY = [
    CUDA_FULL,
    torch.OutOfMemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable"),
    RuntimeError("HIP out of memory. Tried to allocate 9.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1 MB, max allowed: 18.1 GB)"),
    RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("unable to mmap 500 bytes from file <x>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
NOT_OF_MEMORY = [
    RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    RuntimeError("Expected all tensors to be on the same device"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyError("out of memory"),
    UserError("The question asks about out of memory errors."),
]


class Small(FakeLlava):
    """Has memory for a few questions at once."""

    def __init__(self, room: int, error: Exception = CUDA_FULL):
        super().__init__()
        self.room, self.error, self.tried = room, error, []

    def answer(self, samples, reducer, max_new_tokens=128):
        self.tried.append(len(samples))
        if len(samples) > self.room:
            raise self.error
        return super().answer(samples, reducer, max_new_tokens)


def answers(tmp_path) -> dict[str, dict]:
    lines = (tmp_path / "o" / "answers.jsonl").read_text().splitlines()
    return {line["question_id"]: line for line in map(json.loads, lines)}


def failures(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "o" / "failures.jsonl").read_text().splitlines()]


def test_one_question_that_fails_leaves_the_others_alone(tmp_path, data, capsys):
    """An exception in one question ended the whole run."""
    result = run(config(tmp_path, data), Picky("1003", "1017"), FakeReducer())
    assert len(answers(tmp_path)) == 38 and result["asked"] == 38 and result["available"] == 40
    assert [(line["question_id"], line["kind"], line["reason"]) for line in failures(tmp_path)] == [
        ("1003", "error", "RuntimeError: no such colour"),
        ("1017", "error", "RuntimeError: no such colour"),
    ]
    assert [line["question_id"] for line in result["failed"]] == ["1003", "1017"]
    assert "on 38 GQA testdev questions (2 more failed)" in result["sentence"]
    out = capsys.readouterr().out
    assert "failed: question 1003: RuntimeError: no such colour" in out
    assert "2 questions have no answer; --retry-failed asks them again." in out
    disturbed = answers(tmp_path)
    run(config(tmp_path, data, restart=True), Picky(), FakeReducer())
    assert disturbed == {name: line for name, line in answers(tmp_path).items() if name not in ("1003", "1017")}


def test_a_corrupt_image_fails_its_own_questions_only(tmp_path, data):
    image = data / "gqa" / "data" / "images" / "n3.jpg"
    image.write_bytes(image.read_bytes()[:100])
    result = run(config(tmp_path, data), FakeLlava(), FakeReducer())
    lost = {line["question_id"] for line in failures(tmp_path)}
    # Every seventh question asks about the fourth image.
    assert lost == {str(1000 + number) for number in range(3, 40, 7)} and result["asked"] == 40 - len(lost)
    assert {line["kind"] for line in failures(tmp_path)} == {"image"}
    assert all("n3.jpg" in line["reason"] for line in failures(tmp_path))


@pytest.mark.parametrize(
    ("size", "room", "parts"), [(2, 9, [2, 2, 1]), (None, 9, [5]), (None, 2, [2, 2, 1]), (4, 1, [1] * 5)]
)
def test_of_a_batch_that_is_asked_in_parts_no_question_is_left_over(size, room, parts, monkeypatch):
    """A batch goes to the model in parts of at most what fits; each question has one answer, in order."""
    model = Small(room)

    def generate(model, samples, reducer, **options):
        return model.answer(samples, reducer)

    monkeypatch.setattr(asking, "generate", generate)
    ready = [LoadedQuestion(None, Sample(f"q{number}", "?"), "") for number in range(5)]
    lost = Failure("lost", "image", UserError("no image"))
    limit = BatchLimit(size)
    running = SimpleNamespace(model=model, reducer=FakeReducer(), max_new_tokens=4)
    failed, *answered = outcomes(running, [*ready[:2], lost, *ready[2:]], limit)
    assert failed is lost and [len(one.parts) for one in answered] == parts
    assert [part.sample.id for one in answered for part in one.parts] == [f"q{number}" for number in range(5)]
    assert [answer.id for one in answered for answer in one.batch.answers] == [f"q{number}" for number in range(5)]


def test_retrying_asks_no_other_question(tmp_path, data):
    run(config(tmp_path, data, limit=8), Picky("1003"), FakeReducer())
    model = Picky()
    with pytest.raises(UserError, match="32 of 40 questions"):
        run(config(tmp_path, data, failed="only"), model, FakeReducer())
    assert model.asked == ["1003"] and len(answers(tmp_path)) == 8


def test_a_model_that_fails_every_time_ends_the_run(tmp_path, data):
    """A bug or a lost accelerator must not become thousands of failed questions."""
    model = Picky(*(str(number) for number in range(1008, 1040)))
    with pytest.raises(RuntimeError, match="no such colour"):
        run(config(tmp_path, data), model, FakeReducer())
    assert len(answers(tmp_path)) == 8 and not (tmp_path / "o" / "failures.jsonl").exists()
    assert not (tmp_path / "o" / "result.json").exists()
    result = run(config(tmp_path, data), Picky(), FakeReducer())
    assert result["asked"] == 40 and result["failed"] == []


def test_a_run_without_any_answer_ends_with_its_error(tmp_path, data):
    assert ERRORS_IN_A_ROW > 8
    with pytest.raises(ValueError, match="nothing works"):
        model = Picky(*map(str, range(1000, 1008)), error=ValueError("nothing works"))
        run(config(tmp_path, data, limit=8), model, FakeReducer())


def test_every_image_unreadable_is_a_sentence(tmp_path, data):
    for image in (data / "gqa" / "data" / "images").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"All 40 questions failed, .*--retry-failed"):
        run(config(tmp_path, data), FakeLlava(), FakeReducer())


@pytest.mark.parametrize("room", [1, 3, 5])
def test_a_batch_that_does_not_fit_into_memory_is_divided(tmp_path, data, room):
    """A batch that was too large ended the run."""
    result = run(config(tmp_path, data), Small(room), FakeReducer())
    assert result["asked"] == 40 and result["failed"] == []
    notes = [remark for remark in result["remarks"] if "did not fit" in remark]
    sizes = {1: [8, 4, 2], 3: [8, 4], 5: [8]}[room]
    assert notes == [
        f"A batch of {size} questions did not fit into memory; smaller ones were asked from there on." for size in sizes
    ]
    lines = [json.loads(line) for line in (tmp_path / "o" / "timing.jsonl").read_text().splitlines()]
    assert max(line["questions"] for line in lines) <= room and sum(line["questions"] for line in lines) == 40


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_every_kind_of_full_memory_makes_later_batches_smaller(tmp_path, data, error):
    """Only torch's own exception did: with cuBLAS's, every batch failed first and was asked again one by one."""
    model = Small(5, error)
    result = run(config(tmp_path, data), model, FakeReducer())
    assert result["asked"] == 40 and result["failed"] == []
    assert [size for size in model.tried if size > 5] == [8] and max(model.tried[1:]) == 4
    assert [note for note in result["remarks"] if "batch of 8 questions" in note]


@pytest.mark.parametrize("error", NOT_OF_MEMORY, ids=repr)
def test_other_errors_are_not_taken_for_full_memory(tmp_path, data, error):
    """A failed assertion on the device must not pass for a batch that was too large."""
    assert not is_out_of_memory(error)
    result = run(config(tmp_path, data), Picky("1009", error=error), FakeReducer())
    (line,) = failures(tmp_path)
    assert line["question_id"] == "1009" and line["kind"] == "error" and result["asked"] == 39
    assert not any("did not fit" in remark for remark in result["remarks"])


@pytest.mark.parametrize("ask_for", [lambda: torch.empty(2**50, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8)])
def test_what_this_machine_says_when_its_memory_is_full(ask_for):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask_for()
    assert is_out_of_memory(caught.value)


def test_a_batch_that_did_not_fit_leaves_no_tensor_behind():
    """The frames of the error held the tensors; those of the error in whose handling it was raised still did."""
    held = []

    def full(message: str) -> None:
        tensor = torch.zeros(1)
        tensor.cycle = SimpleNamespace(tensor=tensor)
        held.append(weakref.ref(tensor))
        raise RuntimeError(message)

    try:
        try:
            full("no kernel")
        except RuntimeError:
            full("CUDA out of memory")
    except RuntimeError as raised:
        error = raised
    assert all(one() is not None for one in held)
    release_memory(error)
    assert all(one() is None for one in held)


def test_an_image_that_does_not_fit_into_memory_is_not_called_unreadable(tmp_path, data, monkeypatch):
    """It was recorded as a damaged file."""

    def full(folder, name):
        raise MemoryError

    monkeypatch.setattr(Folder, "open", full)
    with pytest.raises(MemoryError):
        run(config(tmp_path, data, limit=3), FakeLlava(), FakeReducer())
    assert not (tmp_path / "o" / "failures.jsonl").exists()


def test_ranks_that_hold_one_model_say_that_a_smaller_batch_may_fit(tmp_path, data):
    """They cannot divide a batch, and the error did not say what to do."""
    one = job.prepare(config(tmp_path, data, limit=4), Small(2), FakeReducer())
    with ReadAhead(one) as images:
        (batch,) = (batch for _, batch in images.batches(iter([one.planned])))
        with pytest.raises(UserError, match="--batch-size"):
            list(outcomes(one, batch, BatchLimit(), divide=False))


def test_a_single_question_that_does_not_fit_fails(tmp_path, data):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
    result = run(config(tmp_path, data), Picky("1009", error=full), FakeReducer())
    (line,) = failures(tmp_path)
    assert line["question_id"] == "1009" and line["kind"] == "memory" and "9.00 GiB" in line["reason"]
    assert result["asked"] == 39


def test_exit_code_and_summary_say_that_questions_failed(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(job, "load_model", lambda config: Picky("1003"))
    words = ["--method", "uniform", "--budget", "16", "--data", str(data), "--output", str(tmp_path / "o")]
    assert command.main([*words, "--wandb", "disabled"]) == command.SOME_FAILED == 3
    assert "1 questions have no answer" in capsys.readouterr().out
    monkeypatch.setattr(job, "load_model", lambda config: Picky())
    assert command.main([*words, "--wandb", "disabled", "--retry-failed"]) == 0
    assert os.path.getsize(tmp_path / "o" / "result.json") > 0


def test_a_rank_whose_questions_all_fail_leaves_the_others_alone(tmp_path, data):
    """With few batches, the rank that failed first ended the run of the others."""

    class Shared:
        """Another rank of two: nobody has answered yet."""

        def count(self, key: str, amount: int = 1) -> int:
            claimed.append(key)
            return 1 if key == "batches" and claimed.count(key) == 1 else 99 if key == "batches" else 0

        def put(self, key, value):
            pass

        def peek(self, key):
            return None

    claimed: list[str] = []
    rank = Rank(number=1, world=2, name="w", control=Shared())
    one = job.prepare(config(tmp_path, data, limit=4), Picky(*map(str, range(1000, 1004))), FakeReducer())
    lines: list[dict] = []
    sink = SimpleNamespace(add=pytest.fail, fail=lines.extend)
    ask(one, sink, one.planned, Progress(one, rank, Tracker(), [], 0), rank)
    assert [line["question_id"] for line in lines] == ["1000", "1001", "1002", "1003"]
