"""Ids of loaded tokenizers against sentencepiece itself: transformers 5 has no slow Llama tokenizer to compare with.

Two bugs are caught here. Under a Mistral config the library reads a tokenizer.model without the space that
sentencepiece puts in front of a text. Its Llama tokenizer always puts one there, although Yi's model (LLaVA-1.6-34B)
does not: in transformers issue 29774 the ids of "user\\n<image>\\nWhat" are 3903 144 64000 144 5697, without a space.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerBase

from llava.conversation import render
from llava.errors import UserError
from llava.processing.prompt import read_tokenizer, tokenize
from tests.tiny_checkpoints import make_tokenizer
from tests.tiny_checkpoints_families import make_chatml_tokenizer

QUESTION = "<image>\nWhat is this?\nAnswer the question using a single word or phrase."
CHATML = ("<|im_start|>", "<|im_end|>")


def trained(folder: Path, dummy: bool, **special: str) -> SentencePieceProcessor:
    """A sentencepiece model; `dummy` puts a space in front of a text, as Llama's and Mistral's do and Yi's does not."""
    folder.mkdir()
    modes = ("vicuna_v1", "mistral_instruct", "chatml_direct")
    texts = [render(mode, [(QUESTION, None)]).replace("\n", " ") for mode in modes]
    (folder / "corpus.txt").write_text("\n".join(texts * 200))
    SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy,
        minloglevel=2,
        **special,
    )
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


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
    front, back = render("mistral_instruct", [(QUESTION, None)]).split("<image>")
    ids = [1, *model.encode(front), -200, *model.encode(back)]
    assert tokenize(front + "<image>" + back, tokenizer) == ids


def test_yi_ids_are_those_of_sentencepiece(yi):
    folder, model = yi
    tokenizer = read(folder, LlamaConfig())
    assert tokenizer.eos_token_id == model.piece_to_id("<|im_end|>")
    front, back = render("chatml_direct", [(QUESTION, None)]).split("<image>")
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


def test_a_damaged_sentencepiece_model(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"Cannot read the tokenizer in .*fetch its files again"):
        read(tmp_path, LlamaConfig())
