"""The parts of a model that tower scores, decoder attention and the count of operations read, as Protocols.

CLIP's and Qwen's vision blocks and the decoders of the Llama and Qwen families have them; a type checker needs them,
because the attribute of an `nn.Module` may be a tensor or a module. And the rotary angles that a decoder computes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llava.cached_tensors import made_once
from llava.reduction.ranking import in_float32


class Module(Protocol):
    """What every `nn.Module` can do: list the modules inside it."""

    def modules(self) -> Iterator[nn.Module]: ...


class VisionAttention(Module, Protocol):
    """Self-attention of a vision block."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    num_heads: int
    scale: float


class VisionBlock(Module, Protocol):
    """A block of the vision tower (CLIPEncoderLayer)."""

    layer_norm1: nn.Module
    self_attn: VisionAttention
    mlp: nn.Module


class VisionEmbeddings(Protocol):
    """Patch embedding of the vision tower."""

    patch_embedding: nn.Conv2d


class VisionEncoder(Protocol):
    """Blocks of the vision tower."""

    layers: Sequence[VisionBlock]


class VisionTower(Protocol):
    """A vision tower (CLIPVisionTransformer)."""

    embeddings: VisionEmbeddings
    encoder: VisionEncoder


class DecoderAttention(Module, Protocol):
    """Self-attention of a decoder layer, with grouped-query heads or without.

    Where the layer is split over ranks, the projections compute this rank's heads, but `in_features` and `out_features`
    are those of the whole layer, and the module has a function `gather(part, dim)`; see
    `llava.reduction.decoder_attention.whole_heads`.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    head_dim: int
    scaling: float


class DecoderLayer(Module, Protocol):
    """A decoder layer (LlamaDecoderLayer)."""

    input_layernorm: nn.Module
    self_attn: DecoderAttention


class Decoder(Protocol):
    """A decoder (LlamaModel)."""

    layers: Sequence[DecoderLayer]
    norm: nn.Module

    def rotary_emb(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]: ...


class Angles(NamedTuple):
    """Rotary angles of tokens, ready for all heads.

    Attributes:
        cos: [B, 1, T, d] float32.
        sin: the same of the sine, negative in the first half of the channels.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> "Angles":
        """From a decoder's cosines and sines, [B, T, d] each."""
        cos, sin = in_float32(cos), in_float32(sin)
        return cls(cos.unsqueeze(1), (sin * _signs(sin.shape[-1], sin.device)).unsqueeze(1))

    def rows(self, part: slice) -> "Angles":
        """Of some of the tokens."""
        return Angles(self.cos[:, :, part], self.sin[:, :, part])


@made_once
def _signs(channels: int, device: torch.device) -> Tensor:
    """[d] float32: -1 in the first half, 1 in the second."""
    return torch.ones(channels, device=device).index_fill(0, torch.arange(channels // 2, device=device), -1.0)
