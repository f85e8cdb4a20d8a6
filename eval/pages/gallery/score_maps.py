"""Score maps: what several methods rank by, as numbers for every patch of an image.

Each map is computed by the function of the method it belongs to, on the states that the pipeline gives methods.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attnmix.method import AttnMix
from attnmix.mixture import text_scores
from consensusdrop.fusion import fuse
from consensusdrop.method import ConsensusDrop, pool_attention
from eval.figures.patches import Ints
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction import PromptState, Reducer, TowerScore, option

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """A score of every visual token.

    Attributes:
        key: short name.
        title: for readers.
        meaning: what a value is, and for which methods it decides.
        values: [N], NaN where the score is not defined (newline and class tokens).
    """

    key: str
    title: str
    meaning: str
    values: Floats


@dataclass(frozen=True, eq=False)
class Kind:
    """What is known of a score before it is computed.

    Attributes:
        together: of a tiled image or a video: computed over all tiles or frames at once, else within each.
        needs_cls: needs the class token of the vision tower.
    """

    title: str
    meaning: str
    together: bool = False
    needs_cls: bool = False


KINDS = {
    "cls": Kind(
        "CLS attention",
        "attention of the vision tower's class token to the patch, mean over heads; ranks in FasterVLM, and in part in "
        "ConsensusDrop and AttnMix",
        needs_cls=True,
    ),
    "question": Kind(
        "question attention",
        "attention of the question's words to the patch, with the projections of decoder layer 0; the cross-modal "
        "score of ConsensusDrop",
    ),
    "fused": Kind(
        "fused ranking",
        "ConsensusDrop's fusion of the ranks by CLS attention and by question attention; 1 is first in both",
        needs_cls=True,
    ),
    "text": Kind(
        "text similarity",
        "largest share of the patch in a question word's similarity to all patches; the text score of AttnMix",
        together=True,
    ),
}


def score_maps(model: "Llava", sample: Sample) -> tuple[list[ScoreMap], list[str]]:
    """The scores of a sample's image, and a sentence for each that this model does not have."""
    found: dict[str, Floats] = {}
    for together in (False, True):
        probe = Probe(budget=1, retention_ratio=0.9, crops="global" if together else "each", cls=model.spec.has_cls)
        _, record = prefill(model, [sample], probe)
        for key in (key for key in probe.found if KINDS[key].together == together):
            # All in one array: a score of each view, at the indices of the view's tokens.
            values = np.full(record.runs[0][0].tokens, np.nan, dtype=np.float32)
            for indices, view in probe.found[key]:
                values[indices] = view
            found[key] = values
    maps = [ScoreMap(key, kind.title, kind.meaning, found[key]) for key, kind in KINDS.items() if key in found]
    missing = [
        f"No {kind.title}: the vision tower of {model.name} has no class token."
        for key, kind in KINDS.items()
        if key not in found
    ]
    return maps, missing


@dataclass(frozen=True, kw_only=True)
class Probe(Reducer):
    """Not a method: notes the scores of every view that it is given, and reduces nothing."""

    name: ClassVar[str] = "probe"
    cls: bool = option(True, "the tower has a class token")
    found: dict[str, list[tuple[Ints, Floats]]] = field(default_factory=dict, compare=False)

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention", ConsensusDrop(budget=1).block),) if self.cls else ()

    def keeps_all(self, tokens: int) -> bool:
        return False

    def prompt(self, state: PromptState) -> None:
        consensus, attnmix = ConsensusDrop(budget=1), AttnMix(budget=1)
        question = pool_attention(
            *state.text_attention(consensus.probe_layer, consensus.query, consensus.rope, contextual=False),
            consensus.heads,
            consensus.pooling,
        )
        self._note("question", state, question)
        self._note("text", state, text_scores(*state.text(attnmix.text), state.tokens, attnmix.temperature))
        if self.cls:
            saliency = state.scores[self.scores()[0]]
            choices = {"alpha": consensus.alpha, "cross_top": consensus.cross_top}
            best = fuse(saliency, saliency, consensus.fusion, 1, **choices).amax(1, keepdim=True)
            self._note("cls", state, saliency)
            self._note("fused", state, fuse(saliency, question, consensus.fusion, 1, **choices) / best.clamp(min=1))

    def _note(self, key: str, state: PromptState, values: Tensor) -> None:
        for row, view in enumerate(values.float().cpu().numpy()):
            indices = np.arange(len(view)) if state.members is None else state.members[row].cpu().numpy()
            self.found.setdefault(key, []).append((indices, view))
