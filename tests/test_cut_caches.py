"""Methods that remove dropped tokens from the caches of earlier layers, against caches that are cut by hand."""

import pytest
import torch

from baselines.clse import CLSE
from baselines.ivcprune import IVCPrune
from llava.pipeline import decoder
from llava.pipeline.generate import prefill
from llava.reduction.reducer import Reducer
from tests.conftest import samples
from tests.contract import label, standing

STEPS, TOKEN = 4, 7
METHODS = [CLSE(budget=8), IVCPrune(budget=12), IVCPrune(budget=12, official=True), IVCPrune(budget=13, layer=3)]


def whole(reducer: Reducer) -> Reducer:
    """The same method, but all caches stay as they are."""
    uncut = type("Uncut", (type(reducer),), {"cut_caches": Reducer.cut_caches})
    return uncut(**vars(reducer))


@torch.inference_mode()
def decoded(model, state) -> torch.Tensor:
    """[STEPS, B, D] hidden states of one token again and again."""
    token = model.llm.embed_tokens(torch.full((len(state.hidden), 1), TOKEN))
    return torch.stack([decoder.step(model.llm, state, token)[:, 0] for _ in range(STEPS)])


def cut_by_hand(model, reducer, sample):
    """One prompt's prefill with whole caches, of which each earlier layer then loses what is not left at the end."""
    state, record = prefill(model, [sample], whole(reducer))
    if not (steps := record.steps[0]):
        return state
    start = model.prompt(sample).ids.index(-200)
    left = standing(steps)[0]
    for stage in range(len(steps) + 1):
        (part,) = (one for one in state.segments if one.layers.start == (steps[stage - 1].layer if stage else 0))
        here = standing(steps[:stage])[0] if stage else torch.arange(16)
        text = range(start + len(here), part.lengths[0])
        columns = torch.tensor([*range(start), *(start + torch.isin(here, left).nonzero().flatten()).tolist(), *text])
        for index in part.layers:
            if index in reducer.cut_caches(steps[-1].layer):
                held = state.cache.layers[index]
                held.keys, held.values = held.keys[:, :, columns], held.values[:, :, columns]
    return state


@pytest.mark.parametrize("reducer", METHODS, ids=label)
def test_decoding_is_that_of_caches_cut_by_hand(tiny, reducer):
    """Padded prompts in a batch, one of them without an image, and prompts of different images."""
    batch = samples(5)
    state, record = prefill(tiny, batch, reducer)
    sizes = [(one.keys.nbytes + one.values.nbytes) // one.keys.shape[2] // len(batch) for one in state.cache.layers]
    ours = decoded(tiny, state)
    uncut, counted = prefill(tiny, batch, whole(reducer))
    for row, sample in enumerate(batch):
        alone = cut_by_hand(tiny, reducer, sample)
        lengths = [one.keys.shape[2] for one in alone.cache.layers]
        assert state.kv_bytes[row] == sum(size * length for size, length in zip(sizes, lengths, strict=True))
        torch.testing.assert_close(ours[:, row], decoded(tiny, alone)[:, 0], atol=1e-5, rtol=0)
        if sample.image is not None:
            assert state.kv_bytes[row] < uncut.kv_bytes[row]
    assert state.kv_bytes_held < uncut.kv_bytes_held
    # What entered the layers is not changed, nor the first token.
    assert [one.tokens_per_layer for one in record.accounting(state)] == [
        one.tokens_per_layer for one in counted.accounting(uncut)
    ]
    assert torch.equal(state.hidden, uncut.hidden)
    assert (ours - decoded(tiny, uncut)).abs().max() > 1e-3


def test_only_the_named_layers_are_cut(tiny):
    """IVC-Prune leaves layer 0 whole; CLSE cuts every layer to what its last stage kept."""
    batch = samples(1)
    for reducer, cut in ((IVCPrune(budget=12), [False, True]), (CLSE(budget=8), [True, True, True])):
        state, _ = prefill(tiny, batch, reducer)
        lengths = [one.keys.shape[2] for one in state.cache.layers]
        shortest = state.lengths[-1][0]
        assert [length == shortest for length in lengths[: len(cut)]] == cut
        assert lengths[0] == (state.lengths[0][0] if not cut[0] else shortest)
