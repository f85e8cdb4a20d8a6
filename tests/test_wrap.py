"""`reduce` on Hugging Face models: at full budget nothing changes; below it tokens are gone from every layer.

The options of `generate` work, and the model is restored after the block.
"""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload

from llava import load, reduce
from llava.errors import UserError
from llava.hf.patch import ReducedCache
from llava.pipeline.accounting import TokenAccounting
from llava.pipeline.generate import generate
from llava.processing.image import best_resolution
from llava.processing.prompt import Sample
from llava.reduction import registry
from tests import contract
from tests.checkpoint_files import SAVERS
from tests.conftest import QUESTIONS, drawn_image
from tests.stock_inputs import FAMILIES, SIZES, TEXTS, shared, stock, with_pad
from tests.tiny_checkpoints import make_tokenizer, save_text_tower
from tests.tiny_checkpoints_families import (
    FRAMES,
    PINPOINTS,
    make_tiny_next,
    save_next_transformers,
)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return shared(request.param)


@pytest.fixture
def llava():
    return shared("llava")


HUB = {"next": "llava_next", "video": "video_llava", "qwen2.5": "qwen2_5_vl", "qwen2": "qwen2_5_vl"}


# One that acts before the decoder and one that acts inside.
METHODS: dict[str, dict] = {"fastervlm": {}, "visiondrop": {"official": True}}


def last_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1:]


def test_importing_the_package_is_cheap():
    subprocess.run([sys.executable, "-c", "import sys, llava; assert 'torch' not in sys.modules"], check=True)
    with pytest.raises(ImportError, match="reduces"):
        from llava import reduces  # noqa: F401


def test_full_budget_gives_the_models_own_logits_and_ids(case):
    """A batch with padding, two images in one prompt, and a prompt without any."""
    inputs = case.batch()
    plain, ids = last_logits(case.model, inputs), case.generate(inputs)
    with reduce(case.model, "full") as reduced:
        torch.testing.assert_close(case.model(**inputs).logits, plain, atol=2e-4, rtol=0)
        assert torch.equal(case.generate(inputs), ids)
    assert [accounting.images for accounting in reduced.accounting] == [2, 1, 1, 1]
    assert reduced.accounting[2].tokens_per_layer == (0,) * 4
    # Only LLaVA-NeXT's sizes say where images lie; LLaVA-1.5's processor crops, unless a caller has padded before.
    known = hasattr(case.model.config, "image_grid_pinpoints")
    assert [accounting.on_padding is not None for accounting in reduced.accounting] == [known, known, True, known]


def test_padding_on_the_right_is_no_different(case):
    inputs = case.batch()
    case.tokenizer.padding_side = "right"
    other = case.batch()
    case.tokenizer.padding_side = "left"
    assert not torch.equal(inputs["attention_mask"], other["attention_mask"])
    for name, options in METHODS.items():
        with reduce(case.model, name, budget=6, **options):
            torch.testing.assert_close(case.model(**other).logits, case.model(**inputs).logits, atol=2e-4, rtol=0)


def test_tokens_are_gone_from_every_layers_cache(case):
    inputs = case.batch()
    for name, options in METHODS.items():
        with reduce(case.model, name, budget=6, **options) as reduced:
            out = case.model.generate(
                **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
            )
        for layer, held in enumerate(out.past_key_values.layers):
            entering = [accounting.tokens_per_layer[layer] for accounting in reduced.accounting]
            # Two of the three new tokens were fed.
            lengths = [text + count + 2 for text, count in zip(case.text_tokens(inputs), entering, strict=True)]
            assert held.keys.shape[-2] == max(lengths)
            (segment,) = (one for one in out.past_key_values.segments if layer in one.layers)
            assert segment.valid.sum(1).tolist() == lengths
        assert entering[0] < 16 and max(lengths) < inputs["input_ids"].shape[1]
        assert [len(trace) > 0 for trace in reduced.traces] == [True, True, False, True]
        assert all(
            isinstance(accounting, TokenAccounting) and accounting.planned == accounting.mean
            for accounting in reduced.accounting
        )


def test_generates_what_our_own_model_answers(case, tmp_path, request):
    """The same image and prompt through `Llava.answer`, with the question known, under the same preprocessing."""
    family = request.node.callspec.params["case"]
    SAVERS[f"{HUB.get(family, family)} transformers"](tmp_path, case.model)
    ours = load(tmp_path, device="cpu", **({"anyres_rule": "transformers"} if family == "next" else {}))
    # Square, so that padding and cropping are the same; resized by neither side in another way.
    image = drawn_image(5, (112, 112))
    sample = Sample("q", QUESTIONS[2], suffix="", image=image)
    text = ours.prompt(sample).text
    text = text.replace("<|vision_start|><image><|vision_end|>", "<image>")
    if "Qwen" in type(case.model).__name__:
        ours.image_processor = type(ours.image_processor)(min_pixels=16 * 28 * 28, max_pixels=64 * 28 * 28)
    inputs = case.prepare([text], [image])
    rows = case.model.config.text_config.vocab_size
    # Nothing ends an answer, and the rows that no token has are never chosen.
    ours.end_ids, free = frozenset(), {"min_new_tokens": 0, "eos_token_id": rows - 1}
    free["suppress_tokens"] = list(range(ours.vocabulary, rows))
    names = {**METHODS, "full": {}, "attnmix": {}, "consensusdrop": {}, "mmtok": {}}
    if family.startswith("qwen"):  # whose features were those before the projector here, and projected in `reduce`
        names |= {"sparsevlm": {"schedule": "kept"}, "dart": {"official": True}}
        more = "divprune globalcom2 hired holov uniform vscan scope prumerge prumerge_plus visionzip vispruner"
        names |= {name: {} for name in more.split()}
    for name, options in names.items():
        budget = 8 if name != "full" else ours.visual_tokens
        (answer,) = generate(ours, [sample], registry.build(name, budget, options), max_new_tokens=8).answers
        with reduce(case.model, name, budget, questions=[sample.question], tokenizer=case.tokenizer, **options) as done:
            ids = case.generate(inputs, **free)[0].tolist()
        assert tuple(ids) == answer.token_ids and len(ids) == 8, name
        # A processor's pixels do not say where they are padded.
        (counted,) = (replace(one, on_padding=None) for one in done.accounting)
        assert counted == replace(answer.accounting, on_padding=None)
        for ours_step, theirs in zip(answer.trace, done.traces[0], strict=True):
            assert torch.equal(ours_step.reduction.kept, theirs.reduction.kept)


def test_videos_keep_the_class_token_of_every_frame():
    case = shared("video")
    texts = ("USER: <video> what is it ASSISTANT:", "USER: <image> where is the cat ASSISTANT:", "is there a star")
    frames = [drawn_image(seed, (70, 50)) for seed in range(FRAMES)]
    inputs = case.prepare(texts, [drawn_image(9)], [frames])
    plain, ids = last_logits(case.model, inputs), case.generate(inputs)
    with reduce(case.model, "full") as reduced:
        torch.testing.assert_close(case.model(**inputs).logits, plain, atol=2e-4, rtol=0)
        assert torch.equal(case.generate(inputs), ids)
        assert [accounting.visual_tokens for accounting in reduced.accounting] == [FRAMES * 17, 16, 0]
    # The newer name of the same pixels.
    inputs["pixel_values"] = inputs.pop("pixel_values_images")
    with reduce(case.model, "fastervlm", budget=8) as reduced:
        case.model(**inputs)
        assert [accounting.tokens_per_layer for accounting in reduced.accounting] == [(8,) * 4, (8,) * 4, (0,) * 4]


def test_tiles_are_those_of_the_processor():
    """Sizes at which the original reading takes other tiles; pixels padded to the batch's largest image, or not."""
    case, sizes = shared("next"), ((40, 90), (90, 40), (50, 50), (112, 112))
    assert any(best_resolution(size, PINPOINTS) != best_resolution(size, PINPOINTS, "transformers") for size in sizes)
    texts = [f"USER: <image> {QUESTIONS[i]} ASSISTANT:" for i in range(4)]
    inputs = case.prepare(texts, [drawn_image(seed, size) for seed, size in enumerate(sizes)])
    plain = last_logits(case.model, inputs)
    counts = [(crops.flatten(1).abs().sum(1) > 0).sum() for crops in inputs["pixel_values"]]
    assert min(counts) < max(counts)
    flat = {**inputs, "pixel_values": torch.cat([c[:n] for c, n in zip(inputs["pixel_values"], counts, strict=True)])}
    seen, tower = [], case.model.model.vision_tower.embeddings
    handle = tower.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    with reduce(case.model, "full"):
        torch.testing.assert_close(case.model(**inputs).logits, plain, atol=2e-4, rtol=0)
        torch.testing.assert_close(case.model(**flat).logits, plain, atol=2e-4, rtol=0)
    handle.remove()
    assert seen == [sum(counts)] * 2  # nothing that was only filled up


def test_a_method_that_needs_the_text_tower(tmp_path):
    case = shared("llava")
    save_text_tower(tmp_path, case.model)
    make_tokenizer().save_pretrained(tmp_path)
    inputs = case.batch()
    questions = [text.split("<image>")[-1].split("ASSISTANT:")[0].strip() for text in TEXTS]
    with reduce(
        case.model, "cdpruner", 5, questions=questions, tokenizer=case.tokenizer, text_tower=tmp_path
    ) as reduced:
        first = case.model(**inputs).logits
        traces = reduced.traces
        with pytest.raises(UserError, match="1 prompts and 4 questions"):
            case.model(**case.batch(TEXTS[:1]))
        reduced.questions = [f" {questions[0]}\n", *questions[1:]]
        assert torch.equal(case.model(**inputs).logits, first)
        reduced.questions = ["color", *questions[1:]]
        case.model(**inputs)
        assert not torch.equal(reduced.traces[0][0].reduction.kept, traces[0][0].reduction.kept)
    cpu_offload(model := copy.deepcopy(case.model), "cpu")  # with the norm through which CLIP's space is reached
    with reduce(model, "cdpruner", 5, questions=questions, tokenizer=case.tokenizer, text_tower=tmp_path):
        assert torch.equal(model(**inputs).logits, first)
    with pytest.raises(UserError, match="text_tower"):
        reduce(case.model, "cdpruner", 5)


@pytest.mark.parametrize("method", contract.METHODS)
def test_a_prompt_may_end_with_its_image_or_be_it(method, tmp_path):
    """Methods that read text took the column behind the last one, and the whole batch ended in an IndexError.

    A prompt of images alone ended in an error of the embedding under every method.
    """
    case, options = shared("llava"), {}
    budget = {"full": 16, "pyramiddrop": 10, "clse": 10, "feather": 7}.get(method, 12)
    usual, question = "USER: <image> where is the tree? ASSISTANT:", "is there a small cat?"
    if registry.method(method).needs_text_tower:
        save_text_tower(tmp_path, case.model)
        make_tokenizer().save_pretrained(tmp_path)
        options = {"tokenizer": case.tokenizer, "text_tower": tmp_path}
    elif registry.method(method).needs_words:
        options = {"tokenizer": case.tokenizer}

    def run(*texts):
        inputs = case.prepare(texts, [drawn_image(len(text)) for text in texts])
        if options:
            options["questions"] = [question if text.startswith("USER: is") else "where is the tree?" for text in texts]
        with reduce(case.model, method, budget, **options) as reduced:
            ids = case.generate(inputs)
        assert all(one.images == 1 and (method == "full" or one.mean < 16) for one in reduced.accounting)
        return ids, reduced.traces

    both, alone, other = run(usual, f"USER: {question} <image>"), run(f"USER: {question} <image>"), run(usual)
    assert torch.equal(both[0][0], other[0][0]) and torch.equal(both[0][1], alone[0][0])
    if method == "sparsevlm":  # text before the image sees nothing of it: equal scores, the first tokens
        kept = alone[1][0][0].reduction.kept[0].tolist()
        assert kept[:8] != list(range(8))
    if options:
        return
    inputs = case.prepare(["<image>"], [drawn_image(0)])
    begun = inputs["input_ids"]
    for ids in (begun, begun[begun == case.model.config.image_token_id][None]):
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with reduce(case.model, method, budget) as reduced:
            if method in ("attnmix", "consensusdrop", "dart"):
                with pytest.raises(UserError):
                    case.generate(inputs)
            else:
                assert case.generate(inputs).shape == (1, 8)
                assert method == "full" or reduced.accounting[0].mean < 16


def test_a_sliding_window_holds_as_far_as_it_reaches():
    case = stock("next")
    for window, fits in ((80, True), (70, False)):
        case.model = with_pad(make_tiny_next("mistral", sliding_window=window), case.tokenizer)
        inputs = case.prepare(TEXTS[1:2], [drawn_image(0, (60, 110))])
        assert inputs["input_ids"].shape[1] == 66
        ids = case.generate(inputs)
        with reduce(case.model, "full"):
            if fits:
                assert torch.equal(case.generate(inputs), ids)
            else:
                with pytest.raises(UserError, match="sliding window of 70"):
                    case.generate(inputs)
        with reduce(case.model, "fastervlm", budget=20) as reduced:
            assert case.generate(inputs).shape == (1, 8) and reduced.accounting[0].mean == 20


def test_a_cache_that_is_cut_does_not_hide_a_prompt_longer_than_the_window():
    """All 66 tokens enter layer 0; CLSE cuts its cache to fewer than 60 afterwards."""
    case = stock("next")
    case.model = with_pad(make_tiny_next("mistral", sliding_window=60), case.tokenizer)
    inputs = case.prepare(TEXTS[1:2], [drawn_image(0, (60, 110))])
    with reduce(case.model, "clse", budget=24), pytest.raises(UserError, match=r"window of 60.* has 66 tokens"):
        case.generate(inputs)


def test_a_window_that_is_not_applied_forgets_no_keys(tmp_path):
    """The cache once took the window from the configuration: decoding dropped keys that the prefill had attended."""
    answers = []
    for window in (None, 20):
        save_next_transformers(tmp_path / str(window), make_tiny_next("mistral", sliding_window=window))
        model = load(tmp_path / str(window), device="cpu")
        sample = Sample("q", QUESTIONS[0], image=drawn_image(0, (60, 110)))
        reducer = registry.build("full", model.visual_tokens)
        answers.append(generate(model, [sample], reducer, max_new_tokens=8).answers[0])
    assert answers[0].token_ids == answers[1].token_ids and answers[0].accounting == answers[1].accounting


def test_a_budget_may_be_a_ratio(llava):
    """`reduce(model, "random", "1/9")`, as the command line writes it, was refused."""
    for budget in ("1/2", "0.5", 0.5):
        with reduce(llava.model, "random", budget) as reduced:
            last_logits(llava.model, llava.prepare(TEXTS[1:2], [drawn_image(0)]))
        assert reduced.accounting[0].mean == reduced.accounting[0].visual_tokens / 2


def test_a_budget_is_needed_unless_images_decide(llava):
    """`reduce(model, "consensusdrop")` reduced nothing, without a word."""
    for name in ("consensusdrop", "visiondrop", "tome", "hired", "attnmix"):
        options = {"official": True} if name in ("hired", "attnmix") else {}
        with pytest.raises(UserError, match=f'{name} needs a budget: .* .budget="1/9".*"full" keeps all'):
            reduce(llava.model, name, **options)
    assert reduce(llava.model, "prumerge", official=True).reducer.by_image


def test_the_score_of_a_beam_is_that_of_its_tokens(case):
    """Each beam of a reduced, padded batch, fed again token by token from a fresh prefill."""
    inputs = case.batch()
    with torch.no_grad(), reduce(case.model, "visiondrop", budget=6):
        asked = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
        asked |= {"eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
        found = case.model.generate(**inputs, **asked)
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
    """Several answers per prompt: each image stays with its prompt when rows are repeated.

    The model itself gets every prompt three times: transformers 5.17 mixed the images up when it repeated rows.
    """
    texts, images, seeds = [], [], iter(enumerate(SIZES))
    for text in TEXTS:
        texts += [text] * 3
        images += [drawn_image(*next(seeds)) for _ in range(text.count("<image>"))] * 3
    options, drawn = {"do_sample": True, "temperature": 2.0}, []
    torch.manual_seed(3)
    drawn.append(case.generate(case.prepare(texts, images), **options))
    torch.manual_seed(3)
    with reduce(case.model, "full"):
        drawn.append(case.generate(case.batch(), num_return_sequences=3, **options))
    assert torch.equal(*drawn) and len(drawn[0]) == 12
    assert len({tuple(row) for row in drawn[0].tolist()}) > 4


def test_the_model_is_what_it_was(case):
    inputs = case.batch()
    case.model.forward = case.model.forward  # replaced before
    plain = case.generate(inputs)
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    before = [dict(vars(module)) for module in case.model.modules()]
    for fails in (False, True):
        try:
            with reduce(case.model, "visiondrop", budget=6):
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
    del case.model.forward


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
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(step(llava, cache, [5, 5, 6, 6, 7, 7, 8, 8])[1::2], expected, atol=2e-4, rtol=0)


def test_a_cropped_cache_has_forgotten_and_is_refused_outside(llava):
    cache = prefilled(llava).past_key_values
    expected = step(llava, copy.deepcopy(cache), [5, 6, 7, 8])
    step(llava, cache, [9, 9, 9, 9])
    step(llava, cache, [9, 8, 7, 6])
    cache.crop(-2)
    assert torch.equal(step(llava, cache, [5, 6, 7, 8]), expected)
    with pytest.raises(UserError, match="inside the `with reduce"):
        llava.model(input_ids=torch.tensor([[5], [6], [7], [8]]), past_key_values=cache)
