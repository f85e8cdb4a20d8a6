"""Token ids and templates against the official code's, and question ranges against tokenizer offsets."""

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.conversation import MODES, conversation, render, stop_string
from llava.errors import UserError
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Sample, build_prompt, read_tokenizer, tokenize
from tests.tiny_checkpoints import make_tokenizer
from tests.tiny_checkpoints_families import make_chatml_tokenizer

DATA = Path(__file__).parent / "data" / "llava_preproc"
PROMPTS = json.loads((DATA / "prompts.json").read_text())
TOY = json.loads((DATA / "tokenizer_image_token.json").read_text())
GOLDEN = json.loads((DATA / "golden_token_ids.json").read_text())

SUFFIX = "Answer the question using a single word or phrase."
QUESTIONS = (
    "What is this?",
    "Is there a cat",
    "A",
    "How many red cars are left of the tree?  ",
    "What does the sign say: 'Größe 10 €'?",
    "Which one?\nA. cat\nB. dog",
    "ASSISTANT",
    "\n\nWhat?",
)
IMAGE_QUESTION = f"<image>\nWhat is this?\n{SUFFIX}"
WHITE = Image.new("RGB", (4, 4), "white")


def sample(question="What is this?", suffix="", image=WHITE) -> Sample:
    return Sample(id="q1", question=question, suffix=suffix, image=image)


# Token ids


class CharacterTokenizer:
    """The toy tokenizer of the official vectors: one id per character, a BOS on request."""

    bos_token_id = 1

    def __init__(self, adds_bos: bool) -> None:
        self.front = [1] if adds_bos else []

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*self.front, *(100 + ord(character) % 50 for character in text)])


@pytest.mark.parametrize("name", ["with_bos", "without_bos"])
def test_tokenize_equals_the_official_function(name):
    tokenizer = CharacterTokenizer(adds_bos=name == "with_bos")
    assert {text: tokenize(text, tokenizer) for text in TOY[name]} == TOY[name]
    assert TOY["image_token_index"] == IMAGE_TOKEN_INDEX


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    draw = random.Random(0)
    words = f"{' '.join(QUESTIONS)} {SUFFIX} {render('vicuna_v1', '')}".split()
    path.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(1000)))
    return path


def train(folder: Path, corpus: Path, **options) -> SentencePieceProcessor:
    """A sentencepiece model with Llama's settings."""
    SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def llama(corpus):
    """A sentencepiece model with Llama's settings, and the checkpoint folder with nothing but tokenizer.model."""
    folder = corpus.parent / "llama"
    folder.mkdir()
    train(folder, corpus, vocab_size=420)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder, config=LlamaConfig(), trust_remote_code=False)


def straddling_bpe(corpus: Path) -> PreTrainedTokenizerFast:
    """Merges run over spaces and line ends, so that tokens straddle the ends of a question."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [render(mode, f"{q}\n{SUFFIX}") for mode in PROMPTS for q in QUESTIONS]
    tokenizer.train_from_iterator([*corpus.read_text().splitlines(), *texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizers(corpus, llama) -> dict[str, PreTrainedTokenizerFast]:
    return {"words": make_tokenizer(), "straddling": straddling_bpe(corpus), "llama": llama}


def test_llama_ids_are_those_of_sentencepiece(llama, corpus):
    """The reference is the slow tokenizer, which transformers 5 no longer has: ask sentencepiece itself."""
    model = SentencePieceProcessor(model_file=str(corpus.parent / "llama" / "tokenizer.model"))
    for text in (*QUESTIONS, render("vicuna_v1", "Q"), "USER: ", "\n", "a  b", "", "漢字", " a", "  a"):
        assert tokenize(text, llama) == [model.bos_id(), *model.encode(text)], text


def test_llama_puts_a_dummy_space_on_both_sides_of_the_image(llama):
    """Vicuna has "... USER: <image>\n..." as 3148 1001 29901 29871 -200 29871 13: 29871 is the bare dummy space."""
    ids = GOLDEN["cases"][2]["ids_prefix"]
    slot = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[slot - 1] == ids[slot + 1] == 29871
    ours = build_prompt(sample(), llama).ids
    slot = ours.index(IMAGE_TOKEN_INDEX)
    around = llama.convert_ids_to_tokens([*ours[slot - 1 : slot], *ours[slot + 1 : slot + 3]])
    assert around == ["▁", "▁", "<0x0A>"]
    assert ours.count(llama.bos_token_id) == 1
    assert ours[0] == llama.bos_token_id


SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
LITERALS = [
    "What does </s> mean?",
    "What does</s>mean?",
    "</s>What",
    "</s> What",
    "<s>What <s> is</s></s> this",
    "What is this </s>",
    " What </s>  is",
    "a <unk> cat",
    "USER: Q1 ASSISTANT: A1</s>USER: What </s> is ASSISTANT:",
    "[INST] Q1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
]


def slow_llama_ids(text: str, path: Path, legacy: bool) -> list[int]:
    """LlamaTokenizer (use_fast=False) of transformers 4.37.2, written from its rules.

    Special tokens are cut out of the text. In legacy mode sentencepiece puts its dummy space in front of every part;
    otherwise the text gets one space at the front, and the parts are encoded as they are.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = legacy
    model = SentencePieceProcessor(model_proto=proto.SerializeToString())
    unknown = len(model.encode("<unk>"))
    text = text if legacy else "▁" + text.replace("▁", " ")
    ids: list[int] = []
    for part in filter(None, re.split("(<unk>|<s>|</s>)", text)):
        if part in SPECIAL:
            if not legacy and ids == [model.piece_to_id("▁")]:
                ids = []
            ids.append(SPECIAL[part])
        elif not legacy and part.startswith(("▁", " ")):
            ids += model.encode("<unk>" + part)[unknown:]
        else:
            ids += model.encode(part)
    return [model.bos_id(), *ids]


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("files", ["tokenizer.model", "tokenizer.json"])
def test_literal_special_tokens_are_those_of_the_slow_tokenizer(llama, corpus, tmp_path, stated, files):
    """Text behind a literal "</s>" got other ids than in the original: a missing "legacy" was read as False, not True.

    In legacy mode a dummy space was also missing in front of a space. The same holds for the "</s>" of earlier turns.
    """
    path = corpus.parent / "llama" / "tokenizer.model"
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {} if stated is None else {"legacy": stated}
    shutil.copy(path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read(tmp_path, LlamaConfig())
    if files == "tokenizer.json":
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.model").unlink()
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = read(tmp_path, LlamaConfig())
    for text in LITERALS:
        assert tokenize(text, tokenizer) == slow_llama_ids(text, path, stated is not False), text


@pytest.mark.parametrize("question", LITERALS[:8])
def test_ranges_of_questions_with_literal_special_tokens(llama, question):
    prompt = build_prompt(sample(question, SUFFIX), llama)
    asked = llama.decode(prompt.ids[slice(*prompt.question)])
    assert "".join(asked.split()) == "".join(question.split())


# Prompts


def range_by_offsets(text: str, tokenizer, start: int, stop: int) -> tuple[int, int]:
    """The tokens that hold a character of text[start:stop], by the offsets that a fast tokenizer can give."""
    before = text[:start].rpartition("<image>")
    skipped = len(before[0]) + len(before[1])
    base = len(tokenize(text[:skipped], tokenizer)) if before[1] else 0
    encoding = tokenizer(text[skipped:], return_offsets_mapping=True)
    offsets = encoding.offset_mapping[bool(before[1]) :]
    inside = [i for i, (a, b) in enumerate(offsets) if a + skipped < stop and b + skipped > start]
    return base + inside[0], base + inside[-1] + 1


@pytest.mark.parametrize("mode", ["vicuna_v1", "chatml_direct", "mistral_instruct"])
@pytest.mark.parametrize("suffix", ["", SUFFIX])
@pytest.mark.parametrize("name", ["words", "straddling", "llama"])
def test_ranges_hold_the_question_and_nothing_else(tokenizers, name, suffix, mode):
    tokenizer = tokenizers[name]
    for question in QUESTIONS:
        for image in (WHITE, None):
            prompt = build_prompt(sample(question, suffix, image), tokenizer, mode)
            assert list(prompt.ids) == tokenize(prompt.text, tokenizer)
            message = f"{question}\n{suffix}" if suffix else question
            begin = prompt.text.rindex(message + MODES[mode].assistant)
            # Spaces that a tokenizer drops at an end of the question have no offsets; they are in no range.
            for found, wanted in ((prompt.question, question), (prompt.instruction, message)):
                assert found == range_by_offsets(prompt.text, tokenizer, begin, begin + len(wanted)), (question, mode)


def test_an_empty_question_has_an_empty_range():
    start, stop = build_prompt(sample(""), make_tokenizer()).question
    assert start == stop


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"question": "what is <image>?"}, "'<image>'"),
        ({"suffix": "<image>"}, "'<image>'"),
        ({"question": "a \ud800 b"}, r"a lone surrogate \(U\+D8"),
        ({"suffix": "\udfff"}, r".*U\+DF"),
    ],
)
def test_a_placeholder_or_half_a_character_in_the_text_is_refused(given, said):
    """The first would shift the image or stand for none; the second ended in a traceback of the tokenizer."""
    with pytest.raises(UserError, match=f"sample 'q1' contains {said}"):
        build_prompt(sample(**given), make_tokenizer())


def test_a_text_beyond_the_positions_of_the_decoder_is_refused():
    """40,000 words asked for 38 GB of memory."""
    with pytest.raises(UserError, match=r"sample 'q1' has 40\d\d\d tokens, .* positions for 3520 tokens of text"):
        build_prompt(sample("what " * 40_000), make_tokenizer(), longest=3520)
    length = len(build_prompt(sample("what is red"), make_tokenizer()).ids) - 1
    assert build_prompt(sample("what is red"), make_tokenizer(), longest=length)
    with pytest.raises(UserError, match=f"has {length} tokens"):
        build_prompt(sample("what is red"), make_tokenizer(), longest=length - 1)


@pytest.mark.parametrize("question", ["what is red", "  what is red\n", "what"])
@pytest.mark.parametrize("suffix", ["", "answer yes "])
@pytest.mark.parametrize("image", [WHITE, None])
def test_ranges_in_a_template_that_trims_messages(question, suffix, image):
    tokenizer = make_tokenizer()
    prompt = build_prompt(sample(question, suffix, image), tokenizer, "llava_llama_3")
    assert tokenizer.decode(prompt.ids[slice(*prompt.question)]).split() == question.split()
    assert tokenizer.decode(prompt.ids[slice(*prompt.instruction)]).split() == [*question.split(), *suffix.split()]


# Templates against the texts that the official code renders


@pytest.mark.parametrize("mode", sorted(PROMPTS))
def test_templates_equal_the_official_ones(mode):
    question = IMAGE_QUESTION.removeprefix("<image>\n")
    assert build_prompt(sample(question, image=WHITE), make_tokenizer(), mode).text == PROMPTS[mode]["single_turn"]
    assert render(mode, IMAGE_QUESTION) == PROMPTS[mode]["single_turn"]
    assert stop_string(mode) == (PROMPTS[mode]["sep2"] or PROMPTS[mode]["sep"])


def test_qwen_and_llama_3_render_what_their_chat_templates_render():
    """Written out by hand from Qwen2-VL's chat_template, in which <image> stands for its <|image_pad|>; and from
    LLaVA-VL/LLaVA-NeXT's llava_llama_3 (system text, roles, style LLAMA_3) with the chat_template of
    meta-llama/Meta-Llama-3-8B-Instruct: header, two line ends, trimmed message, <|eot_id|>. A LLaVA-NeXT with a Llama-3
    decoder was loaded with vicuna_v1 and stop string "</s>", without a word."""
    image = "<|vision_start|><image><|vision_end|>"
    assert conversation("qwen2_vl").slot == image
    assert render("qwen2_vl", image + "Q1") == (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{image}Q1<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render("llava_llama_3", "<image>\n Q1 \n") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
        "assistant. You are able to understand the visual content that the user provides, and assist the user with a "
        "variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n Q1"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert (stop_string("qwen2_vl"), stop_string("llava_llama_3")) == ("<|im_end|>", "<|eot_id|>")


# Tokenizers of checkpoints against sentencepiece itself. Two bugs are caught here. Under a Mistral config the library
# reads a tokenizer.model without the space that sentencepiece puts in front of a text. Its Llama tokenizer always puts
# one there, although Yi's model (LLaVA-1.6-34B) does not: in transformers issue 29774 the ids of
# "user\n<image>\nWhat" are 3903 144 64000 144 5697, without a space.

CHATML = ("<|im_start|>", "<|im_end|>")


def trained(folder: Path, dummy: bool, **special) -> SentencePieceProcessor:
    """A sentencepiece model; `dummy` puts a space in front of a text, as Llama's and Mistral's do and Yi's does not."""
    folder.mkdir()
    modes = ("vicuna_v1", "mistral_instruct", "chatml_direct")
    texts = [render(mode, IMAGE_QUESTION).replace("\n", " ") for mode in modes]
    (folder / "corpus.txt").write_text("\n".join(texts * 200))
    return train(folder, folder / "corpus.txt", vocab_size=400, add_dummy_prefix=dummy, **special)


def save(folder: Path, own: Path, sentencepiece: bool) -> None:
    """Write a tokenizer.json, beside the tokenizer_config.json as it was: the library's own would name the space."""
    read(folder, LlamaConfig()).save_pretrained(own)
    for name in ("tokenizer_config.json", "tokenizer.model")[: 1 + sentencepiece]:
        shutil.copy(folder / name, own)


def write_config(folder: Path, **config) -> None:
    content = {"tokenizer_class": "LlamaTokenizer", "add_eos_token": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def read(folder: Path, config) -> PreTrainedTokenizerBase:
    return read_tokenizer(folder, SimpleNamespace(text_config=config))


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "new"])
def mistral(request, tmp_path_factory) -> tuple[Path, SentencePieceProcessor]:
    folder = tmp_path_factory.mktemp("mistral") / "model"
    model = trained(folder, dummy=True)
    write_config(folder, add_bos_token=True, legacy=request.param)
    return folder, model


@pytest.fixture(scope="module")
def yi(tmp_path_factory) -> tuple[Path, SentencePieceProcessor]:
    """As the files of LLaVA-1.6-34B: no BOS, ChatML's tokens reserved in the model, the end token one of them."""
    folder = tmp_path_factory.mktemp("yi") / "model"
    special = {"bos_piece": "<|startoftext|>", "eos_piece": "<|endoftext|>", "control_symbols": list(CHATML)}
    model = trained(folder, dummy=False, **special)
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    pieces = {"<unk>": True, "<|startoftext|>": True, "<|endoftext|>": True, "<|im_start|>": False, "<|im_end|>": True}
    write_config(
        folder,
        add_bos_token=False,
        legacy=True,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        added_tokens_decoder={
            str(model.piece_to_id(token)): {"content": token, "special": special, **plain}
            for token, special in pieces.items()
        },
    )
    return folder, model


def chatml_ids(text: str, model: SentencePieceProcessor) -> list[int]:
    """What the slow tokenizer did: cut at ChatML's tokens, then sentencepiece on what is between."""
    parts = re.split("(" + "|".join(map(re.escape, CHATML)) + ")", text)
    encoded = ([model.piece_to_id(part)] if part in CHATML else model.encode(part) for part in parts)
    return [token for part in encoded for token in part]


@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig()], ids=["llama", "mistral"])
def test_mistral_ids_are_those_of_sentencepiece(mistral, config):
    folder, model = mistral
    tokenizer = read(folder, config)
    for text in ("[INST] ", "\nWhat is this? [/INST]", "What", "a  b", "", "Größe 10 €"):
        assert tokenizer(text).input_ids == [1, *model.encode(text)], text
    front, back = render("mistral_instruct", IMAGE_QUESTION).split("<image>")
    ids = [1, *model.encode(front), -200, *model.encode(back)]
    assert tokenize(front + "<image>" + back, tokenizer) == ids


def test_yi_ids_are_those_of_sentencepiece(yi):
    folder, model = yi
    tokenizer = read(folder, LlamaConfig())
    assert tokenizer.eos_token_id == model.piece_to_id("<|im_end|>")
    front, back = render("chatml_direct", IMAGE_QUESTION).split("<image>")
    ids = tokenize(front + "<image>" + back, tokenizer)
    assert ids == [*chatml_ids(front, model), -200, *chatml_ids(back, model)]
    assert model.id_to_piece(ids[ids.index(-200) + 1]) == "<0x0A>", "no space between the image and the line end"
    assert tokenizer.decode(tokenizer("What is this?").input_ids) == "What is this?"


@pytest.mark.parametrize("sentencepiece", [True, False])
def test_ids_stay_the_same_once_saved(tmp_path, yi, mistral, sentencepiece):
    """The library's Llama tokenizer does not follow the rules of a tokenizer.json; they are read for it."""
    for folder, model in (yi, mistral):
        own = tmp_path / folder.parent.name
        save(folder, own, sentencepiece)
        for text in ("What is this?", "\nWhat"):
            ids = read(own, MistralConfig())(text).input_ids
            assert ids[ids[:1] == [1] :] == model.encode(text), (folder, text)


def test_the_sentencepiece_model_decides_over_the_json(tmp_path, yi):
    """Yi's first tokenizer.json put a space in front of a text, which was a mistake in its making."""
    folder, model = yi
    save(folder, tmp_path, sentencepiece=False)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    space = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    content.update(normalizer={"type": "Sequence", "normalizers": space}, pre_tokenizer=None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read(tmp_path, LlamaConfig())("What").input_ids != model.encode("What")
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert read(tmp_path, LlamaConfig())("What").input_ids == model.encode("What")


@pytest.mark.parametrize("make", [make_tokenizer, make_chatml_tokenizer])
def test_tokenizers_of_other_kinds_are_left_alone(tmp_path, make):
    make().save_pretrained(tmp_path)
    for config in (LlamaConfig(), MistralConfig()):
        assert read(tmp_path, config)("what is red ?").input_ids == make()("what is red ?").input_ids
