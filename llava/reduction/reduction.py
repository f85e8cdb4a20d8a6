"""A reduction as data: which output tokens exist, and what each is made of."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """Output tokens of one reduction for a batch of images with the same number of tokens.

    B images, N input tokens, K output tokens.

    Attributes:
        anchor: [B, K] int64, the input position each output token stands at. It gives order and
            position ids. Ascending and unique unless a method documents otherwise.
        owner: [B, N] int64, the output token each input token is averaged into, -1 if dropped.
            None means pruning: every output token is its anchor, unchanged.
        weight: [B, N] float32, share of each input token in its output token. None with owner.
        mix: [B, K, N] float32, shares of all input tokens in every output token, for the methods whose groups overlap;
            instead of owner and weight.
        inputs: N.
        encoder_space: apply to encoder features and project again, instead of to projected tokens.
        appended: so many outputs at the end stand behind the others, out of raster order.
    """

    anchor: Tensor
    inputs: int
    owner: Tensor | None = None
    weight: Tensor | None = None
    encoder_space: bool = False
    mix: Tensor | None = None
    appended: int = 0

    @property
    def merges(self) -> bool:
        return self.owner is not None or self.mix is not None

    def row(self, index: int) -> "Reduction":
        """The reduction of one image, on the CPU, still with a batch axis of 1."""
        one = self.only(index)
        move = lambda t: None if t is None else t.cpu()  # noqa: E731
        return replace(one, anchor=move(one.anchor), owner=move(one.owner), weight=move(one.weight), mix=move(one.mix))

    def only(self, index: int) -> "Reduction":
        """The same of one image, where it is."""
        cut = lambda t: None if t is None else t[index : index + 1]  # noqa: E731
        return replace(self, anchor=cut(self.anchor), owner=cut(self.owner), weight=cut(self.weight), mix=cut(self.mix))

    def apply(self, tokens: Tensor) -> Tensor:
        """[B, N, D] tokens -> [B, K, D], sums in float32, result in the dtype of `tokens`."""
        if self.mix is not None:
            return (self.mix @ tokens.float()).to(tokens.dtype)
        if self.owner is None:
            return gather_tokens(tokens, self.anchor)
        batch, _, channels = tokens.shape
        out = tokens.new_zeros(batch, self.anchor.shape[1] + 1, channels, dtype=torch.float32)
        # Dropped tokens go to an extra last row that is cut off: no data-dependent shape, no host sync.
        target = torch.where(self.owner < 0, self.anchor.shape[1], self.owner)
        shares = tokens.float() * self.weight.unsqueeze(-1)
        out.scatter_add_(1, target.unsqueeze(-1).expand_as(shares), shares)
        return out[:, :-1].to(tokens.dtype)

    def merged_count(self) -> Tensor:
        """[B] int64, output tokens made of two or more input tokens."""
        batch, outputs = self.anchor.shape
        if self.mix is not None:
            return ((self.mix != 0).sum(2) > 1).sum(1)
        if self.owner is None:
            return self.anchor.new_zeros(batch)
        members = self.anchor.new_zeros(batch, outputs + 1)
        target = torch.where(self.owner < 0, outputs, self.owner)
        members.scatter_add_(1, target, (self.weight != 0).long())
        return (members[:, :-1] > 1).sum(1)

    def apply_flops(self, channels: int) -> int:
        """Operations of `apply` on one image of `channels` wide tokens, matrix products only."""
        return 0 if self.mix is None else 2 * self.mix[0].numel() * channels

    def after(self, first: "Reduction") -> "Reduction":
        """The reduction that does `first` and then this one, for owner and weight reductions.

        Args:
            first: its outputs are the inputs of this one.
        """
        outputs, device = self.anchor.shape[1], self.anchor.device
        one, two = first.explicit(), self.explicit()
        # An extra last entry stands for "dropped", in front of and behind the second reduction.
        owner = torch.cat([two.owner, torch.full((len(two.owner), 1), -1, device=device)], 1)
        weight = torch.cat([two.weight, two.weight.new_zeros(len(two.weight), 1)], 1)
        slot = torch.where(one.owner < 0, self.inputs, one.owner)
        anchor = first.anchor.gather(1, self.anchor)
        assert anchor.shape[1] == outputs
        return Reduction(anchor, first.inputs, owner.gather(1, slot), one.weight * weight.gather(1, slot))

    def explicit(self) -> "Reduction":
        """The same with owner and weight spelled out, also when it only drops tokens."""
        if self.mix is not None:
            raise ValueError("a reduction with overlapping groups has no owner per token")
        if self.owner is not None:
            return self
        outputs = torch.arange(self.anchor.shape[1], device=self.anchor.device).expand_as(self.anchor)
        owner = torch.full((len(self.anchor), self.inputs), -1, device=self.anchor.device)
        owner = owner.scatter(1, self.anchor, outputs)
        return replace(self, owner=owner, weight=(owner >= 0).float())


@dataclass(frozen=True)
class Step:
    """One applied reduction: where it happened and what it did to one sample."""

    place: str  # "input", "tower", "encoder", "prompt" or "layer N"; " #2" behind it for a second image
    reduction: Reduction


Trace = tuple[Step, ...]


def gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """[B, N, D] tokens, [B, K] positions -> [B, K, D]."""
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def keep_top(score: Tensor, budget: int) -> Tensor:
    """Positions of the `budget` highest scores, in raster order; equal scores go to the lower index.

    Args:
        score: [B, N], higher means more important; compared in float32.
        budget: 1 <= budget <= N.

    Returns:
        [B, budget] int64, ascending.
    """
    # stable: the same tie goes to the same index on every device.
    order = score.float().argsort(dim=-1, descending=True, stable=True)
    return order[:, :budget].sort(dim=-1).values
