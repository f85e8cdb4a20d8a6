"""Choose tokens by the highest scores, or greedily one token after the other. On a tie the lower index is chosen.

* `keep_top`, `split` and `ranks`: by score.
* `farthest_from` and `farthest_apart`: the token whose nearest chosen token is farthest away, by cosine distance; for
  ConsensusDrop's merge targets and DivPrune.
* `largest_determinant` and `largest_determinant_of`: the token that increases the determinant of the chosen tokens'
  kernel most; for CDPruner and OTPrune.
* `cover_greedily`: the token with the largest gain in coverage times its weight; for SCOPE.
* `cover_most`: the token with the largest gain in coverage that a table gives; for MMTok.
* `distinct`: near-duplicates are removed in rounds; for VisPruner.

Index tensors that depend on sizes alone are made once and kept on the device (`cached_by_sizes`), because the host
limits a short prefill: it issues one operation after the other.

The greedy loops never wait for the device. If the cosines of all pairs of tokens would need too much memory, the loops
compute a few rows of them at a time. On a CPU the loop for coverage looks at values, and computes only the gains that
matter.

Shapes: B images, N tokens, D channels, K chosen tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, wraps
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

MatMul = Callable[[Tensor, Tensor], Tensor]

Made = TypeVar("Made")
KEPT = 64  # results that `cached_by_sizes` remembers of each function
HOST = "cpu"  # the device whose values can be read without waiting


def cached_by_sizes(function: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator: remember what a function of whole numbers and a device returns.

    The tensors are shared: a caller must not write into them. They are ordinary tensors, even if they are first
    asked for in inference mode.
    """

    @lru_cache(maxsize=KEPT)
    @wraps(function)
    def remembered(*arguments: object) -> Made:
        with torch.inference_mode(False):
            return function(*arguments)

    return remembered


@cached_by_sizes
def places(batch: int, count: int, device: torch.device) -> Tensor:
    """[B, N] int64: 0, 1, 2, ..., N - 1 in every row. Shared: do not write into it."""
    return torch.arange(count, device=device).repeat(batch, 1)


@cached_by_sizes
def rows(batch: int, device: torch.device) -> Tensor:
    """[B, 1] int64: 0, 1, 2, ... Shared: do not write into it."""
    return torch.arange(batch, device=device)[:, None]


def in_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32. One that is float32 is returned as it is, because a cast would cost a dispatch."""
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """[B, N, ...] tokens, [B, K] indices -> [B, K, ...]."""
    # An index moves whole rows; `gather` would read one index per number.
    return tokens[rows(len(keep), keep.device), keep]


def ranks(score: Tensor) -> Tensor:
    """[..., N] int64: 0 for the highest score, N - 1 for the lowest."""
    order = score.argsort(dim=-1, descending=True, stable=True)  # stable: on a tie the lower index comes first
    numbers = places(1, order.shape[-1], order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, numbers)


def keep_top(score: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` highest scores, in raster order.

    Args:
        score: [B, N], higher means more important.
        budget: 1 <= budget <= N.

    Returns:
        [B, budget] int64, ascending.
    """
    return score.argsort(dim=-1, descending=True, stable=True)[:, :budget].sort(dim=-1).values


def split(score: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """`keep_top`, and all other indices [B, N - budget], ascending."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order[:, :budget].sort(dim=-1).values, order[:, budget:].sort(dim=-1).values


def others(kept: Tensor, total: int) -> Tensor:
    """[B, K] indices -> [B, N - K] the other indices, ascending."""
    taken = torch.zeros(kept.shape[0], total, dtype=torch.uint8, device=kept.device)
    taken.scatter_(1, kept, 1)
    return taken.argsort(dim=1, stable=True)[:, : total - kept.shape[1]]


# Greedy choices.

# The largest matrix that is held whole, in numbers: 64 MB in float32, all cosines of 4,096 tokens.
WHOLE = 2**24
# The same for all images of a batch together, 256 MB: eight of LLaVA-NeXT, whose float32 tokens are larger than that.
ALL_WHOLE = 2**26
# The least number of rows in a product: products of eight rows and more have the same bits as that of all rows.
TOGETHER = 16
GROUP = 32  # gains that are computed at a time on a CPU

# A token whose residual is below this fraction of its kernel entry is spanned by the chosen ones, to float32 accuracy.
SPANNED = 1e-6

ROUND = 8  # near-duplicates removed at a time


class Cosines:
    """Cosines between the tokens of images: held whole if they fit, otherwise computed when they are asked for.

    Args:
        unit: [B, N, D] tokens of length 1. There may be several images only if the cosines of all of them fit.
        matmul: the matrix product; that of a state counts its operations.
    """

    def __init__(self, unit: Tensor, matmul: MatMul):
        total = unit.shape[1]
        self.unit, self.matmul, self.shape, self.width = unit, matmul, unit.shape[:2], total
        self.table = matmul(unit, unit.mT) if total * total <= WHOLE else None
        self.images = torch.arange(len(unit), device=unit.device)
        # Number of blocks of rows, each of which fits.
        self._parts = max(1, min(total * total // WHOLE + 1, total // TOGETHER))

    def row(self, token: Tensor) -> Tensor:
        """[B, N] cosines of one token [B] of each image to all tokens."""
        if self.table is not None:
            return self.table[self.images, token]
        several = self.unit[self.images, token].unsqueeze(1).expand(-1, TOGETHER, -1)
        return self.matmul(several, self.unit.mT)[:, 0]

    def rows(self, tokens: Tensor) -> Tensor:
        """[m, N] cosines of tokens [m] of the only image to all tokens."""
        if self.table is None:
            return self.matmul(self.unit[0, tokens], self.unit[0].T)
        return self.table[0].index_select(0, tokens)

    def blocks(self) -> Iterator[Tensor]:
        """[B, m, N] cosines of consecutive tokens to all; the table itself where there is one."""
        if self.table is not None:
            yield self.table
            return
        for block in self.unit.tensor_split(self._parts, 1):
            yield self.matmul(block, self.unit.mT)

    def highest(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[B, r] highest cosine of each of the tokens [B, r] to the tokens [B, c]."""
        if self.table is not None:
            return self.table[self.images[:, None, None], rows.unsqueeze(2), columns.unsqueeze(1)].amax(2)
        others = gather_tokens(self.unit, columns).mT
        blocks = (gather_tokens(self.unit, block) for block in rows.tensor_split(self._parts, 1))
        return torch.cat([self.matmul(block, others).amax(2) for block in blocks], 1)


class Table:
    """What tokens cover of R things: rows that are given whole and read like those of `Cosines`.

    Args:
        table: [B, N, R].
    """

    def __init__(self, table: Tensor):
        self.table, self.shape, self.width = table, table.shape[:2], table.shape[2]
        self.images = torch.arange(len(table), device=table.device)

    def row(self, token: Tensor) -> Tensor:
        return self.table[self.images, token]

    def rows(self, tokens: Tensor) -> Tensor:
        return self.table[0].index_select(0, tokens)

    def blocks(self) -> Iterator[Tensor]:
        yield self.table


def _in_groups(choose: Callable[[Cosines, Tensor], Tensor], tokens: Tensor, weight: Tensor, matmul: MatMul) -> Tensor:
    """[B, K] choices, made for as many images at a time as their cosines fit."""
    unit = F.normalize(tokens.float(), dim=-1)
    pairs = unit.shape[1] ** 2
    size = max(1, ALL_WHOLE // pairs) if pairs <= WHOLE else 1
    parts = zip(unit.split(size), weight.split(size), strict=True)
    chosen = [choose(Cosines(part, matmul), share) for part, share in parts]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


# Farthest points.


def farthest_from(
    unit: Tensor, first: Tensor, count: int, distance: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """[B, count] int64 in the order of choice; on a tie the lower index.

    Each step compares all tokens with the one chosen last, in 2 B N D (count - 1) operations without N x N cosines. The
    caller counts them.

    Args:
        unit: [B, N, D] float32 tokens of length 1.
        first: [B], the first choice.
        distance: returns the distances [B, N] of tokens [B] to all, if they are known; a token's own is -inf.
    """
    images, columns = rows(len(unit), unit.device)[:, 0], unit.mT

    def computed(token: Tensor) -> Tensor:
        # One row times a matrix: torch's product of a matrix and one column takes ten times as long on a CPU.
        return _apart(torch.bmm(unit[images, token].unsqueeze(1), columns).squeeze(1), token)

    distance, chosen, nearest = distance or computed, [first], None
    for _ in range(count - 1):
        last = distance(chosen[-1])
        nearest = last if nearest is None else torch.minimum(nearest, last, out=nearest)
        chosen.append(nearest.argmax(1))
    return torch.stack(chosen, 1)


def _apart(row: Tensor, token: Tensor) -> Tensor:
    """[B, N] distances from cosines; -inf to the token itself, which is never chosen again, not even of equal ones."""
    return (1 - row).scatter_(1, token.unsqueeze(1), -torch.inf)


def farthest_apart(tokens: Tensor, count: int, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, count] int64 in the order of choice.

    First the token whose nearest other token is farthest away, then repeatedly the one farthest from all chosen.

    Args:
        tokens: [B, N, D], of any length and type.
        matmul: `matmul` of the state, which counts the operations.
    """

    def choose(cosines: Cosines, _: Tensor) -> Tensor:
        closest, done = [], 0
        for block in cosines.blocks():
            # A token is not its own neighbour. A table of cosines then has no diagonal any more.
            block.diagonal(offset=done, dim1=1, dim2=2).fill_(-torch.inf)
            closest.append(block.amax(2))
            done += block.shape[1]
        most_isolated = (1 - torch.cat(closest, 1)).argmax(1)
        if (table := cosines.table) is None:
            return farthest_from(cosines.unit, most_isolated, count, lambda token: _apart(cosines.row(token), token))
        table.neg_().add_(1).diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        return farthest_from(cosines.unit, most_isolated, count, cosines.row)  # whose table has distances now

    return _in_groups(choose, tokens, tokens, matmul)


# Largest determinant.


def largest_determinant(tokens: Tensor, weight: Tensor, count: int, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, count] int64 in the order of choice, without repetition, also beyond the rank of the kernel.

    The kernel of two tokens is their cosine times both weights. A token multiplies the determinant by its part that the
    chosen ones do not span. An incremental Cholesky factor gives that part (Chen et al., 2018, greedy MAP inference of
    determinantal point processes, https://arxiv.org/abs/1709.05135). Equal tokens are chosen by index, and tokens that
    the chosen ones span by weight.

    Args:
        tokens: [B, N, D], of any length and type.
        weight: [B, N] float32, above 0.
        matmul: `matmul` of the state, which counts the operations.
    """

    def choose(cosines: Cosines, part: Tensor) -> Tensor:
        if (table := cosines.table) is not None:
            return largest_determinant_of(table.mul_(part.unsqueeze(2)).mul_(part.unsqueeze(1)), count, matmul)
        own = part * cosines.unit.square().sum(-1) * part  # the cosine with itself is 1 up to the last bits
        return _grow(
            own, lambda pick: (part.gather(1, pick) * cosines.row(pick[:, 0]) * part).unsqueeze(1), count, matmul
        )

    return _in_groups(choose, tokens, weight, matmul)


def largest_determinant_of(kernel: Tensor, count: int, matmul: MatMul = torch.matmul) -> Tensor:
    """`largest_determinant` for a given kernel [B, N, N], whose diagonal is above 0."""
    own = kernel.diagonal(dim1=1, dim2=2)
    return _grow(own, lambda pick: gather_tokens(kernel, pick), count, matmul)


def _grow(own: Tensor, row: Callable[[Tensor], Tensor], count: int, matmul: MatMul) -> Tensor:
    """[B, count] the greedy choices of `largest_determinant`.

    Args:
        own: [B, N] diagonal of the kernel.
        row: returns the kernel's rows [B, 1, N] of tokens [B, 1].
    """
    own = own.unsqueeze(1)
    least = SPANNED * own
    # Of each token, the factor by which it would multiply the determinant; below that, the order of the spanned tokens.
    both = torch.stack([own, own - own.amax(2, keepdim=True) - 1])  # [2, B, 1, N]
    left, last = both
    factor = own.new_zeros(len(own), count, own.shape[2])  # a row for each chosen token
    chosen = []
    # The host limits this loop on a GPU: tensors are written in place.
    for step in range(count):
        best, pick = torch.where(left > least, left, last).max(2, keepdim=True)  # [B, 1, 1]
        past = factor[:, :step]
        shared = matmul(past.gather(2, pick.expand(-1, step, 1)).mT, past)
        pivot = F.threshold(best, 0, torch.inf).sqrt()  # a spanned token changes nothing
        new = torch.div(row(pick[:, 0]) - shared, pivot, out=factor[:, step : step + 1])
        left.addcmul_(new, new, value=-1)
        both.scatter_(3, pick.expand(2, -1, -1, -1), -torch.inf)
        chosen.append(pick)
    return torch.cat(chosen, 1)[:, :, 0]


# Coverage.


def cover_greedily(tokens: Tensor, weight: Tensor, count: int, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, count] int64 in the order of choice; of equal gains the lower index.

    The coverage of a token is its highest cosine to a chosen one, at least 0; a gain is summed over all tokens.

    Args:
        tokens: [B, N, D], of any length and type.
        weight: [B, N] float32, at least 0.
        matmul: `matmul` of the state, which counts the operations.
    """

    if tokens.device.type == HOST:
        images = zip(F.normalize(tokens.float(), dim=-1).split(1), weight, strict=True)
        return torch.stack([_cover_lazily(Cosines(unit, matmul), own, count) for unit, own in images])

    return _in_groups(lambda cosines, part: _cover(cosines, part, count), tokens, weight, matmul)


def cover_most(tables: Sequence[Tensor], count: int, late: Sequence[Tensor | None]) -> Tensor:
    """[B, count] int64 in the order of choice; of equal gains the lower index.

    Each thing is covered as far as the chosen token that covers it most; a gain is summed over all things.

    Args:
        tables: for each image [N, R], at least 0: how far each token covers each thing. R may differ between images.
        late: for each image [N] bool on the host, True for the tokens that are chosen only after all others; None if
            there are none.
    """
    if tables[0].device.type == HOST:
        pairs = zip(tables, late, strict=True)
        return torch.stack([_cover_lazily(Table(one[None]), one.new_ones(len(one)), count, own) for one, own in pairs])
    widest = max(one.shape[1] for one in tables)
    table = Table(torch.stack([F.pad(one, (0, widest - one.shape[1])) for one in tables]))
    return _cover(table, None, count, late)


def _cover(table: Cosines | Table, weight: Tensor | None, count: int, late: Sequence[Tensor | None] = ()) -> Tensor:
    """[B, count] the choices of `cover_greedily` and `cover_most`.

    Args:
        weight: [B, N]; None if it is 1 everywhere.
        late: see `cover_most`; () if no image has such tokens.
    """
    free = torch.zeros(table.shape, device=table.images.device)  # -inf for the tokens that cannot be chosen now
    covered = free.new_zeros(len(free), table.width)
    waiting: dict[int, list[tuple[int, Tensor]]] = {}  # number of the others -> image, and its tokens that come late
    for image, own in enumerate(late):
        if own is not None:
            tokens = own.to(free.device, non_blocking=True)
            waiting.setdefault(len(own) - int(own.sum()), []).append((image, tokens))
            free[image].masked_fill_(tokens, -torch.inf)
    chosen: list[Tensor] = []
    for step in range(count):
        for image, tokens in waiting.get(step, ()):
            free[image].masked_fill_(tokens, 0)
        gains = [(block - covered.unsqueeze(1)).clamp_(min=0).sum(-1) for block in table.blocks()]
        gain = gains[0] if len(gains) == 1 else torch.cat(gains, 1)
        chosen.append((free + gain if weight is None else torch.addcmul(free, gain, weight)).argmax(1))
        torch.maximum(covered, table.row(chosen[-1]), out=covered)
        free.scatter_(1, chosen[-1].unsqueeze(1), -torch.inf)
    return torch.stack(chosen, 1)


def _cover_lazily(table: Cosines | Table, weight: Tensor, count: int, late: Tensor | None = None) -> Tensor:
    """[count] the same choices for one image from few of the gains (Minoux, 1978, accelerated greedy algorithms).

    A gain never grows while tokens are chosen, not even by rounding, because sums are taken in the same order. An
    earlier gain is therefore an upper bound. The gains with the highest bounds are computed again until the best of
    them is above all bounds.

    Args:
        weight: [N].
        late: [N] bool, see `cover_most`.
    """
    free, covered = torch.zeros_like(weight), weight.new_zeros(table.width)  # free: as in `_cover`
    bound = torch.cat([block[0].clamp(min=0).sum(-1) for block in table.blocks()]) * weight
    current, chosen, others = torch.ones_like(weight, dtype=torch.bool), [], -1
    if late is not None:
        first, others = bound.clone(), len(late) - int(late.sum())
        free[late] = bound[late] = -torch.inf
    for step in range(count):
        if step == others and late is not None:
            free[late], bound[late], current[late] = 0, first[late], step == 0
        while not current[best := int(bound.argmax())]:
            tokens = bound.masked_fill(current, -torch.inf).topk(min(GROUP, len(bound))).indices
            bound[tokens] = (table.rows(tokens) - covered).clamp_(min=0).sum(-1) * weight[tokens] + free[tokens]
            current[tokens] = True
        chosen.append(best)
        covered = torch.maximum(covered, table.row(torch.tensor([best]))[0])
        free[best] = bound[best] = -torch.inf
        current = bound == -torch.inf
    return torch.tensor(chosen)


# Near-duplicates.


def distinct(tokens: Tensor, count: int, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, count] int64 indices of the entries that stay, in the order of the last list.

    A round compares the entries at even indices of the list with those at odd indices, and removes up to ROUND even
    ones with the closest match. The remaining even ones, closest match first, and then the odd ones are the list of the
    next round. Its order decides which entries are compared, so it must stay as it is. All rounds together read about
    N^3 / 100 cosines.

    Args:
        tokens: [B, N, D] in the order of the first list, of any length and type.
        count: 1 <= count <= N.
        matmul: `matmul` of the state, which counts the operations.
    """

    def choose(cosines: Cosines, _: Tensor) -> Tensor:
        batch, total = cosines.unit.shape[:2]
        places = torch.arange(total, device=cosines.unit.device).expand(batch, -1)
        while places.shape[1] > count:  # lengths are host integers: no round waits for the device
            even, odd = places[:, ::2], places[:, 1::2]
            gone = min(ROUND, places.shape[1] - count)  # or all even ones, if they are fewer
            order = cosines.highest(even, odd).argsort(dim=1, descending=True, stable=True)
            places = torch.cat([even.gather(1, order[:, gone:]), odd], 1)
        return places[:, :count]

    return _in_groups(choose, tokens, tokens, matmul)
