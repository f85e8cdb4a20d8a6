"""The contract of `reduce` for every family of `llava.hf.families`, on tiny random models."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from llava import reduce
from llava.errors import UserError
from llava.hf import families
from llava.hf.families import FAMILIES, Family, FamilyWrapper, packed_layout
from llava.hf.models import wrap_model
from llava.model.multimodal_encoder import stock_tower
from llava.model.multimodal_encoder.stock_tower import attention_of
from llava.reduction import registry
from tests import contract
from tests.stock_families import IMAGE, MODELS, NAMES, OLD, PACKED, QWEN_LIKE, VIDEO, call, count, tiny
from tests.stock_inputs import TEXTS, shared

STEPS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
BETWEEN = (*QWEN_LIKE[:4], "glm4v", "internvl3", "internvl3_5", *PACKED, "idefics3", "mistral3", "ovis2")
SAME_TOWER = ("qwen2_vl", "qwen3_vl_moe", "smolvlm", "internvl3_5")  # as another


def last(model, inputs):
    with torch.no_grad():
        return model(**inputs, logits_to_keep=1).logits[:, -1]


def budget(method, tokens):
    """Tokens that the method can keep of so many."""
    return max(4, tokens // 3) if "decoder" not in registry.method(method).acts_in else tokens * 5 // 8


def fits(name, method):
    """Whether the family takes the method."""
    model = tiny(name)
    reducer = registry.build(method, 8, {}, 64)
    return not families.why_not(families.declared(model), model.config, reducer)


def test_every_family_has_a_tiny_model():
    made = {f"{kind}ForConditionalGeneration" for kind, _ in MODELS.values()}
    assert not (lost := set(FAMILIES) - made), f"tests/stock_families.py has no tiny model of {', '.join(lost)}"
    assert not (other := made - set(FAMILIES)), f"llava/hf/families.py has no row of {', '.join(other)}"


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_is_the_stock_model(name):
    """Bit for bit, in one pass and while decoding, with beams; and pixels matter, or the rest would say nothing."""
    # Beams of GLM-4V with two images in a prompt are others in the stock model, whose first logits are not those of
    # greedy decoding there.
    model, inputs = tiny(name), call(name, (1, 1) if name == "glm4v" else (1, 2))
    before, plain = set(vars(model)), last(model, inputs)
    generated = model.generate(**inputs, **STEPS, **LOGITS)  # which numbers padded prompts from their first token
    # Beams of Llama 4 end in an error of the stock model, which repeats prompts and not what the tower gives. Before
    # transformers 5.21 those of Qwen3.5 are others in the stock model than in later versions, which give ours.
    beams = None if name == "llama4" or (name == "qwen3_5" and OLD) else model.generate(**inputs, **STEPS, num_beams=2)
    with reduce(model, "full") as reduced:
        assert torch.equal(last(model, inputs), generated.logits[0])
        own = model.generate(**inputs, **STEPS, **LOGITS)
        assert torch.equal(own.sequences, generated.sequences)
        assert all(torch.equal(*pair) for pair in zip(own.logits, generated.logits, strict=True))
        found = model.generate(**inputs, **STEPS, num_beams=2)
        assert beams is None or torch.equal(found, beams)
        moved = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
        assert (last(model, moved) - plain).abs().max() > 1e-3
        assert reduced.accounting[1].images == (1 if name == "glm4v" else 2)
        last(model, {"input_ids": torch.tensor([[1, 21, 22]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)})
        assert [one.tokens_per_layer for one in reduced.accounting] == [(0,) * 4]
    assert set(vars(model)) == before
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
    assert torch.equal(last(model, inputs), plain)


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_decoding(name):
    """Prompts of unequal length in a batch give what each gives alone, and a token what a longer prompt gives."""
    model, inputs = tiny(name), call(name, (1, 1))
    method = "fastervlm" if not fits(name, "pyramiddrop") else "pyramiddrop"
    kept = budget(method, count(name))
    with reduce(model, method, kept) as reduced:
        both = model.generate(**inputs, **STEPS, **LOGITS)
        counts = [one.tokens_per_layer for one in reduced.accounting]
        images = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        for row in range(2):
            own = {key: value[row : row + 1] for key, value in inputs.items()}
            if name.startswith(("qwen", "glm")):
                half = len(images["pixel_values"]) // 2
                own["pixel_values"] = images["pixel_values"][row * half : (row + 1) * half]
            alone = model.generate(**own, **STEPS, **LOGITS)
            assert reduced.accounting[0].tokens_per_layer == counts[row]
            for together, single in zip(both.logits, alone.logits, strict=True):
                torch.testing.assert_close(together[row], single[0], atol=2e-5, rtol=0)
        if (
            method == "fastervlm" and name != "paligemma"
        ):  # reads no text, so a longer prompt keeps the same tokens; PaliGemma sees it whole
            longer = {key: own[key] for key in own}
            longer["input_ids"] = alone.sequences[:, :-1]
            for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
                if key in own:
                    filler = int(key == "attention_mask")
                    longer[key] = F.pad(own[key], (0, STEPS["max_new_tokens"] - 1), value=filler)
            torch.testing.assert_close(last(model, longer), alone.logits[-1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [*NAMES, "llava", "next", "video"])
def test_counts_belong_to_the_last_call(name):
    """Embeddings ran with all tokens under the counts of the call before; a text kept those of the last image."""
    model = tiny(name) if name in NAMES else shared(name).model
    inputs = call(name) if name in NAMES else shared(name).batch(TEXTS[1:2])
    text = {"input_ids": torch.tensor([[1, 21, 22]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad(), reduce(model, "uniform", 8) as reduced:

        def counts():
            return reduced.accounting, reduced.traces, reduced.kv_bytes

        cache = model(**inputs).past_key_values
        first = counts()
        assert first[0][0].mean == 8 and len(first[1][0]) == 1 and first[2] >= first[0][0].kv_bytes > 0
        for run in (model, partial(model.generate, max_new_tokens=3)):
            run(**text)
            (account,), traces, size = counts()
            assert account.tokens_per_layer == (0,) * 4 and account.visual_tokens == 0 and account.kv_bytes == size
            assert traces == [()] and 0 < size < first[2]
        # A token that continues a prompt brings its counts back.
        model(input_ids=text["input_ids"][:, :1], past_key_values=cache)
        assert counts() == first
        for run in (model, partial(model.generate, max_new_tokens=3)):
            model(**inputs)
            with pytest.raises(UserError, match="inputs_embeds"):
                run(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
            assert counts() == ([], [], 0)
        with pytest.raises(UserError, match="inputs_embeds"):
            getattr(model, "model", model)(inputs_embeds=embeddings)


@pytest.mark.parametrize("method", ["consensusdrop", "attnmix", "sparsevlm"])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_ends_with_its_image(name, method):
    """It took its whole batch into an IndexError. The other prompts keep their logits."""
    if not fits(name, method):
        pytest.skip("not of this family")
    model, inputs = tiny(name), call(name, (1, 1))
    ids, kept = inputs["input_ids"].clone(), budget(method, count(name))
    row = ids[0]
    text = row[(row > 9) | (row == 1)]
    ids[0] = torch.cat([row[row == 0], text, row[(row < 10) & (row > 1)]])

    def logits(ids):
        moved = {key: (ids == IMAGE).to(value.dtype) for key, value in inputs.items() if "token_type" in key}
        with reduce(model, method, kept) as reduced:
            found = last(model, {**inputs, **moved, "input_ids": ids, "attention_mask": (ids != 0).long()})
        return found, reduced.traces

    usual, (found, traces) = logits(inputs["input_ids"])[0], logits(ids)
    torch.testing.assert_close(found[1], usual[1], atol=2e-5, rtol=0)
    assert found[0].isfinite().all() and len(traces[0]) == len(traces[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_method(name):
    """It runs at its budget, with finite logits, or is refused in one sentence that names method and family."""
    model, inputs = tiny(name), call(name)
    for method in contract.METHODS:
        kept = budget(method, count(name))
        if not fits(name, method):
            with pytest.raises(UserError, match=f"^{method} .*{families.declared(model).title}"):
                reduce(model, method, kept)
            continue
        if registry.method(method).needs_words:
            with pytest.raises(UserError, match=f"^{method} .*give reduce\\(\\) `questions` and `tokenizer`"):
                reduce(model, method, kept)
            continue
        try:
            with reduce(model, method, None if method == "full" else kept) as reduced:
                assert model.generate(**inputs, **STEPS, **LOGITS).logits[-1].isfinite().all()
        except UserError as error:  # so few tokens
            assert any(word in str(error) for word in ("budget", "mean", "chunks")), error
            continue
        (accounting,) = reduced.accounting
        assert accounting.planned is None or abs(accounting.mean - accounting.planned) <= 1


@pytest.mark.parametrize("name", BETWEEN)
def test_stages_between_layers_hide_what_they_drop(name):
    """FastV gives what the stock model gives whose later layers do not look at the dropped tokens, deepstack too."""
    model, inputs = tiny(name), call(name)
    with reduce(model, "fastv", budget("fastv", count(name))) as reduced:
        logits = last(model, inputs)
    ((step,),) = reduced.traces
    ids = inputs["input_ids"][0]
    first = int((ids == IMAGE).nonzero()[0])
    seen = torch.ones(len(ids), dtype=torch.bool)
    seen[first : first + step.reduction.inputs] = False
    seen[first + step.reduction.kept[0]] = True
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & (seen | torch.eye(len(ids), dtype=torch.bool))
    layers = FamilyWrapper(model).llm.layers[int(step.place.split()[1]) :]
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, options: (args, {**options, "attention_mask": mask[None, None]}), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        torch.testing.assert_close(logits, last(model, inputs), atol=2e-5, rtol=0)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAME_TOWER])
def test_scores_belong_to_the_tokens_that_their_patches_become(name):
    """What the tower gives for one patch changes the one visual token whose score it enters."""
    model, inputs = tiny(name), call(name)
    wrapper, reducer = FamilyWrapper(model), registry.build("fastervlm", 4, {}, 16)
    (score,) = reducer.tower_scores(False)
    poked = []

    def poke(module, args, output):
        output = output.clone()
        for patch in poked:
            output.view(-1, 32)[patch + (wrapper.family.cls == 0)] += torch.linspace(-5, 5, 32)
        return output

    def tokens():
        with torch.no_grad():
            (((view, _),), _) = wrapper.views_of("image", inputs, reducer)
        return view

    block = wrapper.stock_tower.blocks[wrapper.stock_tower.block_of(score)]
    hook = [part for part in block.modules() if isinstance(part, torch.nn.Linear)][-1].register_forward_hook(poke)
    try:
        for patch in (0, 1, 5, 14):
            poked[:] = []
            plain = tokens()
            poked[:] = [patch]
            change = tokens().encoded.features[0] - plain.encoded.features[0]
            moved = (change.view(-1, change.shape[-1]).abs().amax(1) > 1e-5).nonzero().flatten().tolist()
            side = 1 if name in ("paligemma", *PACKED) else 2
            grid = plain.encoded.grid[0] * side, plain.encoded.grid[1] * side
            owners = stock_tower.grouped(torch.eye(grid[0] * grid[1]), grid, side, wrapper.family.runs)
            if wrapper.stock_tower.window:
                owners = stock_tower.by_rows(owners, *plain.encoded.grid, wrapper.stock_tower.window)
            owner = owners[:, patch].argmax().item()
            assert moved == [owner], (
                f"{name}: patch {patch} should change the visual token {owner} alone, it changes {moved or 'none'}: "
                "`tower`, `runs`, `cls` or `output` of the family's row is not what the model does"
            )
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["internvl3", "llama4", "gemma3", "aya_vision", "idefics3"])
def test_scores_are_the_attention_of_the_tower(name):
    """Beside the fused kernel the same as from the maps of eager attention; without CLS, what tokens receive."""
    model, inputs, maps = copy.deepcopy(tiny(name)), call(name), list[torch.Tensor]()
    reducer = registry.build("fastervlm", 4, {}, 16)
    with torch.no_grad():
        (((view, _),), _) = FamilyWrapper(model).views_of("image", inputs, reducer)
        model.set_attn_implementation("eager")
        (((eager, _),), _) = FamilyWrapper(model).views_of("image", inputs, reducer)
        attention = attention_of(FamilyWrapper(model).stock_tower.blocks[-1])
        hook = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
        model.get_image_features(pixel_values=inputs["pixel_values"])
        hook.remove()
    (weights,) = maps
    if name == "llama4":  # whose class token is the last
        weights = weights.roll((1, 1), (2, 3))
    values = weights[:, :, 0, 1:].mean(1) if name in ("internvl3", "llama4") else weights.mean((1, 2))
    expected = F.avg_pool2d(values.view(1, 1, 8, 8), 2).flatten(1)
    for seen in (view, eager):
        (score,) = seen.encoded.scores.values()
        torch.testing.assert_close(score, expected, atol=1e-6, rtol=1e-4)


HOUSE = {
    "llava": Family("LLaVA", "vision_tower.encoder.layers", cls=0),
    "next": Family("LLaVA-NeXT", "vision_tower.encoder.layers", cls=0, packed=True),
}


@pytest.mark.parametrize("name", HOUSE)
@pytest.mark.parametrize(
    "method",
    ["divprune", "consensusdrop", "fastervlm", "attnmix", "fastv", "pyramiddrop", "vlmpruner", "clse", "ivcprune"],
)
def test_the_staged_forward_agrees(monkeypatch, name, method):
    """Families of the staged forward, given a row, keep the same tokens and give the same logits, with tiles too."""
    case = shared(name)
    inputs = case.batch()
    options = {"budget": "2/5"} if "decoder" not in registry.method(method).acts_in else {"budget": "3/5"}
    with reduce(case.model, method, **options) as staged:
        expected = case.model.generate(**inputs, **STEPS, **LOGITS)
    monkeypatch.setitem(FAMILIES, type(case.model).__name__, HOUSE[name])
    with reduce(case.model, method, **options) as reduced:
        own = case.model.generate(**inputs, **STEPS, **LOGITS)
    # Only the staged forward of LLaVA-NeXT knows where its tiles are padded.
    unknown = [[replace(one, on_padding=None) for one in counted.accounting] for counted in (reduced, staged)]
    assert unknown[0] == unknown[1]
    for one, other in zip(own.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_packed_images_have_the_layout_of_llava_next():
    """The index map of numbered patches, against the one that is worked out from sizes."""
    model = shared("next").model
    house = wrap_model(model).anyres
    for size in ((60, 110), (120, 50), (112, 112), (40, 90), (300, 40)):
        expected, height_width = house.arrange(size), (size[1], size[0])
        side = expected.grid[0]
        layout = packed_layout(model.model, height_width, side)
        assert torch.equal(layout.origins(), expected.origins())
        assert (layout.tiles, layout.tokens) == (expected.tiles, expected.tokens)


def test_onevision_shrinks_many_tiles():
    """Where the model interpolates the stitched tiles, tokens belong to the nearest patch; all are kept bit for bit."""
    model = copy.deepcopy(tiny("onevision"))
    model.config.vision_aspect_ratio = "anyres_max_1"
    inputs = call("onevision")
    inputs["image_sizes"] = torch.tensor([[112, 112]])
    tokens = len(
        model.get_image_features(**{key: inputs[key] for key in ("pixel_values", "image_sizes")}).pooler_output[0]
    )
    inputs["input_ids"] = torch.tensor([[1, 25, *[IMAGE] * tokens, 21]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = last(model, inputs)
    with reduce(model, "full") as reduced:
        assert torch.equal(last(model, inputs), expected)
    assert reduced.accounting[0].visual_tokens == tokens == 16 + 4 * 5
    with reduce(model, "hired", 12) as reduced:
        last(model, inputs)
    assert reduced.accounting[0].mean == 12


FILMING = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


def video_call(name, frames=(3,)):
    """Arguments for prompts with one video each, of 8 tokens a frame; Qwen3 has other text before each frame."""
    frame, apart, rows = [5, *[VIDEO] * 8, 6], name.startswith("qwen3"), []
    for row, total in enumerate(frames):
        shown = [5, *[VIDEO] * 8 * total, 6]
        if apart:
            shown = [token for number in range(total) for token in (30 + number, *frame)]
        rows.append([1, 11, *shown, 21, 22, *[40] * (3 * row)])
    ids = torch.tensor([[0] * (max(map(len, rows)) - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": torch.randn(sum(frames) * 32, 1176, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[total, 4, 8] for total in frames]),
    }
    if name == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([0.5] * len(frames))
    return inputs


@pytest.mark.parametrize("name", FILMING)
def test_videos(name):
    """A budget is the video's, also where text tells its frames apart; methods between layers see frames as images."""
    model, inputs = tiny(name), video_call(name)
    expected, beams = last(model, inputs), model.generate(**inputs, **STEPS, num_beams=2)
    with reduce(model, "full") as reduced:
        assert torch.equal(last(model, inputs), expected)
        assert reduced.accounting[0].images == 1
        own = model.generate(**inputs, **STEPS, num_beams=2)
        assert torch.equal(own, beams) or (name == "qwen3_5" and OLD)
    for method in ("fastervlm", "evs", "vidcom2"):
        with reduce(model, method, 4) as reduced:
            assert torch.isfinite(last(model, inputs)).all()
        assert reduced.accounting[0].tokens_per_layer == (4,) * 4 and reduced.accounting[0].images == 1
    if name == "qwen3_vl":
        with reduce(model, "fastv", 6) as reduced:
            assert torch.isfinite(last(model, inputs)).all()
        assert reduced.accounting[0].images == 3 and reduced.accounting[0].mean == 5.75


@pytest.mark.parametrize("name", FILMING[:3])
@pytest.mark.parametrize("method", ["evs", "vidcom2", "fastervlm", "consensusdrop"])
def test_a_reduced_video_is_the_stock_model_without_the_dropped_tokens(name, method):
    """Times between frames stay, all tokens keep their positions, and prompts of a batch do not depend on others."""
    model, inputs = tiny(name), video_call(name, (3, 2))
    with reduce(model, method, 9, positions="original") as reduced:
        found = last(model, inputs)
    if method == "consensusdrop":  # merges; it is compared with itself alone
        for row, total in enumerate((3, 2)):
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            pad = int((alone["input_ids"][0] == 0).sum())
            alone |= {key: alone[key][:, pad:] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
            alone["pixel_values_videos"] = inputs["pixel_values_videos"].split([96, 64])[row]
            with reduce(model, method, 9, positions="original"):
                torch.testing.assert_close(last(model, alone)[0], found[row], atol=1e-5, rtol=0)
            assert reduced.accounting[row].visual_tokens == 8 * total
        return
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    for row, steps in enumerate(reduced.traces):
        places = (ids[row] == VIDEO).nonzero().flatten()
        mask[row, places] = 0
        mask[row, places[steps[0].reduction.kept[0]]] = 1
    known = {key: inputs[key] for key in ("video_grid_thw", "second_per_grid_ts", "mm_token_type_ids") if key in inputs}
    positions = model.model.get_rope_index(ids, attention_mask=inputs["attention_mask"], **known)[0]
    expected = last(model, inputs | {"attention_mask": mask, "position_ids": positions})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_layers_that_a_method_runs_are_the_models(monkeypatch):
    """A method that probes layers sees a video in one piece; the model runs with the times in their places."""
    model, inputs, found = tiny("qwen3_vl"), video_call("qwen3_vl", (3, 2)), []

    def prompt(method, state):
        hidden = state.run_layers(2)
        found.extend(hidden[row, start:stop] for row, ((start, stop),) in enumerate(spans_of(state)))

    def spans_of(state):
        return [state.sequence.padded_spans(own, (row,)) for row, own in enumerate(state.sequence.visual)]

    monkeypatch.setattr(registry.method("vidcom2"), "prompt", prompt)
    with reduce(model, "vidcom2", 9):
        last(model, inputs)
    seen = []
    hook = FamilyWrapper(model).llm.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last(model, inputs)
    hook.remove()
    expected = seen[0][inputs["input_ids"] == VIDEO]
    torch.testing.assert_close(torch.cat(found[:2]), expected, atol=1e-5, rtol=0)


def test_times_stay_between_the_frames_of_a_renumbered_video():
    """A decoder that got them before the video would take all frames for later ones."""
    model, inputs, given = tiny("qwen3_vl"), video_call("qwen3_vl"), {}
    hook = model.model.register_forward_pre_hook(lambda *seen: given.update(seen[2]), with_kwargs=True)
    with reduce(model, "evs", 10) as reduced:
        last(model, inputs)
    hook.remove()
    kept, text = reduced.traces[0][0].reduction.kept[0], inputs["input_ids"][0] != VIDEO
    shown = torch.isin((inputs["input_ids"][0] == VIDEO).cumsum(0) - 1, kept) | text
    assert torch.equal(given["input_ids"][0], inputs["input_ids"][0][shown])
    ids, position = given["input_ids"][0] == VIDEO, given["position_ids"][-3:, 0]
    for place in range(1, len(ids)):
        behind = position[:, :place].max() + 1
        if not ids[place]:  # text goes on behind the longest axis
            assert (position[:, place] == behind).all()
        elif not ids[place - 1]:  # a frame begins
            stop = place + int(ids[place:].long().argmin())
            assert (position[:, place:stop].amin(1) == behind).all() and len(position[0, place:stop].unique()) == 1


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        # The model itself would take positions of text, without a word.
        ("qwen3_vl", {"image_grid_thw": None}, "Qwen3-VL needs image_grid_thw beside pixel_values"),
        ("qwen3_vl", {"mm_token_type_ids": None}, "Qwen3-VL needs mm_token_type_ids"),
        # The error of a tensor's index came from inside the tower.
        ("qwen2_5_vl", {"image_grid_thw": torch.tensor([[1, 8, 14]])}, "image_grid_thw counts 112 patches, got 96"),
        ("glm4v", {"mm_token_type_ids": torch.zeros(1, 36, dtype=torch.int)}, "must be 1 at the image tokens"),
        ("internvl3", {"input_ids": torch.tensor([[1, *[IMAGE] * 15, 2]]), "attention_mask": None}, "16 visual tokens"),
        ("internvl3", {"pixel_values_videos": torch.zeros(1, 3, 112, 112)}, "has no effect|takes no videos"),
        ("mistral3", {"input_ids": torch.tensor([[1, *[IMAGE] * 16, 2]]), "attention_mask": None}, "in one piece"),
        ("gemma3", {"position_ids": torch.arange(10)[None]}, "position_ids cannot be used here"),
    ],
)
def test_wrong_arguments(name, change, sentence):
    inputs = {**call(name), **change}
    with reduce(tiny(name), "uniform", 4), pytest.raises(UserError, match=sentence):
        tiny(name)(**inputs)


def test_a_cache_belongs_to_its_block():
    model, inputs = tiny("internvl3"), call("internvl3")
    with reduce(model, "uniform", 4):
        cache = model(**inputs).past_key_values
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] - 12
    with pytest.raises(UserError, match="reduced prompts"):
        model(input_ids=torch.tensor([[21]]), past_key_values=cache)
