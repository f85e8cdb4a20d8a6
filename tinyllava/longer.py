"""Fine-tuning the embedded LLaVA on longer runs of visual tokens: tiles of a large picture, frames of a video.

As in `tinyllava.language`, the questions about one picture share its tokens, and a training step sees only some of
them, at the positions that they have in the whole run.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

# Rotary base of the longer models. With 10,000 a token 3,000 places away is turned further than any that the embedded
# model was trained on; this keeps the slowest turns at those of 600 places, and leaves the fast ones as they are.
ROPE_THETA = 50_000.0


@dataclass(frozen=True)
class Visuals:
    """V visual tokens of each of B runs.

    Attributes:
        features: [B, V, D], anything where `newline` or not `present`.
        newline: [B, V] bool, tokens that are the learned newline vector.
        places: [B, V] int64, place in the whole run, ascending.
        total: [B] int64, tokens of the whole run.
        present: [B, V] bool; False is padding at the end of a row.
    """

    features: Tensor
    newline: Tensor
    places: Tensor
    total: Tensor
    present: Tensor


def load_embedded(folder: Path, rope_theta: float = ROPE_THETA) -> LlavaForConditionalGeneration:
    """The embedded model in float32, with another rotary base."""
    config = LlavaConfig.from_pretrained(folder)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
    return LlavaForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32).eval()


class Trainee(nn.Module):
    """The trained parts of a longer model, and a reader that only training needs.

    Args:
        llava: where the language model and the projector come from.
        newline: whether there is a newline vector.
        probe: numbers that a linear reader predicts from a visual token's state inside the decoder.
    """

    def __init__(self, llava: nn.Module, newline: bool, probe: int):
        super().__init__()
        self.language_model, self.projector = (
            llava.model.language_model,
            llava.model.multi_modal_projector,
        )
        width = self.language_model.embed_tokens.weight.shape[1]
        # Nearly nothing at first: the embedded model reads tiles well before it has learned what a newline is.
        self.newline = nn.Parameter(0.02 * torch.randn(width)) if newline else None
        self.probe = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, probe))
        nn.init.zeros_(self.probe[1].weight)  # its error must not drown the answers' gradient at the start


def forward(
    model: Trainee, prefix: list[int], visuals: Visuals, questions, renumber: bool = False, probe_at: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, K, 2, vocabulary] where the answer and the end token are predicted.

    Args:
        prefix: ids in front of the visual tokens.
        questions: ids [B, K, L], ask_at [B, K] as `tinyllava.language.Questions`.
        renumber: count positions over the tokens that are there instead of the whole run.
        probe_at: decoder layers before the reader; None for no reading.

    Returns:
        The logits, and what the reader says about the visual tokens, [B, V, probe].
    """
    llama = model.language_model
    table = llama.embed_tokens.weight
    visual = model.projector(visuals.features.to(table.dtype))
    if model.newline is not None:
        visual = torch.where(visuals.newline[..., None], model.newline, visual)
    batch, count, length = questions.ids.shape
    start = table[torch.tensor(prefix)].expand(batch, -1, -1)
    hidden = torch.cat([start, visual, table[questions.ids.flatten(1)]], 1)
    rotary = llama.rotary_emb(hidden, positions(visuals, len(prefix), count, length, renumber))
    behind = len(prefix) + visual.shape[1]
    mask = causal_mask(behind, count, length)
    if not visuals.present.all():
        seen = torch.ones(batch, hidden.shape[1], dtype=torch.bool)
        seen[:, len(prefix) : behind] = visuals.present
        # A padding token sees itself, so that no row of the softmax is empty.
        mask = mask & (seen[:, None, None] | torch.eye(hidden.shape[1], dtype=torch.bool))
    read = None
    for number, layer in enumerate(llama.layers):
        if number == probe_at:
            read = model.probe(hidden[:, len(prefix) : behind]).float()
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    at = (behind + torch.arange(count) * length + questions.ask_at)[..., None] + torch.arange(2)
    asked = hidden.gather(1, at.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = (llama.norm(asked) @ table.T).float()
    return logits.view(batch, count, 2, -1), read


def positions(visuals: Visuals, prefix: int, count: int, length: int, renumber: bool) -> Tensor:
    """[B, T] position ids of prefix, visual tokens and questions; every question starts behind the run."""
    batch, width = visuals.places.shape
    picture = torch.arange(width).expand(batch, -1) if renumber else visuals.places
    after = visuals.present.sum(1) if renumber else visuals.total
    text = (prefix + after)[:, None] + torch.arange(length).repeat(count)
    return torch.cat([torch.arange(prefix).expand(batch, -1), prefix + picture, text], 1)


@lru_cache(maxsize=4)
def causal_mask(behind: int, count: int, length: int) -> Tensor:
    """[1, 1, T, T] bool: causal, and no question sees another. `behind` tokens stand in front of the questions."""
    owner = torch.cat([torch.full((behind,), -1), torch.arange(count).repeat_interleave(length)])
    place = torch.arange(len(owner))
    causal = place[None] <= place[:, None]
    return (causal & ((owner[None] == -1) | (owner[None] == owner[:, None])))[None, None]


def answer_loss(logits: Tensor, answer: Tensor, end: int) -> Tensor:
    """Cross-entropy on the answer word, and lightly on the end token behind it; -100 marks no question."""
    ends = torch.where(answer == -100, -100, end)
    word = F.cross_entropy(logits[:, :, 0].flatten(0, 1), answer.flatten())
    return word + 0.1 * F.cross_entropy(logits[:, :, 1].flatten(0, 1), ends.flatten())
