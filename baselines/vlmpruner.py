"""VLM-Pruner: from a few pivots outwards, keep visual tokens that are unlike the kept ones, near ones first.

Paper: https://arxiv.org/abs/2512.02700
Official code read: Casey-bit/VLMPruner@556a914, llava/model/language_model/modeling_llama_self.py
Differs from it: the threshold rises until the budget is met; the release stops after the first round that adds no
token and then keeps fewer. Cosines and scores are computed in float32. Distances are in units of the image's diagonal
for any grid, tiles included; the release for LLaVA has 24 x 24 patches. The budget is a mean over layers;
`schedule=kept` counts as the release.

Each batch of candidates depends on the batches before it, so the loop runs on the host with numpy. On a GPU the host
waits once per image for the cosines of all pairs, 1.3 MB for 576 tokens, and then takes 0.2 to 0.6 ms, in which the GPU
is idle; on the device the same loop would launch thousands of kernels. For N tokens, N x N cosines are held.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from baselines._staged import OneStage
from llava.reduction import (
    DecoderState,
    MethodMetadata,
    Reduction,
    Release,
    gather_tokens,
    in_float32,
    option,
    places,
    register,
)

CHANNELS = 256  # of the highest variance, by which tokens are compared
GROUP = 16  # candidates that are looked at together
STEP = 0.1  # by which the threshold rises each round
SPREAD = 0.5  # how much farther away a token a whole diagonal away seems
OWN, TINY = 0.3, 1e-8  # a kept token's part in its average; the least sum of weights that is divided by

Numbers = NDArray[Any]


def pivots_of(keys: Tensor, count: int) -> Tensor:
    """[B, N, D] keys -> [B, count]: the token of the largest L1 norm, then always the one farthest from all chosen."""
    chosen = [keys.abs().sum(-1).argmax(1, keepdim=True)]
    nearest = keys.new_full(keys.shape[:2], torch.inf)
    while len(chosen) < count:
        apart = (keys - gather_tokens(keys, chosen[-1])).square().sum(-1)
        nearest = torch.minimum(nearest, apart).scatter(1, chosen[-1], -1.0)  # never chosen again
        chosen.append(nearest.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


def grow(cosine: Numbers, position: Numbers, pivots: Numbers, count: int, threshold: float) -> Numbers:
    """[count] indices in the order of choice, for one image.

    The likeness of a token to the chosen ones is its highest cosine, and more the farther it is from all of them. In
    each round, candidates come by their likeness at its start, a group at a time; those of a group whose likeness is
    below the threshold by then are chosen. If the budget ends inside a group, its least alike are chosen.

    Args:
        cosine: [N, N].
        position: [N, 2], with the diagonal of the image as unit.
        pivots: [P] indices that are chosen at the start.
    """
    total = len(cosine)
    free, nearest, apart = np.ones(total, bool), np.full(total, -np.inf), np.full(total, np.inf)
    chosen: list[Numbers] = []

    def choose(tokens: Numbers) -> None:
        chosen.append(tokens)
        free[tokens] = False
        np.maximum(nearest, cosine[tokens].max(0), out=nearest)
        down, across = (axis - axis[tokens, None] for axis in position.T)
        np.minimum(apart, (down**2 + across**2).min(0), out=apart)

    choose(pivots)
    left = count - len(pivots)
    while left > 0:
        order, start = np.flatnonzero(free), 0
        order = order[(nearest * (1 + SPREAD * np.sqrt(apart)))[order].argsort(kind="stable")]
        while left > 0:
            alike = (nearest * (1 + SPREAD * np.sqrt(apart)))[order[start:]]
            below = ~(alike >= threshold)  # also where it is no number
            if not below.any():
                break
            skipped = below.argmax() // GROUP * GROUP  # groups that add nothing change nothing
            group, alike, below = (part[skipped : skipped + GROUP] for part in (order[start:], alike, below))
            found = group[below]
            if len(found) > left:
                found = group[alike.argsort(kind="stable")[:left]]
            choose(found)
            left, start = left - len(found), start + int(skipped) + GROUP
        threshold += STEP
    return np.concatenate(chosen)


def absorb(cosine: Tensor, kept: Tensor) -> Reduction:
    """Average each dropped token into the kept one [B, K] that is most like it, weighted by its cosine [B, N, N].

    A kept token whose members' cosines add up to nothing stays as it is.
    """
    total = cosine.shape[1]
    slots = places(*kept.shape, kept.device)
    best, home = cosine.gather(2, kept.unsqueeze(1).expand(-1, total, -1)).max(2)
    best = best.scatter(1, kept, 0.0)
    # Summed in a fixed order, also on a GPU.
    sums = torch.where(home.unsqueeze(1) == slots.unsqueeze(2), best.unsqueeze(1), 0.0).sum(2)
    merges = sums > TINY
    share = torch.where(merges, (1 - OWN) / sums, 0.0).gather(1, home)
    weight = (best * share).scatter(1, kept, torch.where(merges, OWN, 1.0))
    assignment = home.masked_fill(~merges.gather(1, home), -1).scatter(1, kept, slots)
    return Reduction(kept, total, assignment, weight)


@register("vlmpruner")
@dataclass(frozen=True, kw_only=True)
class VLMPruner(OneStage):
    """Reads keys, hidden states and places, but no attention and no question."""

    summary: ClassVar[str] = "grow from key pivots to tokens unlike the kept ones, near ones first; merge the rest"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 2 of 32",
        score="least cosine similarity to the kept tokens, raised with the distance from them",
        rest="averaged by cosine similarity into the most similar kept token, which counts three tenths",
        reads=("tokens", "keys", "grid"),
        similarity="tokens",
        weights="similarity",
        paper="VLM-Pruner, 2512.02700",
        url="https://arxiv.org/abs/2512.02700",
        code="Casey-bit/VLMPruner@556a914",
        release=Release(
            dtype="cosines and key norms are computed in the model's precision",
            count="the two layers before the drop; fewer tokens than asked if a round adds none",
            ours="the threshold rises until the budget is met; the host waits once for each image",
            licence="Apache-2.0",
        ),
    )

    pivots: int = option(4, "tokens of large, different keys from which the choice starts", least=1)
    threshold: float = option(0.8, "similarity to the kept tokens below which the first round adds a token", least=0)

    def reduce(self, state: DecoderState, keep: int) -> Reduction:
        tokens, sequence = in_float32(state.tokens), state.entered
        batch, total = tokens.shape[:2]
        keys = in_float32(sequence.take(state.keys.transpose(1, 2), sequence.images)).flatten(2)
        pivots = pivots_of(keys, min(self.pivots, keep))

        channels = tokens.var(1).argsort(dim=1, descending=True, stable=True)[:, :CHANNELS]
        unit = F.normalize(tokens.gather(2, channels.unsqueeze(1).expand(-1, total, -1)), dim=-1)
        cosine = state.matmul(unit, unit.mT)

        # The host reads cosines and pivots in one piece, so that it waits once per image. All images share one buffer;
        # the driver writes it directly, where it would fill up fresh memory page by page (2,880 tokens: 33 MB).
        marks = tokens.new_zeros(batch, 1, total).scatter_(2, pivots.unsqueeze(1), 1.0)
        whole = total == state.layouts[0].tokens
        left = [None] * batch if whole else state.members().cpu()
        chosen, tables = [], torch.cat([cosine, marks], 1)
        buffer = torch.empty(tables.shape[1:], pin_memory=tables.is_cuda)
        for read, own, layout in zip(tables, left, state.layouts, strict=True):
            table = buffer.copy_(read).numpy()
            position = (layout.places if own is None else layout.places[own]).numpy()
            chosen.append(grow(table[:-1], position, np.flatnonzero(table[-1]), keep, self.threshold))
        kept = torch.from_numpy(np.sort(np.stack(chosen))).to(tokens.device, non_blocking=True)
        return absorb(cosine, kept)
