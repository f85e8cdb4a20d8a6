"""MMTok: greedily keep the tokens that cover the question's words and all patches best.

Paper: https://arxiv.org/abs/2508.18264
Official code read: Ironieser/MMTok@d1522cd, mmtok/core/semantic_selector.py, text_processor.py and mmtok_core.py,
mmtok/llava/patch_llava.py
Differs from it: it takes batches, and compares in float32 (theirs normalises in the model's type). If the image has
fewer patches than the budget, padding fills up by the same rule (theirs repeats patch 0). A prompt without a question
is refused (theirs asks "What do you see in this image?"). `llava.reduce` gets pixels, not images, so nothing is known
to be padding there.

Shapes: B images, N visual tokens, T tokens of the words of one question.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    MethodMetadata,
    PatchGrid,
    PromptState,
    Reducer,
    Reduction,
    Release,
    UserError,
    cover_most,
    option,
    register,
)
from llava.reduction.token_layout import Canvas

# Answer formats that are taken out of a question, and words that show nothing.
FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
STOPS = (
    "a an the is are was were be been being have has had do does did it they he she we you i what where when why how "
    "who which and or but so if then question answer to for with by from at into onto upon"
)
PATCH = 14  # pixels along the side of a patch
TEMPERATURE = 0.2  # of the patches' softmax


def keywords(message: str) -> list[str]:
    """The words of a question that may show in an image; all its words, as they are, if there is none."""
    for sentence in FORMATS:
        message = message.replace(sentence, "")
    return [word for word in re.findall(r"\w+", message) if word.lower() not in STOPS.split()] or message.split()


@lru_cache(maxsize=256)
def on_padding(canvas: Canvas, grid: PatchGrid) -> Tensor | None:
    """[N] bool, the patches that lie wholly on padding; None if there are none.

    Sides are rounded to pixels before padding is counted, so that a patch that shows less than a pixel may count.
    """
    (width, height), (left, top, right, bottom) = canvas.size, canvas.box
    rows, columns = (
        _empty(count, extent, size)
        for count, extent, size in ((grid.rows, bottom - top, height), (grid.columns, right - left, width))
    )
    mask = (rows[:, None] | columns).flatten()
    return mask if mask.any() else None


def _empty(count: int, extent: int, size: int) -> Tensor:
    """[count] bool, the rows of patches outside of an image that takes `extent` of `size` in the middle."""
    side = PATCH * count
    image = round(side * extent / size)
    before = max(0, (side - image) // 2)
    after = max(0, side - image - before)
    place = torch.arange(count)
    return (place < before // PATCH) | (place >= count - after // PATCH)


@register("mmtok")
@dataclass(frozen=True, kw_only=True)
class MMTok(Reducer):
    """Words are covered by projected tokens, patches by tower features. At most one token for each word is for it."""

    summary: ClassVar[str] = "greedy coverage of the question's words and of all patches"
    needs_words: ClassVar[bool] = True
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="gain in coverage: softmax of the cosines of words and projected tokens, and of the features of patches",
        needs="tokenizer",
        reads=("features", "tokens", "question", "grid"),
        paper="MMTok, ICLR 2026",
        url="https://arxiv.org/abs/2508.18264",
        code="Ironieser/MMTok@d1522cd",
        release=Release(
            batch="one sample at a time",
            dtype="vectors are normalised in it",
            ours="where padding has to fill up, each patch is kept once",
            licence="Apache-2.0",
        ),
    )

    alpha: float = option(0.5, "weight of the patches beside the words", least=0)
    temperature: float = option(0.02, "temperature of the words' softmax; the release takes 0.01 for Qwen", least=0.001)
    padding: str = option(
        "last",
        "patches of padding: chosen after all others, or like them (the release for LLaVA-NeXT)",
        ("last", "like"),
    )

    def prompt(self, state: PromptState) -> Reduction | None:
        tokens, patches = (F.normalize(part.float(), dim=-1) for part in (state.tokens, state.features))
        count, tables = tokens.shape[1], []
        for name, message, own, shown in zip(state.ids, state.messages, tokens, patches, strict=True):
            if not (words := keywords(message)):
                raise UserError(f"mmtok compares images with words, and sample {name!r} has no question; give it one.")
            text = F.normalize(state.embed_words(words).float(), dim=-1)  # [T, H]
            by_words = (state.matmul(text, own.mT) / self.temperature).softmax(-1) / len(text)
            by_patches = (state.matmul(shown, shown.mT) / TEMPERATURE).softmax(-1) * (self.alpha / count)
            tables.append(torch.cat([by_words, by_patches]).T.contiguous())
        late: list[Tensor | None] = [None] * len(tables)
        if self.padding == "last":
            late = [None if one is None else on_padding(one, state.layout) for one in state.canvases] or late
        return Reduction(cover_most(tables, self.budget, late).sort(1).values, count)
