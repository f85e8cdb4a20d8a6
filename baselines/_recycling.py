"""Token recycling of SparseVLM and AutoPrune: the best of the dropped tokens are averaged into a few clusters.

Of equally dense tokens the one with the higher score counts as denser. (The releases add random noise of up to 1e-6 to
the density, and divide by the number of members plus 1e-6.) A single recycled token stays in its place.

Shapes: B images, N visual tokens, M recycled tokens, D channels.
"""

import torch
from torch import Tensor

from llava.reduction import Reduction, gather_tokens, keep_top, others


def recycled(dropped: int) -> tuple[int, int]:
    """How many of `dropped` tokens are recycled, and how many clusters they form."""
    tokens = int(dropped * 0.3) + 1
    return tokens, tokens // 10 + 1


def density_peaks(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster [B, M, D] tokens around density peaks: dense tokens that are far from every denser token.

    Returns:
        [B, count] indices of the centres, best first, and [B, M] the cluster of each token.
    """
    # Computed from differences, as products would lose small distances between long vectors to rounding.
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[-1] ** 0.5
    near = distance.topk(count, dim=-1, largest=False).values
    density = (-(near**2).mean(-1)).exp()
    mine, other = density[:, :, None], density[:, None, :]
    index = torch.arange(tokens.shape[1], device=tokens.device)
    # Two mutual nearest neighbours are equally dense; the lower index counts as denser, or both would be centres.
    denser = (other > mine) | ((other == mine) & (index < index[:, None]))
    apart = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(-1)
    centre = (apart * density).argsort(dim=1, descending=True, stable=True)[:, :count]
    home = gather_tokens(distance, centre).argmin(1)
    return centre, home.scatter(1, centre, torch.arange(count, device=tokens.device).expand_as(centre))


def keep_and_recycle(score: Tensor, tokens: Tensor, keep: int) -> Reduction:
    """Keep the best tokens, and average the best of the others into clusters, which come after the kept tokens.

    Args:
        score: [B, N].
        tokens: [B, N, D].
        keep: number of tokens kept as they are, below N.
    """
    total = score.shape[1]
    used, clusters = recycled(total - keep)
    if used == 1:  # a cluster of one token is that token
        return Reduction(keep_top(score, keep + 1), total)
    kept = keep_top(score, keep)
    rest = others(kept, total)
    order = score.gather(1, rest).argsort(dim=1, descending=True, stable=True)[:, :used]
    rest = rest.gather(1, order)
    centre, home = density_peaks(gather_tokens(tokens, rest).float(), clusters)
    size = torch.zeros_like(centre).scatter_add_(1, home, torch.ones_like(home))
    outputs = torch.cat([kept, rest.gather(1, centre)], 1)
    place = torch.arange(keep, device=kept.device).expand_as(kept)
    assignment = torch.full_like(score, -1, dtype=torch.long).scatter(1, kept, place).scatter(1, rest, home + keep)
    share = 1 / size.gather(1, home).float()
    weight = torch.zeros_like(score, dtype=torch.float32).scatter(1, kept, 1.0).scatter(1, rest, share)
    return Reduction(outputs, total, assignment, weight, appended=clusters)
