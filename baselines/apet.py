"""ApET: keep a few basis tokens, and those that a linear combination of these reconstructs worst; merge the others.

Paper: https://arxiv.org/abs/2602.19870
Official code read: Maqkccx/ApET@70cc01b, llava/model/llava_arch.py (encode_images, token_merging),
    llava/model/modeling_llama_x.py (layer_prune) and llava/model/utils.py (fps)
Differs from it: sampling of the basis starts with the token farthest from the mean (the release: with a random one; two
    seeds share 26 of 96 kept tokens, 51 of 64 or 191 of 192). Basis tokens stand at their own places, so the others are
    all that is not kept (the release writes them over the kept tokens with the smallest errors, whose features are
    lost; `official` does that, from the fixed start, too). At most a third of the kept tokens are basis tokens (the
    release: 10 at any budget). Budgets other than its 192, 128 and 64 keep the proportion of its stages, 96 and 32.

Shapes: B images, N tokens, T of them kept, K basis tokens, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines._staged import two_stages
from llava.reduction import (
    DecoderState,
    EncoderState,
    MethodMetadata,
    ModelSpec,
    Reducer,
    Reduction,
    Release,
    State,
    gather_tokens,
    in_float32,
    merge_plan,
    option,
    others,
    planned,
    register,
    rows,
    scaled_layers,
    tokens_by_layer,
)

MatMul = Callable[[Tensor, Tensor], Tensor]
BASIS, SHARE = 10, 3  # basis tokens, and at most one of so many kept tokens
RIDGE = 1e-5
EXACT = "donot_use_mm_for_euclid_dist"  # products round more, and would have to be counted


def central_distance(tokens: Tensor) -> Tensor:
    """[B, N] squared distance of each token to the mean."""
    return (tokens - tokens.mean(1, keepdim=True)).square().sum(2)


def sample_basis(tokens: Tensor, start: Tensor, count: int) -> Tensor:
    """[B, K] indices: `start` [B], then repeatedly the token with the largest Euclidean distance to all chosen ones."""
    chosen, nearest = [start.unsqueeze(1)], torch.full_like(tokens[..., 0], torch.inf)
    for _ in range(count - 1):
        distance = torch.cdist(tokens, gather_tokens(tokens, chosen[-1]), compute_mode=EXACT).squeeze(2)
        # Never chosen again, not even if all tokens are identical.
        nearest = torch.minimum(nearest, distance).scatter(1, chosen[-1], -torch.inf)
        chosen.append(nearest.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


def reconstruction_error(tokens: Tensor, basis: Tensor, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, N] distance of each token to its least-squares reconstruction from the tokens [B, K] of the basis."""
    span = gather_tokens(tokens, basis)
    gram = matmul(span, span.mT)
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    # Unlike `solve`, this does not wait for the device to say whether it failed.
    weights, _ = torch.linalg.solve_ex(gram, matmul(span, tokens.mT))
    error: Tensor = torch.linalg.vector_norm(tokens - matmul(weights.mT, span), dim=2)
    return error


def written_over(
    tokens: Tensor, basis: Tensor, error: Tensor, keep: int, raster: bool, matmul: MatMul = torch.matmul
) -> tuple[Tensor, Tensor]:
    """What the release keeps: places [B, T], ascending, and the weights [B, T, N] of all tokens in what stands there.

    Of the T tokens with the largest errors, the K smallest are replaced by basis tokens in the order of sampling. Each
    token that is not kept is averaged into the most similar of the other T - K.

    Args:
        raster: the replaced places are taken in raster order, as after the tower, and not by descending error.
    """
    batch, total, count = *error.shape, basis.shape[1]
    order = error.argsort(dim=1, descending=True, stable=True)[:, :keep]
    top, last = order[:, : keep - count], order[:, keep - count :]
    last = last.sort(1).values if raster else last
    # Rows in the order of `top` and `last`, then in raster order.
    matrix = torch.zeros(batch, keep, total, device=tokens.device)
    matrix.scatter_(2, torch.cat([top, basis], 1).unsqueeze(2), 1.0)
    if keep > count:
        unit, rest = F.normalize(tokens, dim=2), others(order, total)
        nearest = matmul(gather_tokens(unit, rest), gather_tokens(unit, top).mT).argmax(2)
        matrix[rows(batch, rest.device), nearest, rest] = 1.0
    kept, row = torch.cat([top, last], 1).sort(1)
    return kept, gather_tokens(matrix / matrix.sum(2, keepdim=True), row)


@register("apet")
@dataclass(frozen=True, kw_only=True)
class ApET(Reducer):
    """Acts in two stages, on the tower's features and on hidden states before the decoder's middle layer."""

    summary: ClassVar[str] = "basis tokens and those that they reconstruct worst, merge the rest; again in mid-decoder"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower and before decoder layer 16 of 32",
        score="error of the reconstruction from 10 basis tokens, sampled far apart",
        rest="averaged into the most similar kept token that is not a basis token",
        reads=("features", "tokens"),
        similarity="features",
        weights="mean",
        paper="ApET, CVPR 2026",
        url="https://arxiv.org/abs/2602.19870",
        code="Maqkccx/ApET@70cc01b",
        release=Release(
            random="the first basis token",
            dtype="distances in half precision",
            order="basis tokens stand at places of other tokens",
            ours="a fixed first basis token; basis tokens at their own places",
            licence="Apache-2.0",
        ),
    )

    tile_budget: str = option(
        "each", "the first stage splits the budget evenly over tiles, the second takes all together", ("each",)
    )
    basis: int = option(BASIS, "basis tokens, at most a third of the kept tokens", least=1)
    official: bool = option(
        False, "as released: basis tokens at the places of the kept tokens with the smallest errors"
    )

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return scaled_layers((16,), 32, layers)

    def counts(self, spec: ModelSpec) -> tuple[int, int]:
        (stage,) = self.decoder_layers(spec.layers)
        return two_stages(self.budget, stage, spec)

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        first, second = self.counts(spec)
        return tokens_by_layer(first, self.decoder_layers(spec.layers), (second,), spec.layers)

    def encoder(self, state: EncoderState) -> Reduction | None:
        first, _ = self.counts(state.spec)
        return self._reduce(state, state.features, first, raster=True)

    def decoder(self, state: DecoderState) -> Reduction | None:
        tokens = planned(self, state.spec)
        assert tokens is not None  # it never depends on the image
        return self._reduce(state, state.tokens, tokens[state.layer], raster=False)

    def _reduce(self, state: State, tokens: Tensor, keep: int, raster: bool) -> Reduction | None:
        total = tokens.shape[1]
        if keep >= total:
            return None
        tokens = in_float32(tokens)
        count = max(1, min(self.basis, keep // SHARE))
        basis = sample_basis(tokens, central_distance(tokens).argmax(1), count)
        error = reconstruction_error(tokens, basis, state.matmul)
        if self.official:
            kept, matrix = written_over(tokens, basis, error, keep, raster, state.matmul)
            return Reduction(kept, total, merge_matrix=matrix)
        return merge_plan(basis.sort(1).values, others(basis, total), keep - count, error, tokens, "saliency", "mean")
