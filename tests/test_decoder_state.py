"""What a method may read between decoder layers, each against a slow computation from the model's own modules."""

import pytest
import torch

from baselines.fastv import FastV
from llava.model.builder import load
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import prefill, until_decoder
from llava.processing.prompt import Sample
from llava.reduction import Reduction, TowerScore, registry
from llava.reduction.scores import TOWER_SCORES, clip_attention
from tests.conftest import QUESTIONS, drawn_image, samples
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers

SCORE = TowerScore("cls_attention")


@pytest.fixture
def states(monkeypatch) -> list:
    """Every state that FastV is given, with what it can ask for only at that moment; it asks for a tower score here."""
    seen, decoder = [], FastV.decoder

    def look(self, state):
        seen.append((state, state.members(), state.tower(SCORE), state.values()))
        return decoder(self, state)

    monkeypatch.setattr(FastV, "scores", lambda self: (SCORE,))
    monkeypatch.setattr(FastV, "decoder", look)
    return seen


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """A LLaVA-NeXT that unpads, and two images whose tiles differ in shape."""
    path = tmp_path_factory.mktemp("tiled")
    save_next_transformers(path, make_tiny_next("mistral"))
    sizes = ((112, 112), (70, 112))
    return load(path, device="cpu"), [Sample(f"q{i}", QUESTIONS[i], image=drawn_image(i, sizes[i])) for i in (0, 1)]


@pytest.fixture(params=["one tile", "tiles"])
def model_and_batch(request, tiny, tiled):
    return (tiny, samples(2)) if request.param == "one tile" else tiled


@torch.inference_mode()
@pytest.mark.parametrize("name", ["fastv", "divprune+fastv"])
def test_where_the_tokens_come_from(name, model_and_batch, states):
    """Members, layouts and tower scores, with and without a reduction before the decoder."""
    model, batch = model_and_batch
    budget = model.spec.visual_tokens // 2
    prefill(model, batch, registry.build(name, budget))
    whole = until_decoder(model, batch, registry.build("full", budget), Timer(model.device)).start
    assert states
    for state, members, scores, _ in states:
        for row, (sample, layout) in enumerate(zip(state.ids, state.layouts, strict=True)):
            number = [one.id for one in batch].index(sample)
            pixels, full = model.views(batch[number].image)
            assert layout is full and len(members[row]) == state.tokens.shape[1] < full.tokens + (name == "fastv")
            # Every token entered layer 0 with the embedding that it has without any reduction.
            own, start = whole.padding(number), whole.visual[number][0][0]
            expected = whole.hidden[number, own + start + members[row]]
            entered = state.start.take(state.start.hidden, state.start.images)[row]
            torch.testing.assert_close(entered, expected, atol=1e-5, rtol=0)
            # Its tower score is that of the patch at its tile, row and column.
            hidden = model.tower(pixels, output_hidden_states=True).hidden_states[-3]
            block = model.tower.encoder.layers[-2]
            score = TOWER_SCORES[SCORE.kind].compute(clip_attention(block.self_attn, block.layer_norm1(hidden)))
            places, found = full.origins()[members[row]], scores[row]
            for (tile, down, across), value in zip(places.tolist(), found.tolist(), strict=True):
                patch = 0 if tile < 0 else score[tile, down * full.grid[1] + across].item()
                assert value == pytest.approx(patch, abs=1e-6)


@torch.inference_mode()
def test_values_and_attention_of_the_layer_before(model_and_batch, states):
    """Both are those of the inputs that the layer had; without rotation, queries meet keys as they were projected."""
    model, batch = model_and_batch
    prefill(model, batch, registry.build("fastv", model.spec.visual_tokens // 2))
    for state, _, _, values in states:
        layer = model.llm.layers[state.layer - 1]
        normed, heads = layer.input_layernorm(state.entered.hidden), layer.self_attn.head_dim
        query, key, value = (
            getattr(layer.self_attn, f"{part}_proj")(normed).unflatten(-1, (-1, heads)).transpose(1, 2)
            for part in "qkv"
        )
        torch.testing.assert_close(values, value, atol=1e-5, rtol=0)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = query @ key.mT * heads**-0.5
        place = torch.arange(logits.shape[-1])
        hidden = (place[None] > place[:, None])[None, None] | ~state.sequence.valid()[:, None, None]
        slow = logits.masked_fill(hidden, -torch.inf).softmax(-1)[:, :, -1:]
        found, _ = state.attention("last", at="previous", rotary=False)
        for row, (start, stop) in enumerate(state.sequence.padded_spans(state.sequence.images)):
            torch.testing.assert_close(found[row], slow[row, :, :, start:stop], atol=1e-6, rtol=0)


@torch.inference_mode()
def test_notes_belong_to_an_image(tiny, monkeypatch):
    """Images are grouped anew before every layer, so what a method writes down follows the image, not the row."""
    seen: dict[str, list] = {}

    def note(self, state):
        for name, memory in zip(state.ids, state.memory, strict=True):
            assert memory.get("name", name) == name
            memory["name"] = name
            seen.setdefault(name, []).append(state.layer)
        count, first = state.tokens.shape[1], torch.arange(state.tokens.shape[1])
        return [Reduction(first[None, : 4 + int(name[-1])], count) for name in state.ids] if count == 16 else None

    method = registry.method("pyramiddrop")
    monkeypatch.setattr(method, "decoder", note)
    prefill(tiny, samples(3, text_only=()), method(budget=8))
    assert len(seen) == 3 and all(len(layers) > 1 for layers in seen.values())
