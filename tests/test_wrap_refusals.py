"""What users ask of `reduce` and do to a model inside: it works as on the plain model, or one sentence refuses it."""

import asyncio
import copy
import inspect
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
    TextIteratorStreamer,
)

from llava import reduce
from llava.errors import UserError
from llava.hf.models import PreparedImage, question_span, samples, text_span
from llava.processing.prompt import IMAGE_TOKEN_INDEX
from llava.processing.video import Video
from llava.reduction.token_layout import single
from tests.conftest import drawn_image
from tests.stock_inputs import FAMILIES, TEXTS, shared, stock
from tests.tiny_checkpoints import make_tokenizer

A, B = 90, 91  # two tokens that stand for images
SLOT = IMAGE_TOKEN_INDEX


def ready(*counts: int) -> list[PreparedImage]:
    return [PreparedImage(torch.zeros(1, 3, 1, 1), single(1, count)) for count in counts]


@pytest.fixture(params=FAMILIES)
def case(request):
    return shared(request.param)


@pytest.fixture
def llava():
    return shared("llava")


@pytest.fixture
def own():
    """A model that a test may change."""
    return stock("llava")


def test_runs_become_slots_and_padding_goes():
    """Neighbours of different lengths, two kinds of images, padding on both sides, a row without images."""
    ids = torch.tensor([[7, A, A, A, A, A, 8], [A, B, B, 5, A, A, 0], [0, 0, 0, 0, 1, 2, 3]])
    mask = torch.tensor([[1] * 7, [1] * 6 + [0], [0] * 4 + [1] * 3])
    images = ready(2, 3, 1, 2)
    films = ready(2)
    rows = samples(ids, mask, {A: images, B: films})
    assert [row.prompt.ids for row in rows] == [(7, SLOT, SLOT, 8), (SLOT, SLOT, 5, SLOT), (1, 2, 3)]
    assert [row.images for row in rows] == [tuple(images[:2]), (images[2], films[0], images[3]), ()]
    assert [row.prompt.question for row in rows] == [(3, 4), (2, 3), (0, 3)]
    assert len({row.id for row in rows}) == 3
    assert samples(ids[2:], mask[2:], {})[0].id == rows[2].id


@pytest.mark.parametrize(
    "ids, span",
    [
        ((1, 7, SLOT, 8, 9), (3, 5)),
        ((1, 7, SLOT), (0, 2)),
        ((1, 7, SLOT, 2), (0, 2)),  # the end of the image alone
        ((1, 7, SLOT, 2, 8), (3, 5)),
        ((1, 7, SLOT, 8, SLOT, SLOT), (3, 4)),
        ((7, SLOT, 2, SLOT), (0, 1)),
        ((1, SLOT, 2), (3, 3)),
        ((SLOT,), (1, 1)),
        ((1, 2), (0, 2)),
    ],
)
def test_without_questions_the_last_text_is_the_question(ids, span):
    """Of a prompt that ends with its image, the question was an empty span behind the last column."""
    assert text_span(ids, frozenset({1, 2})) == span


@pytest.mark.parametrize(
    "row, counts, words",
    [
        ([7, A, A, A, 8], (2,), "more image tokens"),
        ([7, A, A, A, 8], (4,), "has 4 visual tokens, but its prompt 3 image tokens"),
        ([7, A, A], (2, 2), "image tokens for 1 of 2 images"),
        ([7, A, 8, A], (2,), "1 image tokens"),
    ],
)
def test_prompts_and_images_that_do_not_fit(row, counts, words):
    with pytest.raises(UserError, match=words):
        samples(torch.tensor([row]), None, {A: ready(*counts)})


def test_a_question_is_found_where_it_stands():
    """The last place of several; behind, between and in front of images; exactly its tokens."""
    tokenizer = make_tokenizer()
    words = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    cat, before, after = words("is there a cat?"), words("USER:"), words("and a dog ASSISTANT:")
    start = len(before)
    for ids, expected in (
        ([1, *before, *cat, *after], 1 + start),
        ([1, *before, SLOT, *cat, *after], 2 + start),
        ([1, *cat, SLOT, *before, *cat, SLOT], 2 + len(cat) + start),
        ([*cat, SLOT, SLOT, *after], 0),
        ([*cat, *cat], len(cat)),
    ):
        assert question_span(ids, " is there\n a cat?", tokenizer) == (expected, expected + len(cat))
        assert question_span(ids, "there", tokenizer) == (expected + 1, expected + 2)
    for question in ("is there a star?", "", "cat? and"):
        with pytest.raises(UserError, match=re.escape(repr(question))):
            question_span([*cat, SLOT, *after], question, tokenizer)


def test_tokens_that_hold_a_part_of_the_question_belong_to_it():
    """As sentencepiece joins a question to what stands around it; a lone space belongs to nothing."""
    pieces = {1: "USER:\n", 2: " ", 3: "so wh", 4: "ere", 5: " is", 6: "it?A", 7: "SS", 8: "where", 9: "it?"}

    class Pieces:
        def __call__(self, text, add_special_tokens):
            return SimpleNamespace(input_ids=[8, 5, 9])

        def decode(self, ids, clean_up_tokenization_spaces):
            return "".join(pieces[token] for token in ids)

    assert question_span([1, 2, 3, 4, 5, 2, 6, 7], "where is it?", Pieces()) == (2, 7)
    assert question_span([1, 2, 8, 5, 2, 9, 2, 7], "where is it?", Pieces()) == (2, 6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"method": "visiondrp"}, "Did you mean 'visiondrop'"),
        ({"budget": 17}, "1 to 16"),
        ({"budget": "1/0"}, "got '1/0'"),
        ({"method": "full", "budget": 5}, "full keeps all 16"),
        # The ratio won in silence: budget 8 with ratio 0.5 kept 16 tokens.
        ({"budget": 8, "retention_ratio": 0.5}, "both given for visiondrop"),
        ({"budget": 8, "retention_ratio": "0.5"}, "both given for visiondrop"),
        ({"questions": ["is there a star?"]}, "needs `tokenizer`"),
        ({"questions": "is there a star?", "tokenizer": make_tokenizer()}, "one string per prompt"),
    ],
)
def test_what_cannot_be_asked_for(llava, arguments, words):
    with pytest.raises(UserError, match=words):
        reduce(llava.model, **{"method": "visiondrop", "budget": 6, **arguments})
    assert "forward" not in vars(llava.model)


def test_models_that_cannot_be_reduced(llava):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    for other in (LlamaForCausalLM(config), llava.model.model, nn.Linear(1, 1)):
        with pytest.raises(UserError, match=f"got {type(other).__name__}"):
            reduce(other, "uniform", 2)
    model, text = llava.model, llava.model.model.language_model.config
    changes = [
        (model, "training", True, r"\(LlavaForConditionalGeneration\)"),
        (model.config, "vision_feature_layer", [-2, -3], "-4 to 3"),
        (model.config, "vision_feature_layer", 99, "layer 99 of"),
        (model.config, "vision_feature_select_strategy", "full", "drops the class token"),
        (text, "_attn_implementation", "flex_attention", "got 'flex_attention'"),
        (model, "_tp_size", 2, "split by tp_plan"),
    ]
    for owner, name, value, words in changes:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            with pytest.raises(UserError, match=words):
                reduce(model, "visiondrop", 6)
        finally:
            setattr(owner, name, before)


def test_a_tower_that_is_no_clip_and_a_model_on_several_devices(llava, own):
    config = llava.model.config.to_dict()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config["vision_config"] = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, **small}
    model = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    with pytest.raises(UserError, match="siglip_vision_model"):
        reduce(model, "visiondrop", 6)
    own.model.lm_head.to("meta")
    with pytest.raises(UserError, match="cpu, meta"):
        reduce(own.model, "visiondrop", 6)


def test_one_block_at_a_time(llava):
    with reduce(llava.model, "visiondrop", 6) as first:
        with pytest.raises(UserError, match="reduced already"), reduce(llava.model, "uniform", 6):
            pass
        llava.model(**llava.batch())
        assert first.accounting[0].mean == 6
    with first:  # and again
        llava.model(**llava.batch(TEXTS[1:2]))
        assert len(first.accounting) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": torch.zeros(4, 9)}, "labels"),
        # It had no effect.
        ({"vision_feature_layer": -1}, "vision_feature_layer must be that of the model's config"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"use_cache": False}, "use_cache"),
        ({"logits_to_keep": 2}, "last token only"),
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(4, 9, 64)}, "inputs_embeds"),
        ({"attention_mask": torch.ones(4, 3)}, "attention_mask"),
        ({"mm_encoder_outputs": {}}, "needs pixels"),
        # Features in place of pixels went to the model's own forward, unreduced.
        ({"pixel_values": None, "mm_encoder_outputs": {"image": torch.zeros(1)}}, "needs pixels"),
        ({"pixel_values": torch.zeros(1, 4, 3, 56, 56)}, "4 axes"),
        ({"pixel_values": torch.zeros(3, 3, 56, 56)}, "more image tokens"),
    ],
)
def test_calls_that_cannot_be_served(llava, change, words):
    with reduce(llava.model, "visiondrop", 6), pytest.raises(UserError, match=words):
        llava.model(**{**llava.batch(), **change})


def test_caches_that_cannot_hold_a_reduced_prompt(llava):
    inputs = llava.batch(TEXTS[1:2])
    full = DynamicCache()
    llava.model(**llava.prepare(TEXTS[2:3], []), past_key_values=full)
    static = StaticCache(llava.model.config.text_config, max_cache_len=64)
    with reduce(llava.model, "visiondrop", 6):
        for cache in (full, static):
            with pytest.raises(UserError, match=f"got a {type(cache).__name__}"):
                llava.model(**inputs, past_key_values=cache)
        with pytest.raises(UserError, match="StaticCache"):
            llava.generate(inputs, cache_implementation="static")
        held = llava.model(**inputs).past_key_values
        with pytest.raises(UserError, match="leave pixels out"):
            llava.model(**inputs, past_key_values=held)
        with pytest.raises(UserError, match="1 reduced prompts, got input_ids for 2"):
            llava.model(input_ids=torch.tensor([[5], [6]]), past_key_values=held)
        held.batch_repeat_interleave(2)
        with pytest.raises(UserError, match="one token per prompt, got 2"):
            llava.model(input_ids=torch.tensor([[5, 6]] * 2), past_key_values=held)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("image_sizes", lambda _: None, "needs image_sizes"),
        ("pixel_values", lambda pixels: pixels[:, :2], "do not fit pixel_values"),
    ],
)
def test_inputs_that_tiles_need(name, change, words):
    case = shared("next")
    inputs = case.batch(TEXTS[1:2])
    inputs[name] = change(inputs.get(name))
    with reduce(case.model, "divprune", 6), pytest.raises(UserError, match=words):
        case.generate(inputs)


def test_a_budget_that_images_alone_can_meet():
    """Five tokens of eight frames are refused when they come, not for images."""
    case = shared("video")
    inputs = case.batch(TEXTS[1:2])
    with reduce(case.model, "fastervlm", 5) as reduced:
        case.model(**inputs)
        assert reduced.accounting[0].mean == 5
    with pytest.raises(UserError, match="1 to 136"):
        reduce(case.model, "fastervlm", 137)


def test_a_video_without_frames():
    """It ended in an error of a tensor's shape."""
    case = shared("video")
    inputs = case.prepare(["USER: <image> what is it ASSISTANT:"], [drawn_image(0)])
    inputs |= {"pixel_values_videos": torch.zeros(1, 0, 3, 56, 56)}
    with reduce(case.model, "uniform", 6), pytest.raises(UserError, match="pixel_values_videos"):
        case.model(**inputs)
    with pytest.raises(UserError, match="video"):
        Video(())


def in_thread(function):
    """What a function returns in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# Copies


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_cannot_be_copied_inside(family):
    """copy.deepcopy inside gave a model that ran the original's weights and stayed reduced for ever."""
    case = stock(family)  # of its own: transformers leaves hooks on a model that gave attentions, which nothing pickles
    with reduce(case.model, "visiondrop", budget=6):
        for copied in (copy.deepcopy, pickle.dumps):
            for part in (case.model, case.model.model):
                with pytest.raises(UserError, match="before or after the `with reduce"):
                    copied(part)
    other = copy.deepcopy(case.model)
    assert "forward" not in vars(other) and other.lm_head is not case.model.lm_head


# Arguments of a call


def test_every_argument_of_the_models_own_forward_is_used_or_refused(case):
    """An argument that a later version of transformers adds must not be ignored either."""
    inputs = case.batch(TEXTS[1:2])
    names = set(inspect.signature(type(case.model).forward).parameters) - {"self", "kwargs"}
    used = {*inputs, "pixel_values", "pixel_values_images", "pixel_values_videos", "past_key_values", "use_cache"}
    used |= {"video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "attention_mask", "image_sizes"}
    with reduce(case.model, "visiondrop", budget=6):
        for name in (names - used) | {"output_attentions", "output_hidden_states", "cu_seq_lens_q", "cache_position"}:
            with pytest.raises(UserError, match=name):
                case.model(**inputs, **{name: 7})
        # They had no effect: the staged forward makes its own positions.
        with pytest.raises((UserError, ValueError), match="position_ids"):
            case.generate(inputs, position_ids=2 * torch.arange(inputs["input_ids"].shape[1])[None])


def test_outputs_of_layers_are_refused_however_they_are_asked_for(own):
    """generate(output_hidden_states=True) and the flag in the config; the first once ended in a TypeError."""
    inputs = own.batch(TEXTS[1:2])
    with reduce(own.model, "visiondrop", budget=6):
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(UserError, match=name):
                own.generate(inputs, return_dict_in_generate=True, **{name: True})
    own.model.config.output_hidden_states = True
    with reduce(own.model, "visiondrop", budget=6), pytest.raises(UserError, match=r"output_hidden_states .*config"):
        own.model(**inputs)


def test_an_assistant_model_is_refused(llava, own):
    """transformers said that `rows_per_prompt`, an argument of ours, is not used by the model."""
    inputs, text = llava.batch(TEXTS[1:2]), llava.prepare(TEXTS[2:3], [])
    plain = llava.generate(text, assistant_model=own.model)
    with reduce(llava.model, "visiondrop", budget=6):
        for asked in ({"assistant_model": own.model}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(UserError, match="assistant_model and prompt_lookup_num_tokens"):
                llava.generate(inputs, **asked)
        assert torch.equal(llava.generate(text, assistant_model=own.model), plain)


# The state of the model


def test_training_mode_inside_is_refused(own):
    """model.train() inside the block ran with dropout; so does one module in training mode."""
    inputs = own.batch(TEXTS[1:2])
    with reduce(own.model, "visiondrop", budget=6):
        held = own.model(**inputs).past_key_values
        for part in (own.model, own.model.model.vision_tower.encoder.layers[0].self_attn):
            part.train()
            with pytest.raises(UserError, match=r"is in training mode; call model\.eval"):
                own.model(**inputs)
            if part is own.model:
                with pytest.raises(UserError, match="training mode"):
                    own.model(input_ids=torch.tensor([[5]]), past_key_values=held)
            own.model.eval()
        own.model(**inputs)


@pytest.mark.parametrize(
    "path", ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.language_model", None]
)
def test_a_part_or_setting_that_changes_inside_is_refused(own, path):
    """A tower or head that was replaced inside the block was ignored."""
    inputs = own.batch()
    with reduce(own.model, "visiondrop", budget=6):
        own.model(**inputs)
        if path is None:
            own.model.config.vision_feature_layer = -1
        else:
            owner, _, name = path.rpartition(".")
            setattr(own.model.get_submodule(owner), name, copy.deepcopy(own.model.get_submodule(path)))
        with pytest.raises(UserError, match=r"was changed after reduce\(\.\.\.\)"):
            own.model(**inputs)
    with reduce(own.model, "visiondrop", budget=6):
        own.model(**inputs)


# Forward hooks


def test_a_hook_runs_or_is_refused(case):
    """Hooks on the tower, `language_model` and `model` were never called. Every module of the model is tried."""
    inputs, names = case.batch(TEXTS[1:2]), []
    handles = [
        module.register_forward_hook(lambda module, given, out, name=name: names.append(name))
        for name, module in case.model.named_modules()
    ]
    case.model(**inputs)
    for handle in handles:
        handle.remove()
    run, refused = [], []
    for name in dict.fromkeys(names):
        calls, module = [], case.model.get_submodule(name)
        handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        try:
            with reduce(case.model, "full"):
                case.model(**inputs)
            assert calls, name
            run.append(name)
        except UserError as error:
            assert f"of {name} has no effect" in str(error) and not calls
            refused.append(name)
        finally:
            handle.remove()
    tower = "model.visual" if "Qwen" in type(case.model).__name__ else "model.vision_tower"
    tower = "model.image_tower" if hasattr(case.model.model, "image_tower") else tower
    if tower == "model.visual":  # the model's own forward
        assert not refused
    else:
        assert {"model", "model.language_model", tower} <= set(refused)
    assert {"", "lm_head", "model.language_model.layers.0", "model.language_model.layers.3.mlp"} <= set(run)


def test_hooks_that_come_later_and_replaced_forwards(own):
    inputs, inner = own.batch(TEXTS[1:2]), own.model.model
    with reduce(own.model, "visiondrop", budget=6):
        held = own.model(**inputs).past_key_values
        handle = inner.language_model.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(UserError, match=r"model\.language_model"):
            own.model(input_ids=torch.tensor([[5]]), past_key_values=held)
        handle.remove()
        inner.vision_tower.forward = inner.vision_tower.forward  # as accelerate replaces it
        with pytest.raises(UserError, match=r"model\.vision_tower"):
            own.model(**inputs)
        del inner.vision_tower.forward
        assert not any(module._forward_pre_hooks for module in own.model.modules())


def test_the_hooks_of_transformers_itself_are_no_obstacle(own):
    """A plain call with output_hidden_states leaves hooks on the model."""
    inputs = own.batch(TEXTS[1:2])
    own.model(**inputs, output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in own.model.modules())
    with reduce(own.model, "visiondrop", budget=6) as reduced:
        own.generate(inputs)
    assert reduced.accounting[0].mean == 6


# Other ways to the model


def test_the_inner_model_is_not_run_with_images(case):
    """model.model(...) inside the block ran unreduced."""
    inputs, text = case.batch(TEXTS[1:2]), case.prepare(TEXTS[2:3], [])
    plain = case.model.model(**text).last_hidden_state
    with reduce(case.model, "visiondrop", budget=6):
        with pytest.raises(UserError, match=f"call the {type(case.model).__name__} itself"):
            case.model.model(**inputs)
        assert torch.equal(case.model.model(**text).last_hidden_state, plain)


def test_prompts_without_images_keep_their_positions(case):
    """A padded batch of texts, after a prompt with images: bit-equal to the plain model, positions included."""
    texts = ("USER: where is it ASSISTANT:", "USER: is there a star on the left of the tree? ASSISTANT:")
    inputs = case.prepare(texts, [])
    plain = case.generate(inputs, return_dict_in_generate=False, output_scores=True)
    with reduce(case.model, "visiondrop", budget=6):
        case.generate(case.batch())
        assert torch.equal(case.generate(inputs), plain)


def test_another_thread_is_not_reduced_in_silence(llava):
    """A plain call of another thread was reduced; now it is refused, and texts pass."""
    inputs, text = llava.batch(TEXTS[1:2]), llava.prepare(TEXTS[2:3], [])
    plain = llava.model(**text).logits
    with reduce(llava.model, "visiondrop", budget=6) as reduced:
        held = llava.model(**inputs).past_key_values
        for run in (
            lambda: llava.model(**inputs),
            lambda: llava.generate(inputs, num_beams=2),
            lambda: llava.model(input_ids=torch.tensor([[5]]), past_key_values=held),
        ):
            with pytest.raises(UserError, match="Another thread"):
                in_thread(run)
        assert torch.equal(in_thread(lambda: llava.model(**text).logits), plain)
        ids = llava.generate(inputs)
        assert len(reduced.accounting) == 1

    def entered_there():
        with reduce(llava.model, "visiondrop", budget=6):
            return llava.generate(inputs)

    assert torch.equal(in_thread(entered_there), ids)


def test_a_thread_streams_inside_the_block(llava):
    """With the block's context it is reduced. Without, the loop over the streamer waited for ever."""
    inputs, errors = llava.batch(TEXTS[1:2]), []
    asked = {**inputs, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

    def streamed(kwargs, context=None):
        """What is read of a thread that has begun in a context, if one is given."""
        target, args = (llava.model.generate, ()) if context is None else (context.run, (llava.model.generate,))
        streamer = TextIteratorStreamer(llava.tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=target, args=args, kwargs={**kwargs, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    hook, threading.excepthook = threading.excepthook, lambda seen: errors.append(seen.exc_value)
    try:
        with reduce(llava.model, "visiondrop", budget=6) as reduced:
            expected = llava.tokenizer.decode(llava.generate(inputs)[0])
            text = streamed(asked, copy_context())
            assert text.split() == expected.split() and reduced.accounting[0].mean == 6 and not errors
        # The refusal is raised where the block is left; so is another error of a thread that streams.
        before = copy_context()
        for context, kwargs, words in (
            (lambda: None, asked, "Another thread"),
            (lambda: before, asked, "Another thread"),
            (copy_context, {**asked, "position_ids": inputs["input_ids"]}, "position_ids"),
        ):
            with pytest.raises((UserError, ValueError), match=words), reduce(llava.model, "visiondrop", budget=6):
                assert streamed(kwargs, context()).strip() == ""
        with pytest.raises(RuntimeError, match="the block's own"), reduce(llava.model, "visiondrop", budget=6):
            streamed(asked)
            raise RuntimeError("the block's own")
        assert len(errors) == 4 and "forward" not in vars(llava.model)
    finally:
        threading.excepthook = hook


def test_another_task_is_not_reduced_in_silence(llava):
    """Tasks of one thread passed for the one that had entered the block."""
    inputs = llava.batch(TEXTS[1:2])
    ids = reduced_ids = None

    async def both():
        nonlocal ids, reduced_ids
        entered, left = asyncio.Event(), asyncio.Event()

        async def plain():
            await entered.wait()
            try:
                with pytest.raises(UserError, match="task"):
                    llava.generate(inputs)
            finally:
                left.set()

        task = asyncio.create_task(plain())
        with reduce(llava.model, "visiondrop", budget=6) as reduced:
            entered.set()
            await left.wait()
            reduced_ids = await asyncio.to_thread(llava.generate, inputs)
            assert reduced.accounting[0].mean == 6
            ids = llava.generate(inputs)
        await task

    asyncio.run(both())
    assert torch.equal(ids, reduced_ids)


# torch.compile

COMPILED = ("the model", "a call", "forward", "inside", "model.vision_tower", "model.visual", "model.language_model")


@pytest.mark.slow
@pytest.mark.parametrize("part", COMPILED)
@pytest.mark.parametrize(("name", "method", "budget"), [("llava", "visiondrop", 6), ("qwen2.5", "fastv", 16)])
def test_compiled_models(name, method, budget, part):
    """Dynamo traced into the method: "Cannot access data pointer of Tensor", or endless recursion in a probed layer."""
    case = stock(name)
    if part in ("model.vision_tower", "model.visual") and not hasattr(case.model.model, part.partition(".")[2]):
        pytest.skip("another family's tower")
    inputs, called = case.batch(TEXTS[1:2]), case.model
    plain = case.generate(inputs)
    with reduce(case.model, method, budget):
        expected = case.generate(inputs)
    torch._dynamo.reset()
    if part == "a call":
        called = torch.compile(case.model, backend="eager")
    elif part == "forward":
        case.model.forward = torch.compile(case.model.forward, backend="eager")
    elif part != "inside":
        case.model.get_submodule(part if "." in part else "").compile(backend="eager")
    with reduce(called, method, budget) as reduced:
        if part == "inside":
            called = torch.compile(case.model, backend="eager")
        logits = called(**inputs).logits
        assert reduced.accounting[0].mean <= budget and logits.isfinite().all()
        ids = called.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(ids[:, -8:], expected) and not torch.equal(expected, plain)
    ids = called.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(ids[:, -8:], plain)
