"""LLaVA's own interface, called as its scripts call it: the answers are those of our own `generate`.

`from llava.model.builder import load_pretrained_model` was an ImportError under the name of LLaVA's own package.
"""

import json
from base64 import b64encode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence

import llava
from eval.config import ROOT
from llava import load, mm_utils
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import MODES, conv_templates, default_conversation, render
from llava.errors import UserError
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model import LlavaMistralForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.utils import disable_torch_init
from tests.checkpoint_files import SAVERS
from tests.conftest import QUESTIONS, SHORT, drawn_image

OFFICIAL = Path(__file__).parent / "data" / "llava_preproc"
CONVERSATIONS = json.loads((OFFICIAL / "conversations.json").read_text())
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
        image = drawn_image(0, size)
        (answer,) = generate(ours, [Sample("q", question, SHORT, image)], reducer, max_new_tokens=6).answers
        (ids,) = ask(parts, f"{question}\n{SHORT}", image).tolist()
        ends = [[*answer.token_ids, *end] for end in ([], [ours.tokenizer.eos_token_id])]
        # A script pads by itself, so that nothing is known of tokens on padding.
        (counted,) = (replace(one, on_padding=None) for one in parts[1].reduced.accounting)
        assert ids in ends and counted == replace(answer.accounting, on_padding=None)
        assert parts[0].batch_decode([ids], skip_special_tokens=True)[0].strip() == answer.text
        pixels, wanted = process_images([image], parts[2], parts[1].config).flatten(0, -4), ours.views(image)[0]
        assert torch.equal(pixels[: len(wanted)], wanted)


def test_prompts_of_a_batch_are_padded_and_their_images_taken_in_order(path):
    tokenizer, model, processor, _ = loaded(path, method="fastervlm", budget=6)
    images = [drawn_image(number, size) for number, size in enumerate(SIZES[:3])]
    texts = [f"<image>\n{QUESTIONS[0]}", QUESTIONS[1], f"<image>\n<image>\n{QUESTIONS[2]}, is it not"]
    rows = [tokenizer_image_token(prompt_of(text, None), tokenizer, return_tensors="pt") for text in texts]
    pixels = [process_images([image], processor, model.config)[0] for image in images]
    sizes, ids = [image.size for image in images], pad_sequence(rows, True, -1, "left")
    batch = model.generate(ids, images=pixels, image_sizes=sizes, attention_mask=ids != -1, **SIX)
    assert [accounting.tokens_per_layer[0] // accounting.images for accounting in model.reduced.accounting] == [6, 0, 6]
    parts = ((rows[0], slice(0, 1)), (rows[1], slice(0, 0)), (rows[2], slice(1, 3)))
    alone = [model.generate(row[None], pixels[own], sizes[own], **SIX) for row, own in parts]
    assert torch.equal(batch, torch.cat(alone))
    for some, sentence in ((pixels[:2], "more <image> than"), (pixels + pixels[:2], "place for all images but 2")):
        with pytest.raises(UserError, match=sentence):
            model.generate(ids, some, (sizes + sizes)[: len(some)], attention_mask=ids != -1)
    # LLaVA takes an unused image for a prompt of text alone; beside others it was one too many.
    dummy = [pixels[0], torch.zeros_like(pixels[2]), *pixels[1:]]
    given = {"images": dummy, "image_sizes": [sizes[0], sizes[2], *sizes[1:]], "modalities": ["image"] * 4}
    assert torch.equal(model.generate(input_ids=ids, attention_mask=ids != -1, **given, **SIX), batch)
    assert torch.equal(model.generate(rows[1][None], dummy[1:2], **SIX), alone[1])
    for wrong, sentence in (({"modalities": ["video"]}, "got 'video'"), ({"inputs": ids}, "give one of the two")):
        with pytest.raises(UserError, match=sentence):
            model.generate(input_ids=ids, images=pixels, attention_mask=ids != -1, **wrong)


def labelled(parts, question: str, answer: str):
    """Ids and labels of an answer as lmms-eval's loglikelihood makes them."""
    tokenizer = parts[0]
    ask, told = (
        tokenizer_image_token(prompt_of(question, reply), tokenizer, return_tensors="pt") for reply in (None, answer)
    )
    return told, torch.cat([torch.full_like(ask, IGNORE_INDEX), told[len(ask) :]])


def test_the_loss_of_an_answer_is_that_of_transformers(path):
    """`model(input_ids, labels=...)`, by which lmms-eval takes likelihoods, was a NotImplementedError of torch."""
    tokenizer, model, processor, _ = parts = loaded(path)
    image, stock, end = drawn_image(1, SIZES[1]), model.hf_model, tokenizer.eos_token_id
    pixels = process_images([image], processor, model.config)
    ids, labels = labelled(parts, f"<image>\n{QUESTIONS[0]}", "a dog on the left")
    shown = {"images": pixels, "image_sizes": [image.size]}
    (features,) = stock.get_image_features(**model._pixels(pixels, [image.size])).pooler_output
    for targets in (labels, ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX)):  # of the answer; of all text
        output = model(ids[None], labels=targets[None], use_cache=True, **shown)
        visual = output.logits.shape[1] - len(ids) + 1
        place = ids.tolist().index(IMAGE_TOKEN_INDEX)
        words = stock.get_input_embeddings()(ids.clamp(min=0))
        embedded = torch.cat([words[:place], features, words[place + 1 :]])[None]
        spread = torch.cat([targets[:place], torch.full((visual,), IGNORE_INDEX), targets[place + 1 :]])[None]
        theirs = stock(inputs_embeds=embedded, labels=spread)
        assert (output.logits - theirs.logits).abs().max() < 1e-5 and abs(output["loss"] - theirs.loss) < 1e-5
    text, targets = labelled(parts, QUESTIONS[1], "no star")
    alone = model(text[None], labels=targets[None])
    assert abs(alone.loss - stock(input_ids=text[None], labels=targets[None]).loss) < 1e-5
    padded = [pad_sequence(pair, True, fill, "left") for pair, fill in (((ids, text), end), ((labels, targets), -100))]
    mask = pad_sequence([torch.ones_like(ids), torch.ones_like(text)], True, 0, "left")
    batch = model(padded[0], mask, labels=padded[1], **shown)
    counts = [(row != IGNORE_INDEX).sum() for row in (labels, targets)]
    single = model(ids[None], labels=labels[None], **shown)
    assert abs(batch.loss - (single.loss * counts[0] + alone.loss * counts[1]) / sum(counts)) < 1e-5
    assert (batch.logits[1, : len(text)] - alone.logits[0]).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["consensusdrop", "fastv"])
def test_the_loss_under_a_method_is_of_what_it_generates(path, method):
    """The answer continues the prompt that was reduced without it: no method may choose tokens by the answer."""
    options = {"schedule": "kept"} if method == "fastv" else {}
    tokenizer, model, processor, _ = loaded(path, method=method, budget=6, **options)
    image = drawn_image(2)
    shown = {"images": process_images([image], processor, model.config), "image_sizes": [image.size]}
    ids = tokenizer_image_token(prompt_of(f"<image>\n{QUESTIONS[2]}", None), tokenizer, return_tensors="pt")[None]
    wanted = {"return_dict_in_generate": True, "output_logits": True, **SIX}
    generated = model.generate(ids, **shown, **wanted)
    kept, steps = model.reduced.accounting, torch.stack(generated.logits, 1)
    told = torch.cat([ids, generated.sequences], 1)
    labels = torch.cat([torch.full_like(ids, IGNORE_INDEX), generated.sequences], 1)
    output = model(told, labels=labels, **shown)
    answer = output.logits[:, -1 - steps.shape[1] : -1]
    finite = torch.isfinite(steps)  # generate never takes the rows of the head without a word
    assert (answer - steps)[finite].abs().max() < 1e-5 and model.reduced.accounting == kept
    assert output.logits.shape[1] == told.shape[1] - 1 + kept[0].tokens_per_layer[-1]
    probability = answer.log_softmax(-1).gather(-1, generated.sequences[..., None])
    assert abs(output.loss + probability.mean()) < 1e-5
    # All of it without labels: the whole prompt is what the method sees.
    assert model(told, **shown).loss is None and model(told, return_dict=False, **shown)[0].shape[0] == 1


def test_what_forward_cannot_do_is_said(tiny_path):
    _, model, processor, _ = parts = loaded(tiny_path, method="attnmix", budget=6)
    ids, labels = labelled(parts, f"<image>\n{QUESTIONS[0]} <image>", "yes")
    pixels = process_images([drawn_image(0), drawn_image(1)], processor, model.config)
    assert torch.isfinite(model(ids[None], labels=labels[None], images=pixels).loss)
    for wrong, sentence in (
        ({"labels": ids[None]}, "label between two images"),
        ({"output_attentions": True}, "takes no output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 2, 4)}, "takes no inputs_embeds"),
        ({"input_ids": None}, "needs input_ids"),
    ):
        with pytest.raises(UserError, match=sentence):
            model(**{"input_ids": ids[None], "images": pixels, **wrong})


def test_sampling_beams_and_stopping(tiny_path):
    tokenizer, _, _, context = parts = loaded(tiny_path, method="consensusdrop", budget=6)
    question, image = QUESTIONS[0], drawn_image(0)
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


@pytest.mark.parametrize("row", CONVERSATIONS, ids=lambda row: row["names"][0])
def test_turns_are_written_as_the_official_code_writes_them(row):
    """default_conversation and the templates llava_v0, llava_llama_2, mpt, plain, qwen_1_5 and *_mmtag were missing, a
    system text set by a script stood without its separator, and an image in a message was lost."""
    turns = {"open": ["Q1", None], "unanswered": ["Q1"], "two turns": ["Q1", "A1", "Q2", None], "closed": ["Q1", "A1"]}
    turns |= {"empty": ["", None], "picture": [("Q1 <image>", "image", "Pad"), None]}
    for name in row["names"]:
        conv = conv_templates[name]
        assert [*conv.roles] == row["roles"] and conv.sep_style.name == row["sep_style"]
        for field in ("system", "sep", "sep2", "version", "offset"):
            assert getattr(conv, field) == row[field], field
        for case, expected in row["prompts"].items():  # None where theirs ends in an error
            if expected is not None:
                assert prompt_of(*turns[case], mode=name) == expected, case
        if conv.system:
            own = conv.copy()
            own.system = "Be short."
            own.append_message(own.roles[0], "Q1")
            assert own.get_prompt() == prompt_of("Q1", mode=name).replace(conv.system, "Be short.")


def test_conversations_are_those_of_the_checkpoints():
    assert default_conversation is conv_templates["v1"] and not default_conversation.messages
    for mode in MODES:
        assert prompt_of(" hi\n", None, mode=mode) == render(mode, " hi\n")
    with pytest.raises(UserError, match="Did you mean 'vicuna_v1'"):
        conv_templates["vicuna_v0"]
    with pytest.raises(UserError, match="first message of this template"):
        prompt_of("", None, mode="llava_llama_2")


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
    constants = {"CONTROLLER_HEART_BEAT_EXPIRATION": 30, "WORKER_HEART_BEAT_INTERVAL": 15, "LOGDIR": "."}
    assert {name: getattr(llava.constants, name) for name in constants} == constants
    image, file = drawn_image(3, (31, 60)), BytesIO()
    image.save(file, "PNG")
    assert mm_utils.load_image_from_base64(b64encode(file.getvalue()).decode()).tobytes() == image.tobytes()
    square = mm_utils.expand2square(image, (1, 2, 3))
    assert square.tobytes() == ImageOps.expand(image, (14, 0, 15, 0), (1, 2, 3)).tobytes()


def test_an_image_is_cut_as_the_official_code_cuts_it():
    """divide_to_patches, resize_and_pad_image and get_anyres_image_grid_shape were missing."""
    counts = json.loads((OFFICIAL / "anyres_token_counts.json").read_text())
    for row in counts["rows"]:
        shape = mm_utils.get_anyres_image_grid_shape(tuple(row["image_wh"]), counts["pinpoints_wh"], 336)
        assert shape == (row["grid_cols"], row["grid_rows"])
    image = drawn_image(1, (60, 40)).convert("P")
    canvas = mm_utils.resize_and_pad_image(image, (56, 112))
    assert canvas.size == (56, 112) and canvas.getpixel((5, 5)) == (0, 0, 0)  # 56 x 38 pixels in the middle
    inner = image.convert("RGB").resize((56, 38), Image.Resampling.BICUBIC)
    assert canvas.crop((0, 37, 56, 75)).tobytes() == inner.tobytes()
    tiles = mm_utils.divide_to_patches(canvas, 28)
    assert [tile.size for tile in tiles] == [(28, 28)] * 8
    assert tiles[3].tobytes() == canvas.crop((28, 28, 56, 56)).tobytes()
    for given in ([[28, 56], [56, 28]], "[(28, 56), (56, 28)]"):
        assert mm_utils.get_anyres_image_grid_shape((60, 40), given, 28) == (2, 1)
    assert mm_utils.select_best_resolution(original_size=(40, 60), possible_resolutions=[(28, 56), (56, 28)]) == (
        28,
        56,
    )
    with pytest.raises(UserError, match="image_grid_pinpoints must be pairs"):
        mm_utils.get_anyres_image_grid_shape((60, 40), "(1x1),...,(6x6)", 28)


def test_the_method_comes_from_arguments_or_the_environment(tiny_path, monkeypatch, capsys):
    """VTR_METHOD was not read, so that LLaVA's own script, started by its path, kept all tokens without a word."""
    monkeypatch.setenv("VTR_METHOD", "visiondrop")
    monkeypatch.setenv("VTR_BUDGET", "1/2")
    assert loaded(tiny_path)[1].reduced.reducer.name == "visiondrop"
    assert "VTR_METHOD=visiondrop and VTR_BUDGET=1/2 in the environment: method visiondrop" in capsys.readouterr().err
    monkeypatch.delenv("VTR_METHOD")
    with pytest.raises(UserError, match="need a method; set VTR_METHOD"):
        loaded(tiny_path)
    monkeypatch.delenv("VTR_BUDGET")
    capsys.readouterr()
    model = loaded(tiny_path, device_map={"": "cpu"}, device="cuda")[1]
    assert model.reduced.reducer.name == "full" and "VTR" not in capsys.readouterr().err
    reducer = loaded(tiny_path, method="attnmix", budget=6, text="instruction")[1].reduced.reducer
    assert (reducer.name, reducer.budget, reducer.text) == ("attnmix", 6, "instruction")
    assert model.use("attnmix", 6, text="instruction") is model.reduced and model.reduced.reducer == reducer


def test_scripts_ask_the_model_for_its_parts(path):
    """get_vision_tower, get_model, tie_weights and config.to_dict were missing, and `cuda` left the method behind."""
    _, model, processor, _ = loaded(path, method="fastervlm", budget=6)
    tower, inner, before = model.get_vision_tower(), model.get_model(), model.hf_model.state_dict()
    model.tie_weights()
    assert all(torch.equal(before[name], weight) for name, weight in model.hf_model.state_dict().items())
    assert tower.is_loaded and tower.image_processor is processor and tower.num_patches == 16
    assert tower.num_patches_per_side == 4 and inner.get_vision_tower() is tower
    assert tower.load_model() is None and tower.to(device="cpu", dtype=torch.float32) is tower
    pixels = process_images([drawn_image(0)], processor, model.config).flatten(0, -4)
    theirs = tower.vision_tower(pixels, output_hidden_states=True).hidden_states[tower.select_layer][:, 1:]
    assert torch.allclose(tower(pixels), theirs, atol=1e-6)
    assert torch.equal(tower([pixels[0]])[0], tower(pixels[:1])) and tower.hidden_size == theirs.shape[-1]
    assert inner.mm_projector(theirs).shape[-1] == inner.embed_tokens(torch.tensor([1])).shape[-1]
    with pytest.raises(UserError, match="move or convert the model"):
        tower.to(dtype=torch.float16)
    fields = model.config.to_dict()
    assert fields["mm_hidden_size"] == tower.hidden_size == model.config.mm_hidden_size
    assert fields["hidden_size"] == model.hf_model.config.text_config.hidden_size
    model.config.image_aspect_ratio = None  # scripts set it; no padding
    assert process_images([drawn_image(0)], processor, model.config).shape[-3:] == pixels.shape[-3:]
    reduced = model.reduced
    assert model.to("cpu").float().reduced is reduced
    moved = model.to("meta")
    assert moved.runtime.device.type == "meta" and moved.reduced is not reduced
    assert moved.reduced.reducer == reduced.reducer


def test_the_official_classes_are_names_only(tiny_path):
    """Their import failed. Code that replaces their methods would change nothing here, so it is refused."""
    model = loaded(tiny_path)[1]
    classes = (LlavaLlamaForCausalLM, LlavaMetaForCausalLM, CLIPVisionTower)
    assert [isinstance(model, one) for one in classes] == [True, True, False]
    assert isinstance(model.get_vision_tower(), CLIPVisionTower) and not isinstance(model, LlavaMistralForCausalLM)
    assert not isinstance(model.hf_model, LlavaLlamaForCausalLM) and llava.LlavaLlamaForCausalLM is classes[0]
    for wrong, sentence in (
        (lambda: setattr(CLIPVisionTower, "forward", print), "Its forward cannot be replaced"),
        (lambda: type("Shorter", (LlavaMetaForCausalLM,), {}), r"A class \(Shorter\) cannot derive from it"),
        (lambda: LlavaLlamaForCausalLM.from_pretrained("a"), "It has no from_pretrained"),
        (lambda: CLIPVisionTower("openai/clip", None), "It cannot be made"),
    ):
        with pytest.raises(UserError, match=f"is a name only in this package.* {sentence}; load models with"):
            wrong()
    assert not hasattr(LlavaMetaForCausalLM, "prepare_inputs_labels_for_multimodal")


def test_what_cannot_be_done_is_said(tiny_path, tmp_path):
    SAVERS["video_llava transformers"](tmp_path / "video")
    SAVERS["llava original"](tmp_path / "marked", mm_use_im_start_end=True)
    for path, options, sentence in (
        (tiny_path, {"use_flash_attn": True}, "use_flash_attn is not supported"),
        (tiny_path, {"load_8bit": True}, "needs the package bitsandbytes"),
        (tiny_path, {"device_map": "balanced", "device": "cuda"}, "The device should be auto"),
        (tiny_path, {"torch_dtype": "int8"}, "torch_dtype must be one of float32"),
        (tiny_path, {"attn_implementation": "eager"}, "attn_implementation='eager' is not supported"),
        (tiny_path, {"customized_config": "a.json"}, "customized_config is not supported"),
        (tiny_path, {"budget": 6}, r"budget \(6\) or options \({}\) need a method"),
        ("nowhere", {"method": "visiondrip"}, "Did you mean 'visiondrop'"),
        (tmp_path / "video", {}, "use llava.load for video_llava"),
        (tmp_path / "marked", {}, "<im_start> and <im_end>"),
    ):
        with pytest.raises(UserError, match=sentence):
            loaded(path, **options)
    for options in ({}, {"method": "visiondrop", "budget": 6}):
        # lmms-eval gives it, and tries without it after a TypeError.
        with pytest.raises(TypeError, match="load_pretrained_model has no argument 'multimodal'") as caught:
            loaded(tiny_path, multimodal=True, attn_implementation="sdpa", **options)
        assert isinstance(caught.value, UserError)
    with pytest.raises(UserError, match="model_base is not supported"):
        load_pretrained_model(str(tiny_path), "vicuna", "llava-lora")
    with pytest.raises(UserError, match="repetition_penalty reads the prompt here"):
        ask(loaded(tiny_path), QUESTIONS[0], drawn_image(0), repetition_penalty=1.2)


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
