"""What `reduce` makes of a processor's token ids, and what it refuses, each in one sentence."""

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
)

from llava import reduce
from llava.errors import UserError
from llava.hf.inputs import question_span, samples
from llava.hf.models import PreparedImage
from llava.processing.prompt import IMAGE_TOKEN_INDEX
from llava.reduction.token_layout import single
from tests.stock_inputs import TEXTS, stock
from tests.tiny_checkpoints import make_tokenizer

A, B = 90, 91  # two tokens that stand for pictures
SLOT = IMAGE_TOKEN_INDEX


def ready(*counts: int) -> list[PreparedImage]:
    return [PreparedImage(torch.zeros(1, 3, 1, 1), single(1, count)) for count in counts]


@pytest.fixture(scope="module")
def llava():
    return stock("llava")


@pytest.fixture(scope="module")
def qwen():
    return stock("qwen2.5")


def test_runs_become_slots_and_padding_goes():
    """Neighbours of different lengths, two kinds of pictures, padding on both sides, a row without pictures."""
    ids = torch.tensor([[7, A, A, A, A, A, 8], [A, B, B, 5, A, A, 0], [0, 0, 0, 0, 1, 2, 3]])
    mask = torch.tensor([[1] * 7, [1] * 6 + [0], [0] * 4 + [1] * 3])
    pictures = ready(2, 3, 1, 2)
    films = ready(2)
    rows = samples(ids, mask, {A: pictures, B: films})
    assert [row.prompt.ids for row in rows] == [(7, SLOT, SLOT, 8), (SLOT, SLOT, 5, SLOT), (1, 2, 3)]
    assert [row.images for row in rows] == [tuple(pictures[:2]), (pictures[2], films[0], pictures[3]), ()]
    assert [row.prompt.question for row in rows] == [(3, 4), (4, 4), (0, 3)]
    assert len({row.id for row in rows}) == 3
    assert samples(ids[2:], mask[2:], {})[0].id == rows[2].id


@pytest.mark.parametrize(
    "row, counts, words",
    [
        ([7, A, A, A, 8], (2,), "more image tokens"),
        ([7, A, A, A, 8], (4,), "has 4 visual tokens, but its prompt 3 image tokens"),
        ([7, A, A], (2, 2), "image tokens for 1 of 2 images"),
        ([7, A, 8, A], (2,), "its prompt 1 image tokens"),
    ],
)
def test_prompts_and_pictures_that_do_not_fit(row, counts, words):
    with pytest.raises(UserError, match=words):
        samples(torch.tensor([row]), None, {A: ready(*counts)})


def test_a_question_is_found_where_it_stands():
    """The last place of several; behind, between and in front of pictures; exactly its tokens."""
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
        with pytest.raises(UserError, match="is not in its prompt"):
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


def test_a_known_question_changes_what_is_kept(llava):
    """For methods that look at the question, template and other words are left out of it."""
    inputs, found = llava.batch(TEXTS[:1]), []
    for questions in (None, ["color"], ["the tree?"]):
        tokenizer = None if questions is None else llava.tokenizer
        with reduce(llava.model, "attnmix", 6, questions=questions, tokenizer=tokenizer):
            found.append(llava.model(**inputs).logits)
    assert len({round(float(logits.sum()), 4) for logits in found}) == 3


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"method": "visiondrp"}, "Did you mean 'visiondrop'"),
        ({"offical": True}, "Did you mean 'official'"),
        ({"budget": 17}, "1 to 16"),
        ({"budget": 0}, "whole number of visual tokens, 1 or more"),
        ({"budget": 6.5}, "above 0 and up to 1"),
        ({"budget": "1/0"}, "above 0 and up to 1"),
        ({"method": "full", "budget": "1/2"}, "full keeps all"),
        ({"method": "full", "budget": 5}, "full keeps all 16"),
        ({"questions": ["is there a star?"]}, "needs `tokenizer`"),
        ({"questions": "is there a star?", "tokenizer": make_tokenizer()}, "one string per prompt"),
    ],
)
def test_what_cannot_be_asked_for(llava, arguments, words):
    with pytest.raises(UserError, match=words):
        reduce(llava.model, **{"method": "visiondrop", "budget": 6, **arguments})
    assert "forward" not in vars(llava.model)


def test_models_that_cannot_be_reduced(llava, qwen):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    for other in (LlamaForCausalLM(config), llava.model.model, nn.Linear(1, 1)):
        with pytest.raises(UserError, match=f"got {type(other).__name__}"):
            reduce(other, "uniform", 2)
    with pytest.raises(UserError, match="CLS"):
        reduce(qwen.model, "fastervlm", 6)
    model, text = llava.model, llava.model.model.language_model.config
    changes = [
        (model, "training", True, "call model.eval"),
        (model.config, "vision_feature_layer", [-2, -3], "from one tower layer"),
        (model.config, "vision_feature_layer", 99, "to 3 for a tower of 3 layers, got 99"),
        (model.config, "vision_feature_select_strategy", "full", "without the class token"),
        (text, "_attn_implementation", "flash_attention_2", "got 'flash_attention_2'"),
    ]
    for owner, name, value, words in changes:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            with pytest.raises(UserError, match=words):
                reduce(model, "visiondrop", 6)
        finally:
            setattr(owner, name, before)


def test_a_tower_that_is_no_clip(llava):
    config = llava.model.config.to_dict()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config["vision_config"] = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, **small}
    model = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    with pytest.raises(UserError, match="siglip_vision_model tower, llama decoder"):
        reduce(model, "visiondrop", 6)


def test_a_model_on_several_devices(llava):
    case = stock("llava")
    case.model.lm_head.to("meta")
    with pytest.raises(UserError, match="one device as a whole, it is on cpu, meta"):
        reduce(case.model, "visiondrop", 6)


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
        ({"output_attentions": True}, "attention maps"),
        ({"output_hidden_states": True}, "hidden states"),
        ({"use_cache": False}, "use_cache"),
        ({"logits_to_keep": 2}, "last token only"),
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(4, 9, 64)}, "inputs_embeds"),
        ({"attention_mask": torch.ones(4, 3)}, "attention_mask"),
        ({"mm_encoder_outputs": {}}, "needs pixels"),
        ({"pixel_values": torch.zeros(1, 4, 3, 56, 56)}, "4 axes"),
        ({"pixel_values": torch.zeros(3, 3, 56, 56)}, "more image tokens"),
    ],
)
def test_calls_that_cannot_be_served(llava, change, words):
    with reduce(llava.model, "visiondrop", 6), pytest.raises(UserError, match=words):
        llava.model(**{**llava.batch(), **change})


def test_questions_must_be_those_of_the_prompts(llava):
    inputs = llava.batch(TEXTS[:2])
    with reduce(llava.model, "visiondrop", 6, questions=["a star?"], tokenizer=llava.tokenizer) as reduced:
        with pytest.raises(UserError, match="2 prompts and 1 questions"):
            llava.model(**inputs)
        reduced.questions = ["a cat?", "a star?"]
        with pytest.raises(UserError, match="'a cat\\?' is not in its prompt"):
            llava.model(**inputs)


def test_caches_that_cannot_hold_a_reduced_prompt(llava):
    inputs = llava.batch(TEXTS[1:2])
    full = DynamicCache()
    llava.model(**llava.prepare(TEXTS[2:3], []), past_key_values=full)
    static = StaticCache(llava.model.config.text_config, max_cache_len=64)
    with reduce(llava.model, "visiondrop", 6):
        for cache in (full, static):
            with pytest.raises(UserError, match=f"got a {type(cache).__name__}"):
                llava.model(**inputs, past_key_values=cache)
        with pytest.raises(UserError, match="got a StaticCache"):
            llava.generate(inputs, cache_implementation="static")
        held = llava.model(**inputs).past_key_values
        for more in ({"input_ids": torch.tensor([[5, 6]])}, {**inputs}):
            with pytest.raises(UserError, match="one token per prompt"):
                llava.model(**more, past_key_values=held)
        with pytest.raises(UserError, match="holds 1 reduced prompts, got input_ids for 2"):
            llava.model(input_ids=torch.tensor([[5], [6]]), past_key_values=held)
        with pytest.raises(UserError, match="prompt lookup"):
            llava.generate(inputs, prompt_lookup_num_tokens=3)


def test_inputs_that_a_family_needs(qwen):
    case = stock("next")
    inputs = case.batch(TEXTS[1:2])
    with reduce(case.model, "fastervlm", 6):
        with pytest.raises(UserError, match="image_sizes"):
            case.model(**{**inputs, "image_sizes": None})
        with pytest.raises(UserError, match="do not fit pixel_values"):
            case.model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :2]})
    inputs = qwen.batch(TEXTS[1:2])
    with reduce(qwen.model, "divprune", 6):
        with pytest.raises(UserError, match="image_grid_thw"):
            qwen.model(**{**inputs, "image_grid_thw": None})
        with pytest.raises(UserError, match="counts"):
            qwen.model(**{**inputs, "pixel_values": inputs["pixel_values"][:-4]})
        with pytest.raises(UserError, match="as images"):
            qwen.model(**inputs, pixel_values_videos=inputs["pixel_values"])
    with reduce(qwen.model, "tome", 6), pytest.raises(UserError, match="behind the tower"):
        qwen.model(**inputs)


def test_a_budget_that_pictures_alone_can_meet():
    """Five tokens of eight frames are refused when they come, not for pictures."""
    case = stock("video")
    inputs = case.batch(TEXTS[1:2])
    with reduce(case.model, "fastervlm", 5) as reduced:
        case.model(**inputs)
        assert reduced.accounting[0].mean == 5
    with pytest.raises(UserError, match="1 to 136"):
        reduce(case.model, "fastervlm", 137)
