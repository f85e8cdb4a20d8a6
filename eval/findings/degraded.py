"""ConsensusDrop with a probe that is made worse in steps: noise, a preference for late tokens, or no question at all.

The method package is used as it is; only the cross-modal saliency that it ranks by is replaced.
"""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from consensusdrop.method import ConsensusDrop
from llava.errors import unknown
from llava.reduction import PromptState

KINDS = ("white", "smooth", "late")
CELLS = 6  # of the smooth field along each side; four patches each, the size of an object


@dataclass(frozen=True, kw_only=True)
class Degraded(ConsensusDrop):
    """Not registered: it is ConsensusDrop with a handicap.

    The logarithm of the cross-modal saliency is scaled to mean 0 and deviation 1 over the tokens of an image, then
    `noise` times a field of the same scale is added. The same field serves a question at every level and in every
    setting: it is drawn from the question's id.

    Attributes:
        kind: the field. "white": a normal number for each token. "smooth": 6 x 6 normal numbers, interpolated, so that
            the probe prefers wrong regions, not scattered tokens. "late": the token's place in the sequence.
        noise: deviations of the field; infinite noise ranks by the field alone.
        seen: question id -> [576] the saliency that was ranked.
    """

    kind: str = "white"
    noise: float = 0.0
    seen: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def _cross_saliency(self, state: PromptState) -> Tensor:
        cross = super()._cross_saliency(state)
        if self.noise:
            cross = torch.stack([self._worse(row, name, state) for row, name in zip(cross, state.ids, strict=True)])
        self.seen.update(zip(state.ids, cross, strict=True))
        return cross

    def _worse(self, saliency: Tensor, name: str, state: PromptState) -> Tensor:
        """[N] at least 0, as every rule of fusion expects."""
        noise = field_of(self.kind, name, state.layout.rows, state.layout.columns).to(saliency.device)
        if self.noise == float("inf"):
            return noise.exp()
        return (standard(saliency.log()) + self.noise * noise).exp()


def field_of(kind: str, name: str, rows: int, columns: int) -> Tensor:
    """[rows * columns] mean 0, deviation 1: the field of a kind for the question of a name."""
    if kind == "late":
        return standard(torch.arange(rows * columns, dtype=torch.float32))
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    generator = torch.Generator().manual_seed(seed)
    if kind == "white":
        return standard(torch.randn(rows * columns, generator=generator))
    if kind == "smooth":
        coarse = torch.randn(1, 1, CELLS, CELLS, generator=generator)
        fine = functional.interpolate(coarse, (rows, columns), mode="bilinear", align_corners=True)
        return standard(fine.flatten())
    raise unknown("noise", kind, KINDS)


def standard(values: Tensor) -> Tensor:
    """[N] scaled to mean 0 and standard deviation 1."""
    return (values - values.mean()) / values.std()
