"""The toy LLaVA and what is made of it: with all answer formats, with tiles, with video towers; and what is trained.

The towers of the toy Video-LLaVA are the toy model's, for 128 x 128 pixels: none of their weights is trained. They keep
the middle 16 x 16 of its table of 24 x 24 positions, as if a frame were the middle of a picture, so that patches keep
their size and their distances.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from lab.toy.data.corpus import FRAME_PATCHES, FRAME_TOKENS, PINPOINTS
from lab.toy.data.formats import INSTRUCT_WORDS, INSTRUCTIONS, LETTERS, UNANSWERABLE
from lab.toy.data.questions import CHINESE_PARTICLES, CHINESE_WORDS
from lab.toy.data.regions import BOX_ALIKE, BOX_WORDS, COORDINATES
from lab.toy.data.scenes import GRID, PATCH, PATCHES
from lab.toy.data.videos import SEEN, VIDEO_SIDE
from lab.toy.data.vocabulary import (
    BOS,
    COLOR_NAMES,
    DIGITS,
    EOS,
    IMAGE,
    LONG,
    PAD,
    SHAPES,
    SYSTEM,
    TOY_WORDS,
    VIDEO,
    VIDEO_SYSTEM,
    VIDEO_WORDS,
    Vocabulary,
)
from llava.errors import UserError

# Rotary base of the models with tiles or frames. With 10,000 a token 3,000 positions away is rotated further than any
# that the toy model was trained on; this keeps the slowest rotations at those of 600 positions, and leaves the fast
# ones as they are.
LONG_ROPE_THETA = 50_000.0
# Of the configurations of all toy models; the image token has the same id in all vocabularies.
SHARED = {
    "image_token_index": TOY_WORDS.ids[IMAGE],
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": True,
}


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
    config = LlavaConfig(vision_config=vision, text_config=text, image_seq_length=PATCHES, **SHARED)
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


def grown_table(
    table: Tensor,
    vocabulary: Vocabulary,
    alike: Mapping[str, str],
    answers: Mapping[str, Sequence[str]] | None = None,
    apart: float = 1.0,
    smaller: Vocabulary = TOY_WORDS,
) -> Tensor:
    """The embedding table of a larger vocabulary, from that of the smaller one.

    Args:
        alike: new word -> the old word of like use whose row it starts from.
        answers: new word -> the old words whose mean it starts from; any other new word starts from the mean of all.
        apart: distance between a new row and its start, in deviations of the table; a tenth of it for `alike`.
    """
    noise = torch.Generator().manual_seed(0)
    old, rows, answers = smaller.ids, [], answers or {}
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


# New word -> the old one that it starts from, as near in meaning or use as there is one.
INSTRUCT_ALIKE = {
    **{chinese: english for english, chinese in CHINESE_WORDS.items()},
    **CHINESE_PARTICLES,
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


def build_instruct(folder: str | Path) -> LlavaForConditionalGeneration:
    """The toy model of `folder` in float32 with the words of all formats."""
    return build_grown(folder, TOY_WORDS, INSTRUCT_WORDS, instruct_table)


def build_boxes(folder: str | Path) -> LlavaForConditionalGeneration:
    """The toy model of all formats in `folder` in float32 with the words of boxes."""
    return build_grown(folder, INSTRUCT_WORDS, BOX_WORDS, box_table)


def build_grown(
    folder: str | Path, smaller: Vocabulary, words: Vocabulary, table: Callable[[Tensor, float], Tensor]
) -> LlavaForConditionalGeneration:
    """The model of `folder` in float32, its embedding table grown by `table`(old one, distance of new rows)."""
    base = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    known = base.config.text_config.vocab_size
    if known != len(smaller):
        raise UserError(f"{folder} knows {known} words; this stage starts from a toy model of {len(smaller)} words.")
    config = LlavaConfig.from_dict(base.config.to_dict())
    config.text_config.update({"vocab_size": len(words), "eos_token_id": words.ids[EOS]})
    model = LlavaForConditionalGeneration(config).float()
    weights = base.model.state_dict()
    name = "language_model.embed_tokens.weight"
    weights[name] = table(weights[name], 1.0)
    model.model.load_state_dict(weights, strict=True)
    model.tie_weights()
    return model.eval()


def text_config(config: LlavaConfig, **changed: int) -> LlamaConfig:
    """The toy model's decoder configuration with changes."""
    return type(config.text_config).from_dict(config.text_config.to_dict() | changed)


def instruct_table(table: Tensor, apart: float) -> Tensor:
    """The toy model's embedding table with the new words."""
    return grown_table(table, INSTRUCT_WORDS, INSTRUCT_ALIKE, NEW_ANSWERS, apart)


def box_table(table: Tensor, apart: float) -> Tensor:
    """The embedding table of the model of all formats with the words of boxes.

    Coordinates start near the digits' mean, on a curve on which near coordinates have like rows: sixteen cosines.
    """
    grown = grown_table(table, BOX_WORDS, BOX_ALIKE, dict.fromkeys(COORDINATES, DIGITS), 0.1 * apart, INSTRUCT_WORDS)
    waves = torch.cos(torch.arange(1, 17) * math.pi * torch.linspace(0, 1, len(COORDINATES))[:, None])
    curve = waves @ torch.randn(16, table.shape[1], generator=torch.Generator().manual_seed(0)) / math.sqrt(8)
    grown[[BOX_WORDS.ids[word] for word in COORDINATES]] += 0.5 * apart * table.std() * curve
    return grown


def build_next(llava: nn.Module) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT in float32 with the tower of the toy LLaVA; the other weights are new."""
    tiled = LlavaNextConfig(
        vision_config=llava.config.vision_config,
        text_config=text_config(llava.config, max_position_embeddings=LONG),
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        image_seq_length=PATCHES,
        **SHARED,
    )
    model = LlavaNextForConditionalGeneration(tiled).float()
    model.model.vision_tower.load_state_dict(llava.model.vision_tower.state_dict(), strict=True)
    return model


# New word -> the old one that it starts from.
VIDEO_ALIKE = {VIDEO_SYSTEM: SYSTEM, VIDEO: IMAGE, "video": "image", "up": "above", "down": "below", "where": "which"}


def crop_tower(tower: nn.Module) -> CLIPVisionModel:
    """The tower of 24 x 24 patches cut to the middle 16 x 16; float32, its own copy."""
    grid = VIDEO_SIDE // PATCH
    config = type(tower.config).from_dict(tower.config.to_dict() | {"image_size": VIDEO_SIDE})
    small = CLIPVisionModel(config)
    weights = {name: tensor.detach().clone().float() for name, tensor in tower.state_dict().items()}
    name = "embeddings.position_embedding.weight"
    margin = (GRID - grid) // 2
    table = weights[name][1:].unflatten(0, (GRID, GRID))
    middle = table[margin : margin + grid, margin : margin + grid].flatten(0, 1)
    weights[name] = torch.cat([weights[name][:1], middle])
    small.load_state_dict(weights, strict=True)
    return small.eval()


@torch.no_grad()
def build_video_llava(llava: nn.Module) -> VideoLlavaForConditionalGeneration:
    """The toy LLaVA's weights in a Video-LLaVA. New words start near a word of like use."""
    tower = crop_tower(llava.model.vision_tower)
    changed = {"vocab_size": len(VIDEO_WORDS), "eos_token_id": VIDEO_WORDS.ids[EOS], "max_position_embeddings": LONG}
    config = VideoLlavaConfig(
        vision_config=tower.config,
        text_config=text_config(llava.config, **changed),
        video_token_index=VIDEO_WORDS.ids[VIDEO],
        image_seq_length=FRAME_PATCHES,
        video_seq_length=SEEN * FRAME_TOKENS,
        **SHARED,
    )
    model = VideoLlavaForConditionalGeneration(config).float()
    for part in (model.model.image_tower, model.model.video_tower):
        part.load_state_dict(tower.state_dict(), strict=True)
    model.model.multi_modal_projector.load_state_dict(llava.model.multi_modal_projector.state_dict(), strict=True)
    weights = {n: w.float() for n, w in llava.model.language_model.state_dict().items()}
    weights["embed_tokens.weight"] = grown_table(weights["embed_tokens.weight"], VIDEO_WORDS, VIDEO_ALIKE)
    model.model.language_model.load_state_dict(weights, strict=True)
    model.tie_weights()
    return model.eval()
