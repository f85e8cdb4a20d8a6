"""Weights with NaN or infinity end the run; they gave 0.0 % and exit code 0."""

import json

import pytest
import torch

from eval import ask
from eval.config import RunConfig
from eval.run import run
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.reduction import registry
from tests.conftest import samples
from tests.eval_fakes import write_gqa

# One value in each part that an answer about a picture goes through. None in a query projection: with few
# tokens, the attention kernel for the CPU turns NaN scores into finite values.
PARTS = {
    "decoder": lambda model: model.llm.layers[1].mlp.up_proj.weight,
    "tower": lambda model: model.tower.encoder.layers[0].mlp.fc1.weight,
    "projector": lambda model: next(model.projector.parameters()),
    "head": lambda model: model.head.weight,
}


@pytest.fixture
def own(tiny_path):
    """A tiny model that a test may break."""
    return load(tiny_path, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", PARTS)
def test_one_value_that_is_not_finite_ends_the_batch(own, part, value):
    with torch.no_grad():
        PARTS[part](own).view(-1)[0] = value
    with pytest.raises(UserError, match=r"The logits for question q\d are not finite: the weights .* of tiny-llava"):
        generate(own, samples(2, text_only=()), registry.build("full", own.visual_tokens), max_new_tokens=2)


@pytest.mark.parametrize("name", registry.names())
def test_no_method_hides_a_broken_tower(own, name):
    """A method ranks NaN somehow; its own functions must not end in a traceback, nor the answer look like one."""
    with torch.no_grad():
        PARTS["tower"](own)[0] = float("nan")
    reducer = registry.build(name, own.visual_tokens if name == "full" else 8)
    # Where a method chooses a token twice because of it, that is refused first, with the same cause.
    with pytest.raises(UserError, match="are not finite"):
        generate(own, samples(2, text_only=()), reducer, max_new_tokens=2)


def test_what_breaks_after_the_first_token_is_found_too(own, monkeypatch):
    """Only the prefill was sound."""
    real, calls = own.logits, []

    def logits(hidden):
        calls.append(1)
        return real(hidden) if len(calls) < 3 else real(hidden).fill_(float("nan"))

    monkeypatch.setattr(own, "logits", logits)
    monkeypatch.setattr(own, "end_ids", frozenset(), raising=False)
    with pytest.raises(UserError, match="not finite"):
        generate(own, samples(1), registry.build("full", own.visual_tokens), max_new_tokens=8)
    assert len(calls) == 3


def test_a_finished_sample_is_not_checked(own, monkeypatch):
    """What a sample computes after its end is thrown away."""
    real = own.logits
    end = next(iter(own.end_ids))
    calls = []

    def logits(hidden):
        found = real(hidden).clone()
        found[0] = float("nan") if calls else 0.0
        if not calls:
            found[0, end] = 1.0
        found[1, end] = found[1].min() - 1
        calls.append(1)
        return found

    monkeypatch.setattr(own, "logits", logits)
    batch = generate(own, samples(2, text_only=()), registry.build("full", own.visual_tokens), max_new_tokens=4)
    assert batch.answers[0].token_ids == () and len(batch.answers[1].token_ids) == 4


def test_a_run_ends_with_a_sentence_and_keeps_what_was_sound(own, tmp_path, monkeypatch):
    data = write_gqa(tmp_path / "data")
    config = RunConfig(
        "full", data=data, output=tmp_path / "o", limit=24, batch_size=4, max_new_tokens=2, wandb="disabled"
    )
    real = ask.generate

    def answer(*arguments, **named):
        batch = real(*arguments, **named)
        with torch.no_grad():
            own.head.weight[0] = float("nan")
        return batch

    monkeypatch.setattr(ask, "generate", answer)
    with pytest.raises(UserError, match="The logits for question 1004 are not finite"):
        run(config, own)
    lines = (tmp_path / "o" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == ["1000", "1001", "1002", "1003"]
    assert not list((tmp_path / "o").rglob("result.json"))
