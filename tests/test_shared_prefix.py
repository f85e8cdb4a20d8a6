"""A batch whose common beginning runs once gives the logits, the account and the answers of a usual batch."""

from dataclasses import replace

import pytest
import torch

from llava.model.builder import load
from llava.pipeline import decoder
from llava.pipeline.faster import shared_prefix
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from tests.conftest import picture, samples
from tests.tiny_checkpoints_families import make_tiny_qwen, save_qwen_transformers

METHODS = ("full", "fastervlm", "consensusdrop", "divprune", "visiondrop")


@pytest.fixture
def sharing(tiny_path):
    model = load(tiny_path, device="cpu")
    model.shares_prefix = True
    return model


def about_few_images():
    """Six questions: three about one image, two about another, one without; prompts of different lengths."""
    batch = samples(6, text_only=(5,))
    pictures = [picture(0)] * 3 + [picture(1)] * 2 + [None]
    return [
        replace(one, image=image, image_ids=() if image is None else (str(i // 3),))
        for i, (one, image) in enumerate(zip(batch, pictures, strict=True))
    ]


def prefilled(model, reducer, batch):
    with torch.inference_mode():
        state, record = prefill(model, batch, reducer)
        first = model.logits(state.hidden)
        token = model.llm.embed_tokens(torch.full((len(batch), 1), 7))
        steps = [model.logits(decoder.step(model.llm, state, token)) for _ in range(3)]
    return torch.stack([first, *steps]), state, record


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_logits_and_account_are_those_of_whole_prompts(sharing, tiny, monkeypatch, name, attention):
    for model in (sharing, tiny):
        monkeypatch.setattr(model.llm.config, "_attn_implementation", attention)
    reducer = registry.build(name, tiny.visual_tokens if name == "full" else 6)
    found, state, record = prefilled(sharing, reducer, about_few_images())
    expected, whole, whole_record = prefilled(tiny, reducer, about_few_images())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert record.accounting(state) == whole_record.accounting(whole)
    assert record.operations.alone == whole_record.operations.alone
    assert state.lengths == whole.lengths


def test_answers_are_the_same(sharing, tiny):
    for name in METHODS:
        reducer = registry.build(name, tiny.visual_tokens if name == "full" else 6)
        found, expected = (generate(model, about_few_images(), reducer, 6).answers for model in (sharing, tiny))
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_positions_with_three_axes(tmp_path):
    save_qwen_transformers(tmp_path, make_tiny_qwen("2"))
    model, sharing = load(tmp_path, device="cpu"), load(tmp_path, device="cpu")
    sharing.shares_prefix = True
    for name in ("full", "divprune"):
        reducer = registry.build(name, model.visual_tokens if name == "full" else 8)
        found, expected = (prefilled(one, reducer, about_few_images())[0] for one in (sharing, model))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "rows"), [("full", 3), ("consensusdrop", 2), ("visiondrop", None)])
def test_each_beginning_runs_once(sharing, monkeypatch, name, rows):
    """Under full one per image, under a method the system prompt, each time beside the question without an image."""
    reducer = registry.build(name, sharing.visual_tokens if name == "full" else 6)
    real, seen = shared_prefix.decoder.prefill, []

    def counted(llm, sequence, *rest):
        seen.append(len(sequence.lengths))
        return real(llm, sequence, *rest)

    monkeypatch.setattr(decoder, "prefill", counted)
    prefilled(sharing, reducer, about_few_images())
    assert seen == [6 if rows is None else rows]
