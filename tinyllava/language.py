"""The projector and Llama decoder of the embedded LLaVA, and packed training batches.

Ten questions share one copy of their picture's tokens: each question sees the prefix and itself, and its positions
restart behind the picture. That is the same computation as ten separate prompts, at a fraction of the cost.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tinyllava.corpus import Corpus
from tinyllava.questions import ask
from tinyllava.scenes import GRID, SIDE
from tinyllava.vision import COLUMN
from tinyllava.vocabulary import (
    ASSISTANT,
    BOS,
    COLOR_NAMES,
    DIGITS,
    EOS,
    IMAGE,
    PAD,
    SHAPES,
    SHORT_ANSWER,
    SIZES,
    SYSTEM,
    USER,
    encode,
    ids,
    words,
)

PATCHES = GRID * GRID
# Longest question (12 words), suffix, role, answer.
QUESTION_LENGTH = 16


def prefix_ids() -> list[int]:
    """What the tokenizer makes of the prompt in front of the picture."""
    return [ids()[token] for token in (BOS, SYSTEM, USER)]


def build_llava(vision: CLIPVisionConfig, width: int = 160, layers: int = 8) -> LlavaForConditionalGeneration:
    """LLaVA-1.5's architecture in small; decoder weights initialised for Muon."""
    text = LlamaConfig(
        vocab_size=len(words()),
        hidden_size=width,
        intermediate_size=416,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=ids()[BOS],
        eos_token_id=ids()[EOS],
        pad_token_id=ids()[PAD],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids()[IMAGE],
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
    """Let the first projector layer see features of mean 0 and deviation 1, without a new layer."""
    flat = features.float().flatten(0, 1)
    weight = projector.linear_1.weight / flat.std(0)
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(-weight @ flat.mean(0))


class Questions:
    """K questions for each of B scenes as padded ids, with the answer's place.

    ids: [B, K, QUESTION_LENGTH]; ask_at: [B, K], the position that predicts the answer; answer: [B, K], -100 where
    a scene gave no question; family: [B, K] names.
    """

    def __init__(self, corpus: Corpus, rows: np.ndarray, families: list[list[str]], rng: np.random.Generator):
        shape = (len(rows), max(map(len, families)))
        self.ids = torch.full((*shape, QUESTION_LENGTH), ids()[PAD])
        self.ask_at = torch.zeros(shape, dtype=torch.long)
        self.answer = torch.full(shape, -100)
        self.family = np.full(shape, "", dtype=object)
        tail = [ids()[SHORT_ANSWER], ids()[ASSISTANT]]
        for i, row in enumerate(rows):
            things = corpus.list_things(int(row))
            for j, family in enumerate(families[i]):
                question = ask(things, family, rng, tries=12)
                if question is None:
                    continue
                answer = encode(question.answer)[0]
                line = [*encode(question.text), *tail, answer]
                self.ids[i, j, : len(line)] = torch.tensor(line)
                self.ask_at[i, j], self.answer[i, j], self.family[i, j] = len(line) - 2, answer, family


@cache
def packed_mask(visual: int, questions: int) -> Tensor:
    """[1, 1, T, T] bool: causal, and no question sees another."""
    prefix = len(prefix_ids()) + visual
    owner = torch.cat([torch.full((prefix,), -1), torch.arange(questions).repeat_interleave(QUESTION_LENGTH)])
    place = torch.arange(len(owner))
    causal = place[None] <= place[:, None]
    return (causal & ((owner[None] == -1) | (owner[None] == owner[:, None])))[None, None]


def packed_positions(kept: Tensor, questions: int, renumber: bool) -> Tensor:
    """[B, T] position ids; `kept` [B, V] are the patch positions of the visual tokens that are there."""
    batch, visual = kept.shape
    start = len(prefix_ids())
    picture = torch.arange(visual).expand(batch, -1) if renumber else kept
    after = start + (visual if renumber else PATCHES)
    text = (after + torch.arange(QUESTION_LENGTH)).repeat(questions).expand(batch, -1)
    return torch.cat([torch.arange(start).expand(batch, -1), start + picture, text], 1)


def forward(model: nn.Module, features: Tensor, kept: Tensor, questions: Questions, renumber: bool):
    """Logits [B, K, 2, vocabulary] where the answer and the end token are predicted, and the visual tokens."""
    llama, projector = model.language_model, model.projector
    table = llama.embed_tokens.weight
    visual = projector(features.to(table.dtype))
    batch, count = questions.answer.shape
    prefix = table[torch.tensor(prefix_ids())].expand(batch, -1, -1)
    hidden = torch.cat([prefix, visual, table[questions.ids.flatten(1)]], 1)
    rotary = llama.rotary_emb(hidden, packed_positions(kept, count, renumber))
    mask = packed_mask(kept.shape[1], count)
    for layer in llama.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    start = prefix.shape[1] + visual.shape[1] + torch.arange(count) * QUESTION_LENGTH
    at = (start + questions.ask_at)[..., None] + torch.arange(2)
    asked = hidden.gather(1, at.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = (llama.norm(asked) @ table.T).float()
    return logits.view(batch, count, 2, -1), visual


def answer_loss(logits: Tensor, answer: Tensor) -> Tensor:
    """Cross-entropy on the answer word, and lightly on the end token behind it."""
    end = torch.where(answer == -100, -100, ids()[EOS])
    word = F.cross_entropy(logits[:, :, 0].flatten(0, 1), answer.flatten())
    return word + 0.1 * F.cross_entropy(logits[:, :, 1].flatten(0, 1), end.flatten())


def alignment_loss(table: Tensor, visual: Tensor, labels: Tensor) -> Tensor:
    """Projected patches against the words for what they show and where: LLaVA's caption stage in one line.

    Shape, colour, digit and size; left or right half, top or bottom half.

    Favours methods that compare word embeddings with visual tokens, so it is light and ends early.
    """
    total = visual.new_zeros((), dtype=torch.float32)
    for column, names in (("shape", SHAPES), ("color", COLOR_NAMES), ("digit", DIGITS), ("big", SIZES)):
        label = labels[..., COLUMN[column]].long()
        known = (label >= 0) & (labels[..., 0] > 1)
        candidates = table[torch.tensor([ids()[name] for name in names])]
        total = total + F.cross_entropy(0.5 * (visual[known] @ candidates.T).float(), label[known])
    askable = labels[..., 0] > 1
    for column, names in (("x", ("left", "right")), ("y", ("top", "bottom"))):
        half = (labels[..., COLUMN[column]] > SIDE / 2).long()
        candidates = table[torch.tensor([ids()[name] for name in names])]
        total = total + F.cross_entropy(0.5 * (visual[askable] @ candidates.T).float(), half[askable])
    return total
