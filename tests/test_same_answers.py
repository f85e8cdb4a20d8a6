"""Answer files do not depend on how many questions are asked at once: equal, byte for byte."""

import pytest

from eval.config import DEFAULT_DATA, DEFAULT_MODEL, RunConfig
from eval.run import run
from llava.model.builder import load

QUESTIONS = 24


@pytest.fixture(scope="module")
def toy():
    return load(DEFAULT_MODEL)


# Merging before layer 0; before the projector and between layers; before the projector alone; between layers alone.
@pytest.mark.parametrize("method", ["consensusdrop", "visiondrop", "attnmix", "fastv"])
def test_answers_are_the_same_bytes_at_every_batch_size(method, toy, tmp_path):
    files = []
    for size in (1, 5, QUESTIONS):
        output = tmp_path / str(size)
        common = {"data": DEFAULT_DATA, "limit": QUESTIONS, "output": output, "wandb": "disabled"}
        run(RunConfig(method, 128, model=DEFAULT_MODEL, batch_size=size, **common), toy)
        files.append((output / "answers.jsonl").read_bytes())
    assert files[0] == files[1] == files[2] and files[0].count(b"\n") == QUESTIONS
