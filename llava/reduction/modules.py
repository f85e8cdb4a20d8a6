"""The parts of a model that methods read, as Protocols, and their floating point operations.

CLIP's and Qwen's vision blocks and the decoders of the Llama and Qwen families have these parts. A type checker needs
the Protocols, because the attribute of an `nn.Module` may be a tensor or a module.

Operations are computed from module shapes and the numbers of tokens that were processed. They count matrix products
only, with 2 operations per multiply-add, and attention over all key positions that the kernel receives (the causal half
is not left out). Tests compare them with torch.utils.flop_counter.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn


class Module(Protocol):
    """What every `nn.Module` can do: list the modules inside it."""

    def modules(self) -> Iterator[nn.Module]: ...


class VisionAttention(Module, Protocol):
    """Self-attention of a vision block."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    num_heads: int
    scale: float


class VisionBlock(Module, Protocol):
    """A block of the vision tower (CLIPEncoderLayer)."""

    layer_norm1: nn.Module
    self_attn: VisionAttention
    mlp: nn.Module


class DecoderAttention(Module, Protocol):
    """Self-attention of a decoder layer, with grouped-query heads or without.

    If the layer is split over ranks, the projections compute this rank's heads, but `in_features` and `out_features`
    are those of the whole layer. The module then has a function `gather(part, dim)`, which joins the heads of all ranks
    in their order, so that all ranks rank by the same numbers.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    head_dim: int
    scaling: float
    config: Any
    _modules: dict[str, Any]

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any: ...


class DecoderLayer(Module, Protocol):
    """A decoder layer (LlamaDecoderLayer)."""

    input_layernorm: nn.Module
    self_attn: DecoderAttention


class Decoder(Protocol):
    """A decoder (LlamaModel)."""

    layers: Sequence[DecoderLayer]
    norm: nn.Module
    rotary_emb: Any
    config: Any


def linear_flops(layer: nn.Linear, rows: int) -> int:
    return 2 * rows * layer.in_features * layer.out_features


def _linears(module: Module) -> list[nn.Linear]:
    """All modules with the sizes of a linear layer, including DeepSpeed's split layers with the whole layer's sizes."""
    return [cast(nn.Linear, part) for part in module.modules() if hasattr(part, "in_features")]


def tower_flops(tower: Any, patches: int, tokens: Sequence[tuple[int, int]]) -> int:
    """Operations of patch embedding and blocks for one image of `patches` patches.

    Args:
        tower: a CLIPVisionTransformer.
        tokens: for every block that is run, how many tokens enter its attention and its MLP.
    """
    total: int = 2 * patches * tower.embeddings.patch_embedding.weight.numel()
    for block, (attended, kept) in zip(tower.encoder.layers, tokens, strict=False):
        total += sum(linear_flops(linear, attended) for linear in _linears(block.self_attn))
        total += sum(linear_flops(linear, kept) for linear in _linears(block.mlp))
        total += 4 * attended * attended * block.self_attn.q_proj.out_features
        if hasattr(block, "temporal_attn") and hasattr(block, "frames"):
            total += sum(linear_flops(linear, attended) for linear in _linears(block.temporal_attn))
            total += 4 * attended * block.frames * block.temporal_attn.q_proj.out_features
    return total


def projector_flops(projector: nn.Module, tokens: int) -> int:
    return sum(linear_flops(linear, tokens) for linear in _linears(projector))


def layer_flops(layer: DecoderLayer, queries: int, keys: int) -> int:
    """Operations of one decoder layer for `queries` new tokens that attend to `keys` tokens."""
    linears = sum(linear_flops(linear, queries) for linear in _linears(layer))
    return linears + 4 * queries * keys * layer.self_attn.q_proj.out_features


def prefill_flops(
    layers: Sequence[DecoderLayer], lengths: Sequence[int], head: nn.Linear, keys: Sequence[int] | None = None
) -> int:
    """Operations of a prefill with `lengths[i]` tokens entering layer i, and of the head for the last token.

    Args:
        keys: number of tokens that a token attends to in each layer; None for all of them.
    """
    total = sum(layer_flops(*one) for one in zip(layers, lengths, keys or lengths, strict=True))
    return total + linear_flops(head, 1)
