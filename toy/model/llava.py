"""The projector and Llama decoder of the toy LLaVA: built new, loaded, with more words, and as what is trained."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from toy.data.scenes import GRID
from toy.data.vocabulary import BOS, EOS, IMAGE, PAD, TOY_WORDS, Vocabulary

PATCHES = GRID * GRID
# Rotary base of the models with tiles or frames. With 10,000 a token 3,000 positions away is rotated further than any
# that the toy model was trained on; this keeps the slowest rotations at those of 600 positions, and leaves the fast
# ones as they are.
LONG_ROPE_THETA = 50_000.0


def build_llava(vision: CLIPVisionConfig, width: int = 160, layers: int = 8) -> LlavaForConditionalGeneration:
    """LLaVA-1.5's architecture in small; decoder weights initialised for Muon."""
    text = LlamaConfig(
        vocab_size=len(TOY_WORDS),
        hidden_size=width,
        intermediate_size=416,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=TOY_WORDS.ids[BOS],
        eos_token_id=TOY_WORDS.ids[EOS],
        pad_token_id=TOY_WORDS.ids[PAD],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOY_WORDS.ids[IMAGE],
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for part in (model.model.language_model, model.model.multi_modal_projector):
        for name, p in part.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                nn.init.normal_(p, std=0.8 / math.sqrt(p.shape[1]))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.data *= 0.4
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=2 / math.sqrt(width))
    return model


@torch.no_grad()
def fold_feature_scale(projector: nn.Module, features: Tensor) -> None:
    """Fold the normalisation of the features (mean 0, deviation 1) into the first projector layer."""
    flat = features.float().flatten(0, 1)
    weight = projector.linear_1.weight / flat.std(0)
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(-weight @ flat.mean(0))


def load_toy(folder: Path, rope_theta: float = LONG_ROPE_THETA) -> LlavaForConditionalGeneration:
    """The toy model in float32, with another rotary base."""
    config = LlavaConfig.from_pretrained(folder)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
    return LlavaForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32).eval()


class Trainee(nn.Module):
    """The trained parts of a toy model, and a probe that only training needs.

    Args:
        llava: where the language model and the projector come from.
        newline: whether there is a newline vector.
        probe: numbers that a linear probe predicts from a visual token's state inside the decoder; 0 for no probe.
    """

    def __init__(self, llava: nn.Module, newline: bool = False, probe: int = 0):
        super().__init__()
        self.language_model, self.projector = llava.model.language_model, llava.model.multi_modal_projector
        width = self.language_model.embed_tokens.weight.shape[1]
        # Nearly nothing at first: the toy model reads tiles well before it has learned what a newline is.
        self.newline = nn.Parameter(0.02 * torch.randn(width)) if newline else None
        self.probe = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, probe)) if probe else None
        if probe:
            nn.init.zeros_(self.probe[1].weight)  # its error must not outweigh the answers' gradient at the start


def load_parts(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Load the language model and the projector of a finished stage into a LLaVA of any kind."""
    parts = {"language_model": model.model.language_model, "projector": model.model.multi_modal_projector}
    for prefix, part in parts.items():
        weights = {n.removeprefix(f"{prefix}."): w for n, w in saved.items() if n.startswith(f"{prefix}.")}
        part.load_state_dict(weights, strict=True)
    model.tie_weights()


def grown_table(
    table: Tensor,
    vocabulary: Vocabulary,
    alike: Mapping[str, str],
    answers: Mapping[str, Sequence[str]] | None = None,
    apart: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """The embedding table of a larger vocabulary, from that of the toy model.

    Args:
        alike: new word -> the old word of like use whose row it starts from.
        answers: new word -> the old words whose mean it starts from; any other new word starts from the mean of all.
        apart: distance between a new row and its start, in deviations of the table; a tenth of it for `alike`.
    """
    noise = torch.Generator().manual_seed(seed)
    old, rows, answers = TOY_WORDS.ids, [], answers or {}
    for word in vocabulary.words:
        if word in old:
            rows.append(table[old[word]])
            continue
        shift = torch.randn(table.shape[1], generator=noise) * apart * table.std()
        if word in alike:
            rows.append(table[old[alike[word]]] + 0.1 * shift)
        else:
            start = table[[old[w] for w in answers[word]]] if word in answers else table
            rows.append(start.mean(0) + shift)
    return torch.stack(rows)
