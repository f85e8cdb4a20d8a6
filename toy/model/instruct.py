"""The toy model with the vocabulary of all answer formats: where the instruct stage starts from."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from toy.data.chinese import PARTICLES, WORDS
from toy.data.formats import LETTERS, UNANSWERABLE
from toy.data.instruct_vocabulary import INSTRUCT_WORDS, INSTRUCTIONS
from toy.data.vocabulary import COLOR_NAMES, DIGITS, EOS, SHAPES
from toy.model.llava import grown_table

# New word -> the old one that it starts from, as near in meaning or use as there is one.
ALIKE = {
    **{chinese: english for english, chinese in WORDS.items()},
    **PARTICLES,
    **INSTRUCTIONS,
    "an": "a",
    "says": "say",
    "look": "image",
    "token": "number",
    "reference": "digit",
    "with": "has",
}
# What the toy model answers. New answers start among them, so that they are not ruled out at first.
ANSWERS = (*COLOR_NAMES, *SHAPES, *DIGITS, "yes", "no", "left", "right", "above", "below", "top", "bottom")
NEW_ANSWERS = dict.fromkeys((*LETTERS, UNANSWERABLE), ANSWERS)


def build_instruct(folder: str | Path, seed: int = 0) -> LlavaForConditionalGeneration:
    """The toy model of `folder` in float32, its embedding table grown to the new vocabulary."""
    base = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = LlavaForConditionalGeneration(instruct_config(base.config)).float()
    weights = base.model.state_dict()
    name = "language_model.embed_tokens.weight"
    weights[name] = instruct_table(weights[name], 1.0, seed)
    model.model.load_state_dict(weights, strict=True)
    model.tie_weights()
    return model.eval()


def instruct_config(config: LlavaConfig) -> LlavaConfig:
    """The toy model's configuration with the new vocabulary."""
    changed = {"vocab_size": len(INSTRUCT_WORDS), "eos_token_id": INSTRUCT_WORDS.ids[EOS]}
    plain = config.to_dict()
    return LlavaConfig.from_dict(plain | {"text_config": plain["text_config"] | changed})


def instruct_table(table: Tensor, apart: float, seed: int = 0) -> Tensor:
    """The toy model's embedding table with the new words."""
    return grown_table(table, INSTRUCT_WORDS, ALIKE, NEW_ANSWERS, apart, seed)
