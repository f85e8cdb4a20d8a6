"""All scores of the three papers on one picture: a method that keeps every token and notes what it could rank by.

It goes through the ordinary pipeline, so a noted score is what the method of that name would receive.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnmix.mixture import text_scores
from consensusdrop.method import pool_attention
from eval.findings.scenes import content_words
from llava.model.llava_arch import Llava
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction import DecoderState, PromptState, Reducer, Reduction, TowerScore
from visiondrop.scoring import look, visual_scores

ENCODER, COSINE, PROBE = "encoder", "cosine", "probe"
# Scores of each decoder layer. "last": row of the last prompt token; "question": mean over the question's rows;
# "content", "function": the same over the words that name things, and over the others; "visual": attention received
# from visual tokens (VisionDrop's); "viewers": the same divided by the number of tokens that can see the patch.
TEXT_KINDS = ("last", "question", "content", "function")
VISUAL_KINDS = ("visual", "viewers")


def score_names(layers: int) -> tuple[str, ...]:
    """Names of all scores of a model with so many decoder layers, such as "last 3"."""
    text = [f"{kind} {layer}" for kind in TEXT_KINDS for layer in range(layers)]
    visual = [f"{kind} {layer}" for kind in VISUAL_KINDS for layer in range(1, layers)]
    return (ENCODER, COSINE, PROBE, *text, *visual)


@dataclass(frozen=True, kw_only=True)
class Observer(Reducer):
    """Notes scores and drops nothing. Not registered: it is no method.

    Attributes:
        reversed: the decoder reads the visual tokens in the opposite order. Their features stay what they were, so
            only their places in the sequence differ.
        notes: name -> [Q, 576] in raster order, for a batch of Q questions about one picture; for text rows
            [Q, T, 576] under "rows LAYER", with their mask [Q, T] under "exists".
    """

    known_deviations: ClassVar[dict[str, str]] = {"unsorted": "the decoder reads backwards where `reversed` says so"}

    reversed: bool = False
    notes: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def keeps_all(self, tokens: int) -> bool:
        return False  # or the pipeline would skip the stage before the decoder

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers))

    def prompt(self, state: PromptState) -> Reduction | None:
        self.notes[ENCODER] = state.scores[self.scores()[0]]
        words, exists = state.text("question")
        self.notes[COSINE] = text_scores(words, exists, state.tokens, temperature=0.01)
        attention = state.text_attention(0, "question", rotary=False, contextual=False)
        self.notes[PROBE] = pool_attention(*attention, "mean", "mean")
        self.notes["tokens"], self.notes["exists"] = state.tokens[0], exists
        # Layer 0 sees embeddings; its attention with rotation, the softmax over visual keys alone.
        if not self.reversed:
            for rows in ("question", "last"):
                weights, _ = state.text_attention(0, rows, rotary=True, contextual=False)
                self._note_text(rows, 0, weights)
            return None
        count = state.tokens.shape[1]
        backwards = torch.arange(count - 1, -1, -1, device=state.tokens.device)
        return Reduction(backwards.expand(len(state.tokens), -1), count)

    def decoder(self, state: DecoderState) -> Reduction | None:
        for rows in ("question", "last"):
            weights, _ = state.attention(rows)
            self._note_text(rows, state.layer, weights)
        # Visual tokens do not see the question, so one question of the picture stands for all.
        first = replace(state, ids=state.ids[:1], tokens=state.tokens[:1], sequence=state.sequence.rows([(0, 0)]))
        seen = look(first, "causal")
        for kind, average in zip(VISUAL_KINDS, ("all", "viewers"), strict=True):
            score = visual_scores(first, seen, "causal", average, diagonal=True)
            self.notes[f"{kind} {state.layer}"] = self._raster(score).expand(len(state.tokens), -1)
        return None

    def _note_text(self, rows: str, layer: int, weights: Tensor) -> None:
        """Keep attention [Q, H, T, N] as its mean over heads."""
        mean = self._raster(weights.mean(1))
        self.notes[f"rows {layer}" if rows == "question" else f"last {layer}"] = (
            mean if rows == "question" else mean[:, 0]
        )

    def _raster(self, score: Tensor) -> Tensor:
        return score.flip(-1) if self.reversed else score


def observe(model: Llava, samples: Sequence[Sample], reverse: bool = False) -> dict[str, NDArray[np.float64]]:
    """All scores of the questions about one picture.

    Args:
        samples: Q questions with the same picture.
        reverse: feed the visual tokens to the decoder in the opposite order. Then the scores of layer 0 are left out.

    Returns:
        The names of `score_names` -> [Q, 576]; and "tokens": [576, D] projected visual tokens.
    """
    layers = len(model.llm.layers)  # type: ignore[arg-type]
    observer = Observer(budget=model.visual_tokens, reversed=reverse)
    prefill(model, samples, observer)
    notes = {name: tensor.double().numpy() for name, tensor in observer.notes.items() if name != "exists"}
    exists = observer.notes["exists"].numpy()
    for layer in range(int(reverse), layers):
        rows = notes.pop(f"rows {layer}")
        for kind in TEXT_KINDS[1:]:
            notes[f"{kind} {layer}"] = np.stack(
                [
                    own[chosen_rows(sample.question, kind, there)].mean(0)
                    for own, sample, there in zip(rows, samples, exists, strict=True)
                ]
            )
    return notes


def chosen_rows(question: str, kind: str, exists: NDArray[Any]) -> NDArray[np.bool_]:
    """[T] bool: which of the question's rows a kind of score averages."""
    content = np.zeros(len(exists), dtype=bool)
    found = content_words(question)
    if len(found) != exists.sum():
        raise ValueError(f"{question!r} has {exists.sum()} tokens, expected {len(found)} words.")
    content[: len(found)] = found
    return {"question": exists, "content": content, "function": exists & ~content}[kind]
