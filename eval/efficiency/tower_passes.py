"""How often the vision tower runs in a whole run, and how much memory its remembered output takes.

Questions of a batch about one image share a pass, and so do those of later batches as long as the output is remembered
(eval/feature_cache.py): up to a bound, the images seen first are forgotten first.
"""

from collections.abc import Sequence
from typing import Any

import torch

from eval.benchmarks.base import Question
from eval.feature_cache import bytes_of, can_remember
from llava.model.llava_arch import Llava
from llava.model.multimodal_encoder.clip_encoder import encode
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import TokenLayout


def remembers(model: Llava, reducer: Reducer) -> bool:
    """Whether a run keeps the tower's output: methods that act before or inside the tower change it."""
    return can_remember(model) and reducer.acts_in.isdisjoint(("tower", "input_grid"))


@torch.inference_mode()
def image_bytes(model: Llava, reducer: Reducer, image: TokenLayout, itemsize: int) -> int:
    """Bytes of the features and scores that are remembered of one image.

    Args:
        model: on the meta device, where its tower computes shapes alone.
        itemsize: bytes of a feature; scores are float32.
    """
    tower: Any = model.tower_of(image.temporal)
    weight = next(tower.parameters())
    side = tower.config.image_size
    pixels = torch.empty(len(image.crops), 3, side, side, dtype=weight.dtype, device=weight.device)
    scores = reducer.tower_scores(image.tiles is not None)
    found = encode(tower, pixels, model.select_layer, scores, keep_cls=True)
    return bytes_of(found) + found.features.numel() * (itemsize - found.features.element_size())


def tower_passes(batches: Sequence[Sequence[Question]], each: float, bound: int, replicas: int = 1) -> int:
    """Images that the towers of all replicas see.

    Args:
        batches: in the order of asking; replicas take them in turns.
        each: bytes that an image is remembered with.
        bound: bytes that a replica remembers; 0 where it forgets every batch.
    """
    found = 0
    remembered: list[dict[str, None]] = [{} for _ in range(replicas)]
    for turn, batch in enumerate(batches):
        known = remembered[turn % replicas]
        for key in keys(batch):
            found += key not in known
            known.setdefault(key)
        while known and (not bound or len(known) * each > bound):
            del known[next(iter(known))]
    return found


def keys(questions: Sequence[Question]) -> dict[str, None]:
    """The names of the distinct images of some questions. A run tells them by content, which is not read here."""
    return dict.fromkeys(name for question in questions for name in question.images)
