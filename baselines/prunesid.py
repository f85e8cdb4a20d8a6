"""PruneSID: one group of patches per principal component; of each, those that CLS sees and that are not alike.

Paper: https://arxiv.org/abs/2603.09480
Official code read: ZhengyaoFang/PruneSID@4ef17d9, prunesid/prunesid_llava/clip_encoder.py
Differs from it: components are exact. The release computes them by a random method (torch.pca_lowrank): on random
    features, two of its seeds share 48 to 52 of 64 kept tokens, 93 to 94 of 128 and 137 to 140 of 192. With tiles, kept
    tokens are in raster order. Where a group's share ends on exactly half a token, it is rounded to even (the release:
    by the rounding error of a sum). There are no more groups than channels (the release fails there). The paper's
    budget that depends on the image is in neither.

Kept tokens stand group by group, so they do not enter the decoder in raster order. A GPU would decompose one matrix
after another, each in hundreds of kernels. There, only the wanted components are computed, of all matrices at once, by
subspace iteration with Chebyshev polynomials (Zhou et al., 2006, doi.org/10.1016/j.jcp.2006.03.017) in float64, until
they are as exact as those of a decomposition in float32; the host waits a few times to learn that.

Shapes: B images, N patches, D channels, G groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    HOST,
    EncoderState,
    MethodMetadata,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    cached_by_sizes,
    gather_tokens,
    in_float32,
    option,
    places,
    register,
)

MatMul = Callable[[Tensor, Tensor], Tensor]
PER_GROUP = 4  # tokens of the budget for each group
LENIENT = 32  # tokens are alike if their cosine is above budget / 32 times the mean of the image
MOST, STEP = 5, 64  # a group may keep 5 tokens for each started 64 of the budget

# Of the subspace iteration: the length of A v - λ v as a fraction of the largest eigenvalue, rounds until then at most,
# filters in each, and the highest degree and growth of a polynomial; float64 has 16 digits.
RESIDUAL, ROUNDS, FILTERS, DEGREE, GROWTH = 1e-7, 12, 3, 12, 1e10


@cached_by_sizes
def start(total: int, count: int, device: torch.device) -> Tensor:
    """[N, G] random directions, always the same."""
    drawn = torch.randn(total, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.to(device, non_blocking=True)


def orthonormal(columns: Tensor) -> Tensor:
    """[B, N, G] columns of the same span, by Cholesky's factor of their products; columns may be almost dependent."""
    columns = F.normalize(columns, dim=1)
    for _ in range(2):  # the second time makes up for what is lost in products of almost dependent columns
        products = columns.mT @ columns
        products.diagonal(dim1=1, dim2=2).add_(1e-14 * columns.shape[2])
        # Unlike `cholesky`, this does not wait for the device to say whether it failed.
        factor, _ = torch.linalg.cholesky_ex(products)
        columns = torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT
    return columns


def largest(matrix: Tensor, count: int) -> Tensor:
    """[B, N, G] eigenvectors of the largest eigenvalues, which rise, of symmetric matrices [B, N, N]; none is negative.

    Each round makes orthogonal approximations in a space of 2 G dimensions. A polynomial that is small from 0 to the
    least of their eigenvalues then takes what is below out of them.
    """
    matrix = (matrix + matrix.mT).double() / 2  # a product is symmetric up to rounding alone
    space = start(matrix.shape[1], 2 * count, matrix.device).expand(len(matrix), -1, -1)
    for _ in range(2):
        space = orthonormal(matrix @ space)
    for _ in range(ROUNDS):
        product = matrix @ space
        values, turn = torch.linalg.eigh(space.mT @ product)
        space, product = space @ turn, product @ turn
        most = values[:, -1:].clamp(min=1e-30)
        residual = torch.linalg.vector_norm(product - space * values.unsqueeze(1), dim=1)[:, -count:] / most
        bound = torch.maximum(values[:, :1], RESIDUAL * most)
        # A polynomial of degree n is cosh(n acosh x), so that the largest eigenvalue grows by no more than GROWTH.
        degree = (math.acosh(GROWTH) / (2 * most / bound - 1).clamp(min=1).acosh()).clamp(1, DEGREE).floor()
        error, highest = torch.stack([residual.max(), degree.max()]).tolist()
        if error < RESIDUAL:
            break
        mapped = matrix * (2 / bound).unsqueeze(2)
        mapped.diagonal(dim1=1, dim2=2).sub_(1)  # the eigenvalues from 0 to the bound are between -1 and 1
        for _ in range(FILTERS):
            before, filtered = space, mapped @ space
            for step in range(1, int(highest)):
                after = torch.baddbmm(before, mapped, filtered, beta=-1, alpha=2)
                before, filtered = filtered, torch.where(degree.unsqueeze(2) > step, after, filtered)
            space = orthonormal(filtered)
    return space[..., -count:]


def eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """`largest`, by a whole decomposition on the host and where the iteration would take most of the space."""
    if matrix.is_cuda and 4 * count <= matrix.shape[1]:
        return largest(matrix, count).to(matrix.dtype)
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors[..., -count:]
    return vectors


def components(patches: Tensor, count: int, matmul: MatMul = torch.matmul) -> tuple[Tensor, Tensor]:
    """[B, N] each: the principal component with the largest entry at a patch, as its group, and the entry's size."""
    centred = patches.sigmoid().nan_to_num()  # a decomposition of NaN ends in a traceback
    centred = centred - centred.mean(2, keepdim=True)
    # Singular vectors by the smaller of both products; eigenvalues rise.
    if patches.shape[2] < patches.shape[1]:
        directions = eigenvectors(matmul(centred.mT, centred), count)
        vectors = F.normalize(matmul(centred, directions), dim=1)
    else:
        vectors = eigenvectors(matmul(centred, centred.mT), count)
    size, group = vectors.flip(-1).abs().max(-1)
    return group, size


def unlike(alike: Tensor, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, N] bool: True for a token that is like no earlier one that is True.

    A token depends on earlier ones alone, so i rounds are enough for token i. A CPU stops at the first round that
    changes nothing. On a device the host waits to look for such a round, after 8, 16, 32, ... rounds.

    Args:
        alike: [B, N, N], 1 where the row's token comes before the column's and is like it, else 0.
    """
    kept = alike.new_ones(len(alike), 1, alike.shape[1])
    looks = {2**power for power in range(3, alike.shape[1].bit_length())}
    for number in range(1, alike.shape[1]):
        before, kept = kept, matmul(kept, alike).eq_(0)
        if (kept.device.type == HOST or number in looks) and torch.equal(kept, before):
            break
    return kept[:, 0] > 0


def shares(size: Tensor, distinct: Tensor, budget: int, count: int, total: int) -> Tensor:
    """[B, G] tokens to keep of each group; they sum to `count` if that is enough for one of each.

    Args:
        size, distinct: [B, G] int64, members of each group, and how many of them are not alike.
        budget: tokens with CLS.
        total: N, which is at least the budget.
    """
    least = size.clamp(max=1)
    most = distinct.clamp(max=MOST * math.ceil(budget / STEP))
    # All limits grow by one until they add up to the budget.
    growth = places(1, total, size.device)[:, :, None]
    short = torch.minimum(most.unsqueeze(1) + growth, size.unsqueeze(1)).sum(2) < budget
    most = torch.minimum(most + short.sum(1, keepdim=True), size)
    # One token of each group, and the others in proportion to the distinct ones.
    rest = (count - least.sum(1, keepdim=True)).clamp(min=0)
    ends = (distinct.cumsum(1) * rest / distinct.sum(1, keepdim=True)).round().long()
    take = torch.minimum(ends.diff(dim=1, prepend=torch.zeros_like(rest)) + least, most)
    # What the limits cut off goes to the groups with the most distinct ones, as far as their limits allow.
    order = distinct.argsort(dim=1, descending=True, stable=True)
    room = (most - take).gather(1, order)
    missing = rest + (least - take).sum(1, keepdim=True)
    return take.scatter_add(1, order, torch.minimum((missing - room.cumsum(1) + room).clamp(min=0), room))


def choose(
    patches: Tensor, score: Tensor, group: Tensor, groups: int, budget: int, count: int, matmul: MatMul = torch.matmul
) -> Tensor:
    """[B, count] indices of kept patches: by group, distinct ones before others, and then by score.

    Args:
        score: [B, N], higher is kept.
        group: [B, N], below `groups`.
        budget: tokens with CLS.
    """
    batch, total = score.shape
    order = score.argsort(dim=1, descending=True, stable=True)
    home = group.gather(1, order)
    unit = F.normalize(gather_tokens(patches, order), dim=-1)
    cosine = matmul(unit, unit.mT)
    pairs = cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)
    threshold = pairs / max(1, total * (total - 1)) * (budget / LENIENT)
    alike = (cosine > threshold[:, None, None]) & (home.unsqueeze(2) == home.unsqueeze(1))
    kept = unlike(alike.to(cosine.dtype).triu(1), matmul)

    members = home.unsqueeze(1) == places(1, groups, home.device)[:, :, None]  # [B, G, N]
    size, distinct = members.sum(2), (members & kept.unsqueeze(1)).sum(2)
    take = shares(size, distinct, budget, count, total)
    listed = (2 * home + ~kept).argsort(dim=1, stable=True)
    home = home.gather(1, listed)
    rank = places(batch, total, home.device) - (size.cumsum(1) - size).gather(1, home)
    first = (rank >= take.gather(1, home)).byte().argsort(dim=1, stable=True)[:, :count]
    return order.gather(1, listed.gather(1, first))


@register("prunesid")
@dataclass(frozen=True, kw_only=True)
class PruneSID(Reducer):
    """Keeps the CLS token as one of the budget's tokens, where the tower has one."""

    summary: ClassVar[str] = "groups by principal components; in each, high CLS attention and no near-duplicates first"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention, block −2, in groups by principal components; tokens like a better one of the group last",
        order="CLS, then group by group",
        needs="CLS token",
        reads=("cls_attention -2", "features"),
        similarity="features",
        paper="PruneSID, ICLR 2026",
        url="https://arxiv.org/abs/2603.09480",
        code="ZhengyaoFang/PruneSID@4ef17d9",
        release=Release(
            random="the components, so also the groups",
            order="group by group",
            ours="exact components",
            licence="none; its README says Apache-2.0",
        ),
    )
    keep_cls: ClassVar[bool] = True
    known_deviations: ClassVar[dict[str, str]] = {"unsorted": "kept tokens stand group by group, as in the release"}

    # Every tile keeps its own class token, so the tokens of all tiles cannot be ranked together.
    tile_budget: str = option(
        "each", "the budget over tiles: even, or by the base image's attention", ("each", "thumbnail")
    )
    rank: str = option(
        "attention",
        "order within a group: CLS attention (release) or size in its component (paper)",
        ("attention", "size"),
    )

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def encoder(self, state: EncoderState) -> Reduction:
        attention = state.scores[TowerScore("cls_attention")]
        total, tokens = attention.shape[1], state.features.shape[1]
        cls = tokens - total
        if self.budget >= total:  # all patches without CLS, as LLaVA has them without reduction
            return Reduction(places(len(attention), total, attention.device) + cls, tokens)
        patches = in_float32(state.features[:, cls:])
        groups = max(1, min(self.budget // PER_GROUP, patches.shape[2]))
        group, size = components(patches, groups, state.matmul)
        score = attention if self.rank == "attention" else size
        kept = choose(patches, score, group, groups, self.budget, self.budget - cls, state.matmul)
        plan = Reduction(kept, total)
        return plan.with_cls() if cls else plan
