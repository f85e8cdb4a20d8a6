"""Scores of the tower and rows of the decoder's attention against transformers' own maps."""

import pytest
import torch

from llava.model.multimodal_encoder.clip_encoder import encode
from llava.pipeline.decoder import step
from llava.pipeline.generate import prefill
from llava.reduction import Reduction, registry, scores
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore
from llava.reduction.states import text_spans
from tests.attention_maps import eager_attention, eager_maps, real
from tests.conftest import samples


@pytest.fixture
def eager(tiny):
    """The tiny model with eager attention everywhere, so that transformers returns its attention maps."""
    with eager_attention(tiny):
        yield tiny


def pixels(tiny, count=3):
    return torch.stack([tiny.image_processor(sample.image) for sample in samples(count)])


@pytest.mark.parametrize("block", [-3, -2, -1, 0])
def test_tower_signals_equal_eager_attention(eager, block):
    images = pixels(eager)
    wanted = [TowerScore(kind, block) for kind in ("cls_attention", "received_attention", "keys")]
    with torch.inference_mode():
        encoded = encode(eager.tower, images, -2, wanted)
        reported = eager.tower(images, output_attentions=True, output_hidden_states=True)
        attention = reported.attentions[block]
        torch.testing.assert_close(encoded.scores[wanted[0]], attention[:, :, 0, 1:].mean(1), atol=1e-6, rtol=0)
        received = attention[:, :, 1:, 1:].mean((1, 2))
        torch.testing.assert_close(encoded.scores[wanted[1]], received, atol=1e-6, rtol=0)
        layer = eager.tower.encoder.layers[block]
        hidden = reported.hidden_states[:-1][block]
        keys = layer.self_attn.k_proj(layer.layer_norm1(hidden))[:, 1:]
        heads = layer.self_attn.num_heads
        torch.testing.assert_close(encoded.scores[wanted[2]], keys.unflatten(-1, (heads, -1)).mean(2))
        torch.testing.assert_close(encoded.features, reported.hidden_states[-2][:, 1:])


@pytest.mark.parametrize("rows", [64, 5])
def test_received_attention_counts_the_class_token_and_a_patch_itself_as_asked(eager, rows, monkeypatch):
    """HiPrune counts both, VisionTrim neither; in slices that do not divide the tokens, too."""
    monkeypatch.setattr(scores, "ROWS", rows)
    images, wanted = pixels(eager), [TowerScore(f"received_from_{who}") for who in ("all", "others")]
    with torch.inference_mode():
        found = encode(eager.tower, images, -2, wanted).scores
        attention = eager.tower(images, output_attentions=True).attentions[-2].mean(1)
    patches = attention[:, 1:, 1:]
    others = patches.masked_fill(torch.eye(16, dtype=torch.bool), 0).sum(1) / 15
    for score, expected in zip(wanted, (attention[:, :, 1:].mean(1), others), strict=True):
        torch.testing.assert_close(found[score], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [-2, -1])
def test_cls_logits_are_eager_attention_before_its_softmax(eager, block):
    """Up to a constant per head the logarithm of a row of attention."""
    images, wanted = pixels(eager), TowerScore("cls_logits", block)
    with torch.inference_mode():
        found = encode(eager.tower, images, -2, [wanted]).scores[wanted]
        reported = eager.tower(images, output_attentions=True, output_hidden_states=True)
        log = reported.attentions[block][:, :, 0, 1:].log().mean(1)
        centred = [rows - rows.mean(1, keepdim=True) for rows in (found, log)]
        torch.testing.assert_close(*centred, atol=1e-5, rtol=0)
        assert (found < 0).any() and (found > 0).any()


def test_blocks_behind_the_features_run_only_for_a_signal(tiny, monkeypatch):
    ran = []
    for index, block in enumerate(tiny.tower.encoder.layers):
        original = block.forward
        monkeypatch.setattr(block, "forward", lambda *a, i=index, f=original: ran.append(i) or f(*a))
    with torch.inference_mode():
        encode(tiny.tower, pixels(tiny), -2)
    assert ran == [0, 1]


@pytest.mark.parametrize("layer", [0, 2])
def test_contextual_rows_equal_the_models_own_attention(eager, layer):
    """With rotation and real inputs, a row is the eager map's row, renormalised over the visual keys."""
    batch = samples(3)
    seen = {}

    class Probe(registry.method("consensusdrop")):
        def prompt(self, state):
            for rows in ("question", "last"):
                seen[rows] = state.text_attention(layer, rows, rotary=True, contextual=True)

    prefill(eager, batch, Probe(budget=7))
    for i, sample in enumerate(batch):
        prompt = eager.prompt(sample)
        slot = prompt.ids.index(-200)
        ids = [*prompt.ids[:slot], *[eager.hf_model.config.image_token_index] * 16, *prompt.ids[slot + 1 :]]
        with torch.inference_mode():
            maps = eager.hf_model(
                input_ids=torch.tensor([ids]),
                pixel_values=eager.image_processor(sample.image)[None],
                output_attentions=True,
            ).attentions[layer]
        visual = maps[0, :, :, slot : slot + 16]
        visual = visual / visual.sum(-1, keepdim=True)
        start, stop = (place + 15 for place in prompt.question)
        for rows, expected in (("question", visual[:, start:stop]), ("last", visual[:, -1:])):
            weights, mask = seen[rows]
            assert expected.shape[1] == (weights.shape[2] if mask is None else int(mask[i].sum()))
            torch.testing.assert_close(weights[i, :, : expected.shape[1]], expected, atol=1e-5, rtol=1e-4)


# DecoderState.attention.


NAMES = ("last", "question", "instruction", "after", "visual")


def probe(look, drop_at: int | None = None, positions: str = "renumber") -> Reducer:
    """A method that calls `look(state)` in front of layer 2, and may first drop tokens of some images."""

    class Probe(Reducer):
        def decoder_layers(self, layers):
            return (1, 2)

        def decoder(self, state):
            if state.layer == 2:
                look(state)
            elif drop_at is not None:
                # Every other token of the images with an even number: afterwards there are two groups.
                whole = torch.arange(16).expand(len(state.tokens), -1)
                return [
                    Reduction(row[None] if int(name[1:]) % 2 else row[None, drop_at::2], 16)
                    for name, row in zip(state.ids, whole, strict=True)
                ]
            return None

    return Probe(budget=8, positions=positions)


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
        prefill(tiny, batch, probe(look, drop_at, positions))
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


def test_rows_without_rotation_are_products_of_plain_queries_and_keys(tiny):
    """Written from the definition for one prompt; the rotation must make a difference."""
    seen = []

    def look(state):
        plain, turned = (state.attention("last", rotary=rotary)[0] for rotary in (False, True))
        seen.extend([state.sequence.hidden[0], state.sequence.images[0], plain, turned])

    with torch.inference_mode():
        prefill(tiny, samples(1), probe(look))
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


@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_a_new_token_stands_one_behind_the_prompt_as_each_layer_knows_it(tiny, positions):
    """Official PyramidDrop counts dropped tokens off stage by stage in decoding, SparseVLM takes each layer's own cache
    length: layers in front of a stage give a new token a later position than layers behind it."""
    state, _ = prefill(tiny, samples(), probe(lambda state: None, drop_at=0, positions=positions))
    lengths = torch.tensor(state.lengths)  # [layers, B]
    expected = lengths if positions == "renumber" else lengths[:1].expand_as(lengths)
    for moved in range(2):
        places = torch.stack([part.next_position[:, 0] for part in state.segments for _ in part.layers])
        assert places.tolist() == (expected + moved).tolist()
        with torch.inference_mode():
            step(tiny.llm, state, tiny.llm.embed_tokens(torch.full((5, 1), 7)))
