"""The control `none`: what it answers is what the model answers to the text of the prompt alone."""

import dataclasses

import pytest
import torch

from eval import __main__ as cli
from llava import reduce
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.hf.families import FamilyWrapper
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate, prefill
from llava.processing.prompt import Prompt, Sample
from llava.reduction import registry
from tests.conftest import QUESTIONS, drawn_image, samples
from tests.eval_fakes import write_gqa
from tests.stock_families import NAMES, call
from tests.stock_families import tiny as family
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    save_next_transformers,
    save_qwen_transformers,
)

BLIND = registry.build("none", None)
STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def without_tower(model: Llava, monkeypatch) -> None:
    """Any call of the tower is an error from here on."""
    monkeypatch.setattr(type(model), "encode_images", lambda *_: pytest.fail("the tower ran"))


def text_logits(model: Llava, sample: Sample) -> torch.Tensor:
    """transformers' own logits of the prompt's text, with nothing in the place of its images."""
    ids = torch.tensor([[token for token in model.prompt(sample).ids if token >= 0]])
    with torch.no_grad():
        return model.hf_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1, : model.vocabulary]


@pytest.fixture(params=["llava", "next", "qwen"])
def model(request, tiny, tmp_path) -> Llava:
    if request.param == "next":
        save_next_transformers(tmp_path, make_tiny_next("mistral"))
        return load(tmp_path, device="cpu")
    if request.param == "qwen":
        save_qwen_transformers(tmp_path, make_tiny_qwen("2.5"))
        return load(tmp_path, device="cpu", min_pixels=112**2, max_pixels=112**2)
    return tiny


def test_logits_are_those_of_the_text_alone(model, monkeypatch):
    """Of the same positions, too: those of the unreduced prompt change half of the toy's answers.

    Other pixels change nothing, the tower does not run, and an image is still counted as one that was shown.
    """
    without_tower(model, monkeypatch)
    two = Sample("two", QUESTIONS[0], image=(drawn_image(1), drawn_image(2)))
    batch = [*samples(4, text_only=(3,)), two]
    others = [
        dataclasses.replace(one, image=tuple(drawn_image(90 + i, (44, 60)) for i, _ in enumerate(one.images)) or None)
        for one in batch
    ]
    for asked in (batch, others):
        state, record = prefill(model, asked, BLIND)
        logits = model.logits(state.hidden)
        for row, sample in enumerate(batch):
            torch.testing.assert_close(logits[row], text_logits(model, sample), atol=2e-5, rtol=0)
        accounts = record.accounting(state)
        assert [one.tokens_per_layer for one in accounts] == [(0,) * 4] * len(batch)
        assert [(one.images, one.asked, one.planned) for one in accounts] == [(1, 0, 0)] * 4 + [(2, 0, 0)]
        assert accounts[4].visual_tokens == sum(image.layout.tokens for image in record.images[4]) > 0
        assert accounts[0].on_padding == 0 and not accounts[0].merged
        alone = record.operations.alone
        assert alone.get("tower", 0) == alone.get("projector", 0) == 0 < alone["prefill"]
    answers = [generate(model, asked, BLIND, max_new_tokens=4).answers for asked in (batch, others)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_answers_the_text_alone(name, monkeypatch):
    """In `reduce` too, in a batch of unequal prompts and while decoding, with the words around an image kept."""
    model, inputs = family(name), call(name, (1, 2))
    wrapper = FamilyWrapper(model)
    visual = torch.isin(inputs["input_ids"], torch.tensor([wrapper.token("image"), wrapper.token("video")]))
    monkeypatch.setattr(FamilyWrapper, "views_of", lambda *_: pytest.fail("the tower ran"))
    with reduce(model, "none") as reduced:
        both = model.generate(**inputs, **STEPS, **LOGITS)
    assert [one.tokens_per_layer for one in reduced.accounting] == [(0,) * 4] * 2
    assert sum(one.visual_tokens for one in reduced.accounting) == int(visual.sum())
    for row in range(2):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool() & ~visual[row]][None]
        kinds = {key: torch.zeros_like(ids) for key in inputs if "token_type" in key}
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kinds, **STEPS, **LOGITS)
        for together, single in zip(both.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[row], single[0], atol=2e-5, rtol=0)


def test_nothing_but_the_images_leaves_a_prompt():
    """Spans of the question move with their tokens, also one that begins before an image."""
    image = IMAGE_TOKEN_INDEX
    prompt = Prompt((1, image, 5, image, 6, 7), (2, 5), (4, 6), "").without_images()
    assert prompt.ids == (1, 5, 6, 7) and (prompt.question, prompt.instruction) == ((1, 3), (2, 4))
    with pytest.raises(UserError, match="only an image"):
        Prompt((image,), (0, 1), (0, 1), "").without_images()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "8"], "none keeps no visual token and takes no budget, got 8; leave it out."),
        (["--budget", "1/9"], "none keeps no visual token and takes no budget, got 0.111"),
        (["--set", "positions=original"], "none.positions must be one of renumber, got 'original'."),
        (["--set", "layer=3"], "Unknown option of none 'layer'."),
        (["--engine", "vllm"], "none cannot be used with --engine vllm"),
        (["--method", "none+fastv", "--budget", "8"], "none+fastv is no method"),
    ],
)
def test_what_none_does_not_take_is_one_sentence(words, said, tmp_path, capsys):
    data = write_gqa(tmp_path, 4)
    assert cli.main(["--method", "none", "--data", str(data), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_full_and_none_come_first_and_once():
    args = cli.parser().parse_args(["--method", "uniform,none,full", "--budget", "8,16"])
    found = [(one.method, one.budget) for one in cli.configurations(args)]
    assert found == [("full", None), ("none", None), ("uniform", 8), ("uniform", 16)]
