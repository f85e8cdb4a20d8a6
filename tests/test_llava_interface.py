"""LLaVA's own interface, called as its scripts call it: the answers are those of our own `generate`.

`from llava.model.builder import load_pretrained_model` was an ImportError under the name of LLaVA's own package.
"""

import json
from base64 import b64encode
from io import BytesIO

import pytest
import torch
from PIL import ImageOps
from torch.nn.utils.rnn import pad_sequence

from eval.config import ROOT
from llava import load, mm_utils
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import MODES, SeparatorStyle, conv_templates
from llava.errors import UserError
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.utils import disable_torch_init
from tests.checkpoint_files import SAVERS
from tests.conftest import QUESTIONS, SHORT, picture

SIZES = ((60, 44), (33, 120), (56, 56), (200, 51))
SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=["llava original", "llava transformers", "llava_next original"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    SAVERS[request.param](folder)
    return folder


def loaded(path, **options):
    options = {"device": "cpu", "torch_dtype": "float32", **options}
    return load_pretrained_model(str(path), None, get_model_name_from_path(str(path)), **options)


def prompt_of(*turns: str | None, mode: str = "vicuna_v1") -> str:
    conv = conv_templates[mode].copy()
    for number, text in enumerate(turns):
        conv.append_message(conv.roles[number % 2], text)
    return conv.get_prompt()


def ask(parts, question: str, image, **settings):
    """As llava/eval/model_vqa_loader.py asks one question."""
    tokenizer, model, image_processor, _ = parts
    prompt = prompt_of(f"{DEFAULT_IMAGE_TOKEN}\n{question}", None)
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    pixels = process_images([image], image_processor, model.config)[0][None].to(model.device, model.dtype)
    settings = {"do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 6, **settings}
    with torch.inference_mode():
        return model.generate(ids, images=pixels, image_sizes=[image.size], use_cache=True, **settings)


@pytest.mark.parametrize("method", ["full", "consensusdrop", "attnmix", "fastv"])
def test_a_script_gets_the_answers_of_our_own_generate(path, method):
    disable_torch_init()
    options = {"schedule": "kept"} if method == "fastv" else {}
    parts = loaded(path) if method == "full" else loaded(path, method=method, budget=6, **options)
    ours = load(path, device="cpu")
    reducer = registry.build(method, ours.visual_tokens if method == "full" else 6, options)
    for question, size in zip(QUESTIONS, SIZES, strict=False):
        image = picture(0, size)
        (answer,) = generate(ours, [Sample("q", question, SHORT, image)], reducer, max_new_tokens=6).answers
        (ids,) = ask(parts, f"{question}\n{SHORT}", image).tolist()
        ends = [[*answer.token_ids, *end] for end in ([], [ours.tokenizer.eos_token_id])]
        assert ids in ends and parts[1].reduced.accounting == [answer.accounting]
        assert parts[0].batch_decode([ids], skip_special_tokens=True)[0].strip() == answer.text
        pixels, wanted = process_images([image], parts[2], parts[1].config).flatten(0, -4), ours.views(image)[0]
        assert torch.equal(pixels[: len(wanted)], wanted)


def test_prompts_of_a_batch_are_padded_and_their_images_taken_in_order(path):
    tokenizer, model, processor, _ = loaded(path, method="fastervlm", budget=6)
    images = [picture(number, size) for number, size in enumerate(SIZES[:3])]
    texts = [f"<image>\n{QUESTIONS[0]}", QUESTIONS[1], f"<image>\n<image>\n{QUESTIONS[2]}, is it not"]
    rows = [tokenizer_image_token(prompt_of(text, None), tokenizer, return_tensors="pt") for text in texts]
    pixels = [process_images([image], processor, model.config)[0] for image in images]
    sizes, ids = [image.size for image in images], pad_sequence(rows, True, -1, "left")
    batch = model.generate(ids, images=pixels, image_sizes=sizes, attention_mask=ids != -1, **SIX)
    assert [audit.tokens_per_layer[0] // audit.images for audit in model.reduced.accounting] == [6, 0, 6]
    parts = ((rows[0], slice(0, 1)), (rows[1], slice(0, 0)), (rows[2], slice(1, 3)))
    alone = [model.generate(row[None], pixels[own], sizes[own], **SIX) for row, own in parts]
    assert torch.equal(batch, torch.cat(alone))
    for some, sentence in ((pixels[:2], "more <image> than"), (pixels + pixels[:1], "place for all images but 1")):
        with pytest.raises(UserError, match=sentence):
            model.generate(ids, some, (sizes + sizes)[: len(some)], ids != -1)


def test_sampling_beams_and_stopping(tiny_path):
    tokenizer, _, _, context = parts = loaded(tiny_path, method="consensusdrop", budget=6)
    question, image = QUESTIONS[0], picture(0)
    (greedy,) = ask(parts, question, image, **SIX).tolist()
    drawn = ask(parts, question, image, **SIX | {"do_sample": True, "temperature": 5.0, "num_return_sequences": 4})
    assert context == 2048 and drawn.shape == (4, 6) and len({*map(tuple, drawn.tolist())}) > 1
    beams = ask(parts, question, image, num_beams=3, return_dict_in_generate=True, output_scores=True, **SIX)
    assert beams.sequences.shape == (1, 6) and torch.isfinite(beams.sequences_scores).all()
    word, seen = tokenizer.decode(greedy[2]), []
    ids = tokenizer_image_token(prompt_of(f"<image>\n{question}", None), tokenizer, return_tensors="pt")[None]
    stop = [KeywordsStoppingCriteria([word, ""], tokenizer, ids), lambda new, _: bool(seen.append(new[0].tolist()))]
    (stopped,) = ask(parts, question, image, stopping_criteria=stop, **SIX).tolist()
    count = next(count for count in range(1, 7) if word in tokenizer.decode(greedy[:count]))
    assert stopped == greedy[:count] == seen[-1]
    # Called with prompt and answer, as LLaVA 1.1 did, it looks at the answer alone.
    criterion = KeywordsStoppingCriteria([question.split()[0]], tokenizer, ids)
    behind = ids[:, ids[0].tolist().index(IMAGE_TOKEN_INDEX) + 1 :]
    assert criterion(torch.cat([ids, behind], 1), None) and not criterion(torch.cat([ids, behind[:, -1:]], 1), None)


def test_turns_are_written_as_the_official_code_writes_them():
    """The texts are those that LLaVA's get_prompt gives."""
    turns, end, start = ("1", "2", "3", None), "<|im_end|>", "<|im_start|>"
    assert prompt_of(*turns, mode="v1") == MODES["vicuna_v1"].system + "USER: 1 ASSISTANT: 2</s>USER: 3 ASSISTANT:"
    assert prompt_of(*turns, mode="mistral_instruct") == "[INST] 1 [/INST] 2 </s>[INST] 3 [/INST]"
    parts = ("system\nAnswer the questions.", "user\n1", "assistant\n2", "user\n3", "assistant\n")
    assert prompt_of(*turns, mode="chatml_direct") == start + f"{end}{start}".join(parts)
    found = [conv_templates[mode].sep for mode in ("vicuna_v1", "mistral_instruct", "chatml_direct")]
    assert found == [" ", "", end] and conv_templates["v1"].sep_style is SeparatorStyle.TWO
    assert not conv_templates["v1"].messages
    with pytest.raises(UserError, match="Did you mean 'vicuna_v1'"):
        conv_templates["vicuna_v0"]


def test_the_question_is_the_last_turn_without_its_answer_format(tiny_path):
    tokenizer, model, _, _ = loaded(tiny_path)
    for text, question in (
        (prompt_of(f"<image>\n{QUESTIONS[0]}\n{SHORT}", None), QUESTIONS[0]),
        (prompt_of(f"<image>\n{QUESTIONS[0]}", "a dog", QUESTIONS[1], None), QUESTIONS[1]),
        (f"USER: <image> {QUESTIONS[2]}", QUESTIONS[2]),  # no template
        # A question before its image was none, and all prompts of its batch then lost theirs.
        (prompt_of(f"{QUESTIONS[0]}\n{SHORT} <image>", None), QUESTIONS[0]),
        (prompt_of(QUESTIONS[0], "a dog", f"{QUESTIONS[1]} <image>", None), QUESTIONS[1]),
        (prompt_of("<image>\n", None), ""),
    ):
        known = tokenizer.decode(tokenizer(question, add_special_tokens=False).input_ids)  # one of its words is not
        assert model._question(tokenizer_image_token(text, tokenizer)) == known


def test_images_and_names():
    cached = "/c/hub/models--liuhaotian--llava-v1.5-7b"
    names = {"a/llava-v1.5-7b/": "llava-v1.5-7b", "a/b/checkpoint-5": "b_checkpoint-5"}
    # Scripts choose the conversation by this name; of a snapshot it was the commit.
    names |= dict.fromkeys(
        [cached, f"{cached}/", f"{cached}/snapshots/ab12", f"{cached}/snapshots/ab12/"], "llava-v1.5-7b"
    )
    assert {path: get_model_name_from_path(path) for path in names} == names
    image, file = picture(3, (31, 60)), BytesIO()
    image.save(file, "PNG")
    assert mm_utils.load_image_from_base64(b64encode(file.getvalue()).decode()).tobytes() == image.tobytes()
    square = mm_utils.expand2square(image, (1, 2, 3))
    assert square.tobytes() == ImageOps.expand(image, (14, 0, 15, 0), (1, 2, 3)).tobytes()


def test_the_method_comes_from_arguments_or_the_environment(tiny_path, monkeypatch):
    monkeypatch.setenv("VTR_METHOD", "visiondrop")
    monkeypatch.setenv("VTR_BUDGET", "1/2")
    assert loaded(tiny_path)[1].reduced.reducer.name == "visiondrop"
    reducer = loaded(tiny_path, method="attnmix", budget=6, text="instruction")[1].reduced.reducer
    assert (reducer.name, reducer.budget, reducer.text) == ("attnmix", 6, "instruction")
    monkeypatch.delenv("VTR_METHOD")
    with pytest.raises(UserError, match="need a method; set VTR_METHOD"):
        loaded(tiny_path)
    monkeypatch.delenv("VTR_BUDGET")
    assert loaded(tiny_path, device_map={"": "cpu"}, device="cuda")[1].reduced.reducer.name == "full"


def test_what_cannot_be_done_is_said(tiny_path, tmp_path):
    SAVERS["video_llava transformers"](tmp_path / "video")
    SAVERS["llava original"](tmp_path / "marked", mm_use_im_start_end=True)
    for path, options, sentence in (
        (tiny_path, {"use_flash_attn": True}, "use_flash_attn is not supported"),
        (tiny_path, {"load_8bit": True}, "needs the package bitsandbytes"),
        (tiny_path, {"device_map": "balanced", "device": "cuda"}, "The device should be auto"),
        (tiny_path, {"torch_dtype": "int8"}, "torch_dtype must be one of float32"),
        (tiny_path, {"offload_folder": "x"}, "need a method"),
        ("nowhere", {"method": "visiondrip"}, "Did you mean 'visiondrop'"),
        (tmp_path / "video", {}, "use llava.load for video_llava"),
        (tmp_path / "marked", {}, "<im_start> and <im_end>"),
    ):
        with pytest.raises(UserError, match=sentence):
            loaded(path, **options)
    with pytest.raises(UserError, match="model_base is not supported"):
        load_pretrained_model(str(tiny_path), "vicuna", "llava-lora")
    with pytest.raises(UserError, match="repetition_penalty reads the prompt here"):
        ask(loaded(tiny_path), QUESTIONS[0], picture(0), repetition_penalty=1.2)


@pytest.mark.process
def test_the_notebook_prints_what_it_shows(capsys):
    """Every cell in order; the outputs in the file are those of a run, times apart."""
    names: dict = {}
    for cell in json.loads((ROOT / "examples" / "reduce.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            shown = "".join("".join(output.get("text", ())) for output in cell["outputs"])
            assert capsys.readouterr().out == shown or " ms" in shown
    assert names["reduced"].accounting[0].tokens_per_layer == (64,) * 8
