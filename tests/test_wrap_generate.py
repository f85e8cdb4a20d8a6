"""The options of `generate` work on reduced prompts, and the model is restored after the block."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from llava import reduce
from llava.errors import UserError
from llava.hf.cache import ReducedCache
from tests.conftest import picture
from tests.stock_inputs import FAMILIES, TEXTS, stock


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return stock(request.param)


@pytest.fixture(scope="module")
def llava():
    return stock("llava")


def method(case) -> str:
    return "divprune" if "Qwen" in type(case.model).__name__ else "visiondrop"


def beams(case, inputs, **options):
    return case.model.generate(
        **inputs,
        **{"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False, **options},
        return_dict_in_generate=True,
        output_scores=True,
    )


def test_beams_at_full_budget_are_the_models_own(case):
    inputs = case.batch()
    plain = beams(case, inputs)
    with reduce(case.model, "full") as reduced:
        ours = beams(case, inputs)
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(ours.sequences_scores, plain.sequences_scores, atol=2e-4, rtol=0)
    assert len(reduced.accounting) == 4  # one per prompt, not per beam


def test_the_score_of_a_beam_is_that_of_its_tokens(case):
    """Each beam of a reduced, padded batch, fed again token by token from a fresh prefill."""
    inputs = case.batch()
    with torch.no_grad(), reduce(case.model, method(case), budget=6):
        found = beams(case, inputs, num_return_sequences=2, min_new_tokens=None, eos_token_id=None)
        new = found.sequences[:, inputs["input_ids"].shape[1] :]
        for nth in range(2):
            out, total = case.model(**inputs), torch.zeros(4)
            for token in new[nth::2].unbind(1):
                scores = out.logits[:, -1].float().log_softmax(-1)
                total += scores.gather(1, token[:, None])[:, 0]
                out = case.model(input_ids=token[:, None], past_key_values=out.past_key_values)
            torch.testing.assert_close(total / new.shape[1], found.sequences_scores[nth::2], atol=2e-4, rtol=0)
    assert not torch.equal(new[0::2], new[1::2])


def test_sampling_draws_what_the_model_draws(case):
    """Several answers per prompt: each picture stays with its prompt when rows are repeated."""
    inputs, drawn = case.batch(), []
    for budget in (None, "full"):
        torch.manual_seed(3)
        options = {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}
        if budget is None:
            drawn.append(case.generate(inputs, **options))
        else:
            with reduce(case.model, "full"):
                drawn.append(case.generate(inputs, **options))
    assert torch.equal(*drawn) and len(drawn[0]) == 12
    assert len({tuple(row) for row in drawn[0].tolist()}) > 4


def test_prompts_without_pictures_go_to_the_models_own_forward(case):
    inputs = case.prepare(TEXTS[2:3], [])
    plain, logits, found = case.generate(inputs), case.model(**inputs).logits, beams(case, inputs).sequences
    with reduce(case.model, method(case), budget=6) as reduced:
        assert torch.equal(case.generate(inputs), plain)
        assert torch.equal(case.model(**inputs).logits, logits) and logits.shape[1] > 1
        assert torch.equal(beams(case, inputs).sequences, found)
        assert reduced.accounting == []


def test_the_model_is_what_it_was(case):
    inputs = case.batch()
    plain = case.generate(inputs)
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    before = [dict(vars(module)) for module in case.model.modules()]
    for fails in (False, True):
        try:
            with reduce(case.model, method(case), budget=6):
                case.generate(case.batch(TEXTS[1:2]))
                if fails:
                    raise RuntimeError("inside")
        except RuntimeError as error:
            assert fails and str(error) == "inside"
        for module, own in zip(case.model.modules(), before, strict=True):
            assert vars(module).keys() == own.keys()
            assert all(vars(module)[name] is value for name, value in own.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.model.state_dict().items())
    assert torch.equal(case.generate(inputs), plain)


def test_a_forward_that_was_replaced_before_comes_back(llava):
    inputs, calls = llava.batch(TEXTS[1:2]), []
    original = llava.model.forward

    @functools.wraps(original)
    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    llava.model.forward = counted
    try:
        with reduce(llava.model, "visiondrop", budget=6):
            llava.generate(inputs)
        assert llava.model.forward is counted and not calls
    finally:
        del llava.model.forward


def test_streamers_and_logits_processors(llava):
    inputs, heard = llava.batch(TEXTS[1:2]), []

    class Streamer(BaseStreamer):
        def put(self, value):
            heard.extend(value.flatten().tolist())

        def end(self):
            heard.append("end")

    class Never(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, banned] = -float("inf")
            return scores

    with reduce(llava.model, "visiondrop", budget=6):
        ids = llava.generate(inputs, streamer=Streamer())[0].tolist()
        assert heard[inputs["input_ids"].shape[1] :] == [*ids, "end"]
        banned = ids[2]
        others = llava.generate(inputs, logits_processor=LogitsProcessorList([Never()]))[0].tolist()
    assert banned not in others and others[:2] == ids[:2]


def test_logits_may_be_changed_in_place_and_outputs_may_be_tuples(llava):
    inputs = llava.batch()
    with reduce(llava.model, "visiondrop", budget=6):
        out = llava.model(**inputs)
        kept = out.logits.clone()
        out.logits[:, :, 3] = 0  # not possible for tensors of inference mode
        logits, cache = llava.model(**inputs, return_dict=False)
        again = llava.model(inputs.pop("input_ids"), **inputs)  # by place
        assert torch.equal(logits, kept) and torch.equal(again.logits, kept)
        assert isinstance(cache, ReducedCache) and kept.shape == (
            4,
            1,
            llava.model.config.text_config.vocab_size,
        )


# The cache


def prefilled(llava, **options):
    with reduce(llava.model, "visiondrop", budget=6):
        return llava.model(**llava.batch(), **options)


def step(llava, cache, tokens):
    with reduce(llava.model, "visiondrop", budget=6):
        return llava.model(input_ids=torch.tensor(tokens)[:, None], past_key_values=cache).logits


def test_an_empty_cache_of_the_caller_is_filled(llava):
    mine = DynamicCache()
    out = prefilled(llava, past_key_values=mine)
    assert out.past_key_values is mine
    expected = step(llava, prefilled(llava).past_key_values, [5, 6, 7, 8])
    assert torch.equal(step(llava, mine, [5, 6, 7, 8]), expected)
    mine.reset()
    assert torch.equal(prefilled(llava, past_key_values=mine).logits, out.logits)


def test_rows_move_with_their_masks_and_positions(llava):
    """Rows of different lengths: what is fed to a row gives the same wherever it stands."""
    cache = prefilled(llava).past_key_values
    expected = step(llava, copy.deepcopy(cache), [5, 6, 7, 8])
    order = torch.tensor([3, 1, 0, 2])
    for change in ("reorder_cache", "batch_select_indices"):
        moved = copy.deepcopy(cache)
        getattr(moved, change)(order)
        # A kernel may sum in another order when rows lie elsewhere in memory; another row differs by far more.
        torch.testing.assert_close(step(llava, moved, [8, 6, 5, 7]), expected[order], atol=1e-5, rtol=0)
        # Layers of equal length still share their tensors, so that a step makes each mask once.
        assert len({id(rows) for rows in moved.next_position}) == len({id(rows) for rows in cache.next_position})
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(step(llava, cache, [5, 5, 6, 6, 7, 7, 8, 8])[1::2], expected, atol=2e-4, rtol=0)


def test_a_cropped_cache_has_forgotten(llava):
    cache = prefilled(llava).past_key_values
    expected = step(llava, copy.deepcopy(cache), [5, 6, 7, 8])
    step(llava, cache, [9, 9, 9, 9])
    step(llava, cache, [9, 8, 7, 6])
    cache.crop(-2)
    assert torch.equal(step(llava, cache, [5, 6, 7, 8]), expected)


def test_a_reduced_cache_is_refused_outside(llava):
    cache = prefilled(llava).past_key_values
    with pytest.raises(UserError, match="inside the `with reduce"):
        llava.model(input_ids=torch.tensor([[5], [6], [7], [8]]), past_key_values=cache)


def test_beams_and_one_picture_for_two_prompts(llava):
    """Rows are repeated behind the prefill: the tower sees each picture once."""
    seen, inputs = [], llava.prepare(TEXTS[1:2] * 2, [picture(0), picture(0)])
    handle = llava.model.model.vision_tower.embeddings.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    with reduce(llava.model, "visiondrop", budget=6):
        rows = llava.generate(inputs, num_beams=4)
    handle.remove()
    assert seen == [2] and torch.equal(rows[0], rows[1])
