"""A forward pass of the decoder on packed texts, with any of the visual tokens, up to the states of the last layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toy.model.llava import Trainee
from toy.packing import Questions, Text, Visuals, attention_mask, position_ids


@dataclass(frozen=True)
class Decoded:
    """What the decoder makes of prompt prefix, visual tokens and texts, T tokens in this order.

    Attributes:
        states: [B, T, D] after the last layer, not normalised.
        early: after `early_at` layers; [B, V, numbers] predicted by the probe of the model from the visual tokens, or
            all states [B, T, D] where the model has no probe; None without `early_at`.
        visual: [B, V, D] the visual tokens as they enter the decoder.
        start: number of tokens before the texts.
    """

    states: Tensor
    early: Tensor | None
    visual: Tensor
    start: int


def forward(
    model: Trainee,
    prefix: list[int],
    visuals: Visuals,
    text: Text,
    renumber: bool = False,
    early_at: int | None = None,
) -> Decoded:
    """Run the decoder.

    Args:
        model: a `toy.model.llava.Trainee`.
        prefix: ids before the visual tokens.
        renumber: number the visual tokens that are there 0, 1, ... instead of by their position in the whole sequence.
        early_at: number of layers after which to look at the states as well.
    """
    llama = model.language_model
    table = llama.embed_tokens.weight
    visual = model.projector(visuals.features.to(table.dtype))
    if visuals.newline is not None:
        visual = torch.where(visuals.newline[..., None], model.newline, visual)
    start = table[torch.tensor(prefix)].expand(len(visual), -1, -1)
    hidden = torch.cat([start, visual, table[text.ids]], 1)
    rotary = llama.rotary_emb(hidden, position_ids(visuals, text, len(prefix), renumber))
    mask = attention_mask(visuals, text, len(prefix))
    early, after = None, len(prefix) + visual.shape[1]
    for number, layer in enumerate(llama.layers):
        if number == early_at:
            # Here, not after the loop: the order of operations decides the last bits of the gradients.
            early = hidden if model.probe is None else model.probe(hidden[:, len(prefix) : after]).float()
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return Decoded(hidden, early, visual, after)


def predict(model: Trainee, states: Tensor) -> Tensor:
    """[..., D] states -> [..., vocabulary] float32 logits."""
    llama = model.language_model
    return (llama.norm(states) @ llama.embed_tokens.weight.T).float()


def answer_logits(model: Trainee, decoded: Decoded, questions: Questions) -> Tensor:
    """[B, K, 2, vocabulary] where the answer and the end token of each question are predicted."""
    logits = predict(model, questions.answering(decoded.states, decoded.start))
    return logits.view(*questions.answer.shape, 2, -1)
