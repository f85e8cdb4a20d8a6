"""DecoderState.attention against the maps that transformers reports in eager mode."""

import pytest
import torch

from llava.pipeline.decoder import step
from llava.pipeline.prefill import prefill
from llava.reduction import Reduction
from llava.reduction.reducer import Reducer
from llava.reduction.states import text_spans
from tests.attention_maps import eager_maps, real
from tests.conftest import samples

NAMES = ("last", "question", "instruction", "after", "visual")


def probe(look, drop_at: int | None = None, positions: str = "renumber") -> Reducer:
    """A method that calls `look(state)` in front of layer 2, and may first drop tokens of some pictures."""

    class Probe(Reducer):
        def decoder_layers(self, layers):
            return (1, 2)

        def decoder(self, state):
            if state.layer == 2:
                look(state)
            elif drop_at is not None:
                # Every other token of the pictures with an even number: afterwards there are two groups.
                whole = torch.arange(16).expand(len(state.tokens), -1)
                return [
                    Reduction(row[None] if int(name[1:]) % 2 else row[None, drop_at::2], 16)
                    for name, row in zip(state.ids, whole, strict=True)
                ]
            return None

    return Probe(budget=8, positions=positions)


def run(tiny, reducer, batch):
    return prefill(tiny, batch, reducer)


@pytest.mark.parametrize("drop_at", [None, 0, 1])
@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("at", ["previous", "next"])
def test_rows_are_the_rows_of_the_eager_map(tiny, at, positions, drop_at):
    """Padded batch with a text-only prompt, two key heads for four query heads, before and behind a reduction."""
    assert tiny.llm.config.num_key_value_heads < tiny.llm.config.num_attention_heads
    seen, batch = [], samples()

    def look(state):
        spans = state.sequence.images, state.sequence.lengths
        rows = {name: text_spans(state.sequence, name) for name in NAMES}
        rows["chosen"] = [(a + 1, b - 2) for a, b in state.sequence.images]
        found = {name: state.attention(spans if name == "chosen" else name, at) for name, spans in rows.items()}
        seen.append((state.ids, *spans, rows, found))

    with eager_maps(tiny) as maps:
        run(tiny, probe(look, drop_at, positions), batch)
    assert len(seen) == (1 if drop_at is None else 2)
    for ids, images, lengths, rows, found in seen:
        for row, name in enumerate(ids):
            whole = real(maps, 1 if at == "previous" else 2, int(name[1:]), lengths[row])
            start, stop = images[row]
            for kind, (weights, exists) in found.items():
                first, last = rows[kind][row]
                assert int(exists[row].sum()) == last - first
                expected = whole[:, first:last, start:stop]
                torch.testing.assert_close(weights[row, :, : last - first], expected, atol=1e-6, rtol=1e-4)


def test_visual_rows_see_no_later_token(tiny):
    seen = []
    run(tiny, probe(lambda state: seen.append(state.attention("visual")[0])), samples(2))
    above = torch.ones(16, 16).triu(1).bool()
    assert (seen[0][..., above] == 0).all() and (seen[0][..., ~above] > 0).all()


def test_rows_without_rotation_are_products_of_plain_queries_and_keys(tiny):
    """Written from the definition for one prompt; the rotation must make a difference."""
    seen = []

    def look(state):
        plain, turned = (state.attention("last", rotary=rotary)[0] for rotary in (False, True))
        seen.extend([state.sequence.hidden[0], state.sequence.images[0], plain, turned])

    with torch.inference_mode():
        run(tiny, probe(look), samples(1))
        hidden, (start, stop), plain, turned = seen
        layer = tiny.llm.layers[2]
        normed = layer.input_layernorm(hidden)
        width = layer.self_attn.head_dim
        query = layer.self_attn.q_proj(normed[-1]).view(4, width)
        key = layer.self_attn.k_proj(normed).view(-1, 2, width)
        for head in range(4):
            expected = (key[:, head // 2] @ query[head] / width**0.5).softmax(0)[start:stop]
            torch.testing.assert_close(plain[0, head, 0], expected, atol=1e-6, rtol=1e-4)
        assert not torch.allclose(plain, turned, atol=1e-3)


def test_unknown_rows_are_refused(tiny):
    with pytest.raises(ValueError, match="Did you mean 'question'"):
        run(tiny, probe(lambda state: state.attention("questions")), samples(1))


@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_a_new_token_stands_one_behind_the_prompt_as_each_layer_knows_it(tiny, positions):
    """Official PyramidDrop counts dropped tokens off stage by stage in decoding, SparseVLM takes each layer's own cache
    length: layers in front of a stage give a new token a later position than layers behind it."""
    state, _ = run(tiny, probe(lambda state: None, drop_at=0, positions=positions), samples())
    lengths = torch.tensor(state.lengths)  # [layers, B]
    expected = lengths if positions == "renumber" else lengths[:1].expand_as(lengths)
    for moved in range(2):
        places = torch.stack([part.next_position[:, 0] for part in state.segments for _ in part.layers])
        assert places.tolist() == (expected + moved).tolist()
        with torch.inference_mode():
            step(tiny.llm, state, tiny.llm.embed_tokens(torch.full((5, 1), 7)))
