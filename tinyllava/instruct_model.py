"""The embedded model with the vocabulary of `tinyllava.instruct_vocabulary`: where its training starts from."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tinyllava import vocabulary
from tinyllava.chinese import PARTICLES, WORDS
from tinyllava.formats import LETTERS, UNANSWERABLE
from tinyllava.instruct_vocabulary import INSTRUCTIONS, ids, words
from tinyllava.vocabulary import COLOR_NAMES, DIGITS, SHAPES

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
# What the embedded model answers. New answers start among them, so that they are not ruled out at first.
ANSWERS = (*COLOR_NAMES, *SHAPES, *DIGITS, "yes", "no", "left", "right", "above", "below", "top", "bottom")
NEW_ANSWERS = (*LETTERS, UNANSWERABLE)


def build_instruct(folder: str | Path, seed: int = 0) -> LlavaForConditionalGeneration:
    """The embedded model of `folder` in float32, its table of words grown to the new vocabulary."""
    base = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = LlavaForConditionalGeneration(instruct_config(base.config)).float()
    weights = base.model.state_dict()
    name = "language_model.embed_tokens.weight"
    weights[name] = grown_table(weights[name], 1.0, seed)
    model.model.load_state_dict(weights, strict=True)
    model.tie_weights()
    return model.eval()


def instruct_config(config: LlavaConfig) -> LlavaConfig:
    """The embedded model's configuration with the new vocabulary."""
    changed = {"vocab_size": len(words()), "eos_token_id": ids()[vocabulary.EOS]}
    plain = config.to_dict()
    return LlavaConfig.from_dict(plain | {"text_config": plain["text_config"] | changed})


def grown_table(table: Tensor, apart: float, seed: int) -> Tensor:
    """Rows of the new vocabulary from those of the old one.

    Args:
        apart: how far a new row lies from where it starts, in deviations of the old table; a tenth of it for a word
            that has a like one.
    """
    noise = torch.Generator().manual_seed(seed)
    old, rows = vocabulary.ids(), []
    middle, answer = table.mean(0), table[[old[word] for word in ANSWERS]].mean(0)
    for word in words():
        if word in old:
            rows.append(table[old[word]])
            continue
        shift = torch.randn(table.shape[1], generator=noise) * apart * table.std()
        if word in ALIKE:
            rows.append(table[old[ALIKE[word]]] + 0.1 * shift)
        else:
            rows.append((answer if word in NEW_ANSWERS else middle) + shift)
    return torch.stack(rows)


def as_clip(tower: nn.Module) -> SimpleNamespace:
    """A vision tower where a CLIPModel is expected for its vision half."""
    return SimpleNamespace(vision_model=tower, config=SimpleNamespace(vision_config=tower.config))
