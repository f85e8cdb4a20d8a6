"""The staged forward against the transformers class, and batches against single samples."""

from dataclasses import dataclass, replace

import pytest
import torch

from baselines.controls import Full
from llava.errors import UserError
from llava.pipeline.generate import generate, prefill
from llava.processing.prompt import IMAGE_TOKEN_INDEX
from llava.reduction import Reduction, keep_top
from llava.reduction.reducer import DecoderState, Reducer
from tests.conftest import samples

FULL = Full(budget=16)


@dataclass(frozen=True, kw_only=True)
class EveryOther(Reducer):
    """A test method that halves the visual tokens in front of two layers."""

    layers: tuple = (1, 3)

    def check(self, spec) -> None:
        pass

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return self.layers

    def decoder(self, state: DecoderState) -> Reduction:
        total = state.tokens.shape[1]
        return Reduction(keep_top(state.tokens.float().norm(dim=-1), max(1, total // 2)), total)


def logits(model, batch, reducer):
    """First-token logits, per sample."""
    state, record = prefill(model, batch, reducer)
    return model.logits(state.hidden), state, record


def transformers_inputs(model, sample):
    ids = list(model.prompt(sample).ids)
    if IMAGE_TOKEN_INDEX not in ids:
        return {"input_ids": torch.tensor([ids])}
    slot = ids.index(IMAGE_TOKEN_INDEX)
    ids[slot : slot + 1] = [model.hf_model.config.image_token_index] * model.visual_tokens
    return {"input_ids": torch.tensor([ids]), "pixel_values": model.image_processor(sample.image)[None]}


@pytest.mark.parametrize("index", range(5))
def test_full_tokens_equal_the_transformers_class(tiny, index):
    sample = samples()[index]
    ours, _, _ = logits(tiny, [sample], FULL)
    inputs = transformers_inputs(tiny, sample)
    with torch.inference_mode():
        theirs = tiny.hf_model(**inputs).logits[:, -1, : tiny.vocabulary]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        # An explicit mask: transformers would take every <unk> of the prompt for padding.
        generated = tiny.hf_model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(tiny.vocabulary, tiny.head.out_features)),
        )
    new = generated[0, inputs["input_ids"].shape[1] :].tolist()
    until_end = new[: next((i for i, token in enumerate(new) if token in tiny.end_ids), len(new))]
    assert list(generate(tiny, [sample], FULL, max_new_tokens=12).answers[0].token_ids) == until_end


@pytest.mark.parametrize("reducer", [FULL, EveryOther(budget=16), EveryOther(budget=16, positions="original")])
def test_batch_equals_single(tiny, reducer):
    """Different prompts, images and a text-only prompt in one batch, left-padded."""
    batch = samples()
    together, state, record = logits(tiny, batch, reducer)
    accounts = record.accounting(state)
    answers = generate(tiny, batch, reducer, max_new_tokens=8).answers
    for i, sample in enumerate(batch):
        alone, single, single_record = logits(tiny, [sample], reducer)
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=0)
        assert single_record.accounting(single) == [accounts[i]]
        # One sample without padding: the account equals the tensors' own size.
        assert accounts[i].kv_bytes == single.kv_bytes_held
        for ours, theirs in zip(record.steps[i], single_record.steps[0], strict=True):
            assert ours.place == theirs.place
            assert ours.reduction.kept.tolist() == theirs.reduction.kept.tolist()
        assert generate(tiny, [sample], reducer, max_new_tokens=8).answers[0].token_ids == answers[i].token_ids


@pytest.mark.parametrize("positions", ["original", "renumber"])
def test_decoding_after_reduction_equals_one_long_prefill(tiny, positions):
    """Cached decoding against a prompt that already contains the tokens generated so far.

    With renumbered positions a new token has another position id in front of a stage than behind it, as in the releases
    of PyramidDrop and SparseVLM.
    """
    sample, reducer = samples(1)[0], EveryOther(budget=16, positions=positions)
    answer = generate(tiny, [sample], reducer, max_new_tokens=6).answers[0]

    class Longer:
        """The same model, whose prompt ends in the first tokens of the answer."""

        def __init__(self, extra):
            self.extra = extra

        def __getattr__(self, name):
            return getattr(tiny, name)

        def prompt(self, one):
            base = tiny.prompt(one)
            return replace(base, ids=(*base.ids, *self.extra))

    for length in range(1, len(answer.token_ids)):
        predicted, _, _ = logits(Longer(answer.token_ids[:length]), [sample], reducer)
        assert predicted.argmax(-1).item() == answer.token_ids[length]


def test_stop_string_ends_the_answer(tiny, monkeypatch):
    """A stop string that is not the end token is searched in the decoded text and cut off."""
    sample = samples(1)[0]
    plain = generate(tiny, [sample], FULL, max_new_tokens=8).answers[0]
    words = plain.text.split()
    assert len(words) > 3
    monkeypatch.setattr(tiny, "stop", words[2])
    stopped = generate(tiny, [sample], FULL, max_new_tokens=8).answers[0]
    assert stopped.text.split() == words[:2]
    assert len(stopped.token_ids) < len(plain.token_ids)


def test_nothing_to_do_is_an_error(tiny):
    for asked, words in (([], 4), (samples(1), 0)):
        with pytest.raises(UserError):
            generate(tiny, asked, FULL, max_new_tokens=words)
