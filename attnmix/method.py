"""AttnMix (AdaFV, AdaV): keep the tokens most similar to the question and those with the highest CLS attention.

Paper: https://arxiv.org/abs/2501.09532 and https://aclanthology.org/2025.findings-acl.258 (the equations of neither
    were available)
Official code read: JiayiV/AdaV@58d1f8d, llava/model/language_model/llava_llama.py, generate
Differs from it: a token that both rankings choose counts once and the budget is met; saliency is ranked over all tiles
    together, in the order of the tokens; the text is the question. `official` does as the release in all of these.
    docs/attnmix.md explains each difference.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnmix.mixture import adaptive_count, crop_pool, mix, ordered, text_scores
from attnmix.release import released_count, released_tokens
from llava.reduction import (
    MethodMetadata,
    ModelSpec,
    PromptState,
    Reducer,
    Reduction,
    TowerScore,
    UserError,
    option,
    options_of,
    register,
)

RELEASED = {"text": "after", "pool": "crop"}  # these options under `official`


@register("attnmix")
@dataclass(frozen=True, kw_only=True)
class AttnMix(Reducer):
    """Compares visual tokens with word embeddings, so it needs no text tower and runs no decoder layer."""

    summary: ClassVar[str] = (
        "highest similarity to the question's words and highest CLS attention, split by their geometric mean"
    )
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="cosine to word embeddings, and CLS attention, block −2",
        needs="CLS token",
        paper="AdaFV / AdaV, 2501.09532",
        url="https://arxiv.org/abs/2501.09532",
        code="JiayiV/AdaV@58d1f8d",
    )

    known_deviations: ClassVar[dict[str, str]] = {
        "duplicates with official=true": "the release keeps a token twice that both rankings choose",
    }

    crops: str = option("global", "ranks the tokens of all tiles together", ("global",))
    mix: str = option(
        "adaptive",
        "split by the geometric mean, text to image only, CLS only, or half of the budget each",
        ("adaptive", "t2i", "cls", "half"),
    )
    floor: float = option(0.25, "adaptive: least share of the budget for each ranking", least=0, most=0.5)
    temperature: float = option(0.01, "of the softmax of a text token over the visual tokens")
    text: str = option("question", "text that is compared with the image", ("question", "instruction", "after"))
    pool: str = option("global", "rank saliency over all tiles, or over the best of each tile", ("global", "crop"))
    block: int = option(-2, "tower block whose CLS attention is the saliency")
    official: bool = option(False, "exactly as released: duplicates, rounding, tiles and all text after the image")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"attnmix.temperature must be above 0, got {self.temperature:g}.")
        if self.official and self.mix == "half":
            raise UserError("attnmix.mix=half is in no release; leave out attnmix.official.")
        usual = options_of(type(self))
        for name, released in RELEASED.items():
            if self.official and getattr(self, name) not in (usual[name].default, released):
                raise UserError(f"attnmix.official takes {name}={released}; leave out attnmix.{name}.")

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if self.official and not self._kept(spec.layout.crops):
            least = spec.layout.crops * (1 if self.mix == "t2i" else 2)
            raise UserError(
                f"The budget must be at least {least} with attnmix.official: the release rounds it down to a multiple "
                f"of {least}, got {self.budget}."
            )

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        return (self._kept(spec.layout.crops),) * spec.layers

    def scores(self) -> tuple[TowerScore, ...]:
        return () if self.mix == "t2i" else (TowerScore("cls_attention", self.block),)

    def keeps_all(self, tokens: int) -> bool:
        return super().keeps_all(tokens) and not self.official

    def prompt(self, state: PromptState) -> Reduction | None:
        tokens, crops = state.tokens.shape[1], state.layout.crops
        zeros = torch.zeros(state.tokens.shape[:2], device=state.tokens.device)
        text = zeros if self.mix == "cls" else self._text_scores(state)
        saliency = zeros if self.mix == "t2i" else state.scores[self.scores()[0]]
        if self.official:
            return Reduction(released_tokens(text, saliency, crops, self.budget, self.floor, self.mix), tokens)
        if self.pool == "crop":
            pool = crop_pool(saliency, crops, -(-self.budget // crops))
            saliency = saliency.masked_fill(~pool, -torch.inf)
        return Reduction(mix(text, saliency, self._text_count(text, saliency), self.budget), tokens)

    def _kept(self, crops: int) -> int:
        return released_count(self.budget, crops, self.mix) if self.official else self.budget

    def _text_scores(self, state: PromptState) -> Tensor:
        rows = RELEASED["text"] if self.official else self.text
        for name, (start, stop) in zip(state.ids, state.spans(rows), strict=True):
            if start == stop:
                raise UserError(
                    f"attnmix compares the image with the {rows} of sample {name!r}, which is empty; "
                    "set attnmix.text=after to take the whole text after the image."
                )
        return text_scores(*state.text(rows), state.tokens, self.temperature, state.matmul)

    def _text_count(self, text: Tensor, saliency: Tensor) -> Tensor:
        """[B] int64, how many tokens are chosen by text."""
        if self.mix == "adaptive":
            return adaptive_count(ordered(text)[0], ordered(saliency)[0], self.budget, self.floor)
        share = {"t2i": self.budget, "cls": 0, "half": self.budget // 2}[self.mix]
        return torch.full((len(text),), share, device=text.device)
