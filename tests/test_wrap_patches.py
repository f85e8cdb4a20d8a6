"""What users do to a model inside `with reduce(...)`: it works as on the plain model, or is refused in one sentence."""

import copy
import inspect
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TextIteratorStreamer

from llava import reduce
from llava.errors import UserError
from tests.conftest import picture
from tests.stock_inputs import FAMILIES, TEXTS, stock
from tests.tiny_checkpoints import make_tokenizer, save_text_tower


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return stock(request.param)


@pytest.fixture(scope="module")
def llava():
    return stock("llava")


@pytest.fixture
def own():
    """A model that a test may change."""
    return stock("llava")


def method(case) -> str:
    return "divprune" if "Qwen" in type(case.model).__name__ else "visiondrop"


def in_thread(function):
    """What a function returns or raises in another thread."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


# Copies


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_cannot_be_copied_inside(family):
    """copy.deepcopy inside gave a model that ran the original's weights and stayed reduced for ever."""
    case = stock(family)  # of its own: transformers leaves hooks on a model that gave attentions, which nothing pickles
    with reduce(case.model, method(case), budget=6):
        for copied in (copy.deepcopy, pickle.dumps):
            for part in (case.model, case.model.model):
                with pytest.raises(UserError, match="before or after the `with reduce"):
                    copied(part)
    other = copy.deepcopy(case.model)
    assert "forward" not in vars(other) and other.lm_head is not case.model.lm_head


def test_a_shallow_copy_is_not_reduced_after_the_block(llava):
    inputs = llava.batch()
    plain = llava.model(**inputs).logits
    with reduce(llava.model, "visiondrop", budget=6):
        other = copy.copy(llava.model)
        assert other(**inputs).logits.shape[1] == 1
    assert torch.equal(other(**inputs).logits, plain)


# Arguments of a call


@pytest.mark.parametrize("name", ["position_ids", "cache_position"])
def test_own_positions_are_refused(case, name):
    """They had no effect: the staged forward makes its own."""
    inputs = case.batch(TEXTS[1:2])
    given = {name: 2 * torch.arange(inputs["input_ids"].shape[1])[None]}
    with reduce(case.model, method(case), budget=6):
        with pytest.raises(UserError, match=f"^{name} cannot be used here"):
            case.model(**inputs, **given)
        with pytest.raises((UserError, ValueError), match=name):
            case.generate(inputs, **given)
        held = case.model(**inputs).past_key_values
        with pytest.raises(UserError, match=f"^{name} cannot be used here"):
            case.model(input_ids=torch.tensor([[5]]), past_key_values=held, **{name: torch.tensor([[9]])})


def test_another_layer_or_selection_of_features_is_refused(llava):
    """A vision_feature_layer in the call had no effect; one that says what the config says changes nothing."""
    inputs = llava.batch(TEXTS[1:2])
    with reduce(llava.model, "visiondrop", budget=6):
        plain = llava.model(**inputs).logits
        same = llava.model(**inputs, vision_feature_layer=-2, vision_feature_select_strategy="default").logits
        assert torch.equal(same, plain)
        for name, value in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")):
            with pytest.raises(UserError, match=f"{name} must be that of the model's config"):
                llava.model(**inputs, **{name: value})


def test_every_argument_of_the_models_own_forward_is_used_or_refused(case):
    """An argument that a later version of transformers adds must not be ignored either."""
    inputs = case.batch(TEXTS[1:2])
    names = set(inspect.signature(type(case.model).forward).parameters) - {"self", "kwargs"}
    used = {*inputs, "pixel_values", "pixel_values_images", "pixel_values_videos", "past_key_values", "use_cache"}
    used |= {"video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "attention_mask", "image_sizes"}
    with reduce(case.model, method(case), budget=6):
        for name in (names - used) | {"output_attentions", "output_hidden_states", "cu_seq_lens_q"}:
            with pytest.raises(UserError, match=name):
                case.model(**inputs, **{name: 7})


def test_outputs_of_layers_are_refused_however_they_are_asked_for(own):
    """generate(output_hidden_states=True) and the flag in the config; the first once ended in a TypeError."""
    inputs = own.batch(TEXTS[1:2])
    for name in ("output_hidden_states", "output_attentions"):
        with reduce(own.model, "visiondrop", budget=6):
            for as_dict in (False, True):
                with pytest.raises(UserError, match=name):
                    own.generate(inputs, return_dict_in_generate=as_dict, **{name: True})
            held = own.model(**inputs).past_key_values
            with pytest.raises(UserError, match=name):
                own.model(input_ids=torch.tensor([[5]]), past_key_values=held, **{name: True})
    own.model.config.output_hidden_states = True
    with reduce(own.model, "visiondrop", budget=6), pytest.raises(UserError, match="set in the model's config"):
        own.model(**inputs)


def test_encoded_images_are_refused(llava):
    """Features in place of pixels went to the model's own forward, unreduced."""
    inputs = llava.batch(TEXTS[1:2])
    pixels = inputs.pop("pixel_values")
    features = llava.model.model.get_image_features(pixel_values=pixels)
    assert llava.model(**inputs, mm_encoder_outputs={"image": features}).logits.shape[1] > 1
    with reduce(llava.model, "visiondrop", budget=6), pytest.raises(UserError, match="needs pixels"):
        llava.model(**inputs, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("family", ["qwen2.5", "qwen2"])
def test_qwen_needs_the_token_types_that_its_positions_follow_from(family):
    """Without mm_token_type_ids transformers numbers image tokens as text, and logits differed by 0.82."""
    qwen = stock(family)
    inputs = qwen.batch()
    types = inputs.pop("mm_token_type_ids")
    with reduce(qwen.model, "full"):
        for run in (lambda: qwen.model(**inputs), lambda: qwen.generate(inputs)):
            with pytest.raises(UserError, match="needs mm_token_type_ids"):
                run()
        for wrong in (torch.zeros_like(types), types[:, 1:], 2 * types):
            with pytest.raises(UserError, match="must be 1 exactly where"):
                qwen.model(**inputs, mm_token_type_ids=wrong)


def test_a_budget_and_a_ratio_are_refused_together(llava):
    """The ratio won in silence: budget 8 with ratio 0.5 kept 16 tokens."""
    for ratio in (0.5, "0.5"):
        with pytest.raises(UserError, match="are both given for random; leave one out"):
            reduce(llava.model, "random", budget=8, retention_ratio=ratio)
    with reduce(llava.model, "random", retention_ratio=0.5) as reduced:
        llava.model(**llava.batch(TEXTS[1:2]))
    assert reduced.accounting[0].tokens_per_layer == (8,) * 4


def test_an_assistant_model_is_refused(llava, own):
    """transformers said that `rows_per_prompt`, an argument of ours, is not used by the model."""
    inputs, text = llava.batch(TEXTS[1:2]), llava.prepare(TEXTS[2:3], [])
    plain = llava.generate(text, assistant_model=own.model)
    with reduce(llava.model, "visiondrop", budget=6):
        for asked in ({"assistant_model": own.model}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(UserError, match="assistant model or prompt lookup"):
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
                with pytest.raises(UserError, match="is in training mode"):
                    own.model(input_ids=torch.tensor([[5]]), past_key_values=held)
            own.model.eval()
        own.model(**inputs)


@pytest.mark.parametrize(
    "path", ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.language_model"]
)
def test_a_part_that_is_replaced_inside_is_used(own, path):
    """A tower or head that was replaced inside the block was ignored."""
    inputs, (owner, _, name) = own.batch(), path.rpartition(".")
    owner = own.model.get_submodule(owner)
    new = copy.deepcopy(getattr(owner, name))
    with torch.no_grad():
        for weight in new.parameters():
            weight.mul_(1.5)
    with reduce(own.model, "visiondrop", budget=6):
        before, first = own.model(**inputs).logits, own.generate(inputs)
        setattr(owner, name, new)
        inside, ids = own.model(**inputs).logits, own.generate(inputs)
    assert not torch.equal(inside, before)
    with reduce(own.model, "visiondrop", budget=6):
        assert torch.equal(own.model(**inputs).logits, inside) and torch.equal(own.generate(inputs), ids)
    assert first.shape == ids.shape


def test_a_head_that_is_replaced_while_decoding_is_used(own):
    inputs, head = own.batch(TEXTS[1:2]), own.model.lm_head
    with reduce(own.model, "visiondrop", budget=6):
        held = own.model(**inputs).past_key_values
        own.model.lm_head = nn.Linear(head.in_features, 3, bias=False)
        assert own.model(input_ids=torch.tensor([[5]]), past_key_values=held).logits.shape == (1, 1, 3)


def test_the_text_tower_is_read_once(tmp_path):
    """Modules are looked up anew for each prefill, files are not."""
    own = stock("llava")
    save_text_tower(tmp_path, own.model)
    make_tokenizer().save_pretrained(tmp_path)
    inputs, questions = own.batch(TEXTS[1:2]), ["is there"]
    with reduce(own.model, "cdpruner", 5, questions=questions, tokenizer=own.tokenizer, text_tower=tmp_path) as reduced:
        own.model(**inputs)
        tower = reduced._runtime.clip
        own.model(**inputs)
        assert reduced._runtime.clip is tower
        own.model.model.vision_tower = copy.deepcopy(own.model.model.vision_tower)
        own.model(**inputs)
        assert reduced._runtime.clip is not tower


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
    assert {"model", "model.language_model", tower} <= set(refused)
    assert {"", "lm_head", "model.language_model.layers.0", "model.language_model.layers.3.mlp"} <= set(run)


def test_hooks_that_come_later_and_replaced_forwards(own):
    inputs, inner = own.batch(TEXTS[1:2]), own.model.model
    with reduce(own.model, "visiondrop", budget=6):
        held = own.model(**inputs).past_key_values
        handle = inner.language_model.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(UserError, match=r"of model\.language_model has no effect"):
            own.model(input_ids=torch.tensor([[5]]), past_key_values=held)
        handle.remove()
        inner.vision_tower.forward = inner.vision_tower.forward  # as accelerate replaces it
        with pytest.raises(UserError, match=r"of model\.vision_tower has no effect"):
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
    with reduce(case.model, method(case), budget=6):
        with pytest.raises(UserError, match=f"call the {type(case.model).__name__} itself"):
            case.model.model(**inputs)
        assert torch.equal(case.model.model(**text).last_hidden_state, plain)


def test_prompts_without_images_keep_their_positions(case):
    """A padded batch of texts, after a prompt with images: bit-equal to the plain model, positions included."""
    texts = ("USER: where is it ASSISTANT:", "USER: is there a star on the left of the tree? ASSISTANT:")
    inputs = case.prepare(texts, [])
    plain = case.generate(inputs, return_dict_in_generate=False, output_scores=True)
    with reduce(case.model, method(case), budget=6):
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
            error = in_thread(run)
            assert isinstance(error, UserError) and "Another thread reduces this model" in str(error)
        assert torch.equal(in_thread(lambda: llava.model(**text).logits), plain)
        ids = llava.generate(inputs)
        assert len(reduced.accounting) == 1

    def entered_there():
        with reduce(llava.model, "visiondrop", budget=6):
            return llava.generate(inputs)

    assert torch.equal(in_thread(entered_there), ids)


def test_streaming_from_a_thread_that_enters_the_block(llava):
    """As with TextIteratorStreamer: the thread that generates enters the context."""
    inputs = llava.prepare(TEXTS[1:2], [picture(0)])
    streamer = TextIteratorStreamer(llava.tokenizer, skip_prompt=True, timeout=60)
    done = SimpleNamespace(ids=None)

    def answer():
        with reduce(llava.model, "visiondrop", budget=6):
            done.ids = llava.generate(inputs, streamer=streamer)[0]

    thread = threading.Thread(target=answer)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == llava.tokenizer.decode(done.ids) and len(done.ids) == 8


def test_settings_that_change_inside_are_not_ignored(own):
    """As modules are: each prefill compares what the model wrapper was built from."""
    inputs, config = own.batch(TEXTS[1:2]), own.model.config
    with reduce(own.model, "visiondrop", budget=6):
        before = own.model(**inputs).logits
        config.vision_feature_layer = -1
        other = own.model(**inputs).logits
        assert not torch.equal(other, before)
        config.vision_feature_select_strategy = "full"
        with pytest.raises(UserError, match="without the class token"):
            own.model(**inputs)
    config.vision_feature_select_strategy = "default"
    with reduce(own.model, "visiondrop", budget=6):
        assert torch.equal(own.model(**inputs).logits, other)
