"""Fewer kernels in a decoder layer: modules of transformers are replaced by fused ones of torch.

The host limits a short prefill on a GPU, because it launches one kernel after the other. transformers' RMSNorm is a
chain of six kernels in float32 and of eight in half precision, and its rotary embedding takes five for queries and five
for keys. A layer of Llama, Mistral or Qwen launched 34 kernels in a prefill (38 in half precision). Now it launches 20,
and in a decoding step two more, which write the cache (`tests/test_fused.py` counts them).

* `nn.RMSNorm` is one kernel on CUDA. In float32 on a CPU it computes the same bits as the chain and is faster. In half
  precision both compute in float32, but the chain rounds before and after it multiplies by the weight, and torch only
  after. A quarter of the numbers then differ by one unit in the last place, and torch's are nearer to the exact ones
  (at most 0.4 % off in bfloat16; the chain is up to 0.8 % off). In half precision a CPU keeps the chain, which is
  faster for long prompts.
* Rotary embedding adds the two products into the halves of the first one: three kernels, without negated copy and
  concatenation. A product is not rounded before it is added, so float32 differs by less than 1e-6 of the largest
  number. A CPU keeps the rotation of transformers.

Only models that are loaded here are changed; `llava.reduce` leaves the user's model as it is.

Read: transformers 5.23.0, modeling of llama, mistral, qwen2_vl and qwen2_5_vl
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llava.transformers_names import (
    ALL_ATTENTION_FUNCTIONS,
    CACHE_NAMES,
    KERNEL,
    cache_of,
    eager_attention_forward,
    refuse_others,
)

# The classes of these families are alike. Others are not: Gemma's norm, for example, adds 1 to its weight.
NORMS, ATTENTIONS = (
    {f"{family}{kind}" for family in ("Llama", "Mistral", "Qwen2", "Qwen2VL", "Qwen2_5_VL")}
    for kind in ("RMSNorm", "Attention")
)
# Other arguments of a layer's attention: the cache, and those without effect on the kernels of loaded models.
GIVEN = frozenset({*CACHE_NAMES, "position_ids", "use_cache"})


def fuse(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace norms and attention in place, before ranks cut the model. Weights are shared and keep their names.

    Args:
        model: an HF model, or a decoder.
        dtype, device: dtype and device of the computation.
    """
    on_gpu = device.type == "cuda"
    for parent in list(model.modules()):
        if on_gpu and type(parent).__name__ in ATTENTIONS:
            parent.forward = MethodType(attend, parent)
        for name, part in parent.named_children():
            if type(part).__name__ in NORMS and (on_gpu or (device.type == "cpu" and dtype == torch.float32)):
                stock: Any = part
                norm = nn.RMSNorm(stock.weight.shape, stock.variance_epsilon, device="meta")
                norm.weight = stock.weight
                setattr(parent, name, norm.train(stock.training))


def attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """`forward` of a decoder layer's attention, [B, L, D] -> [B, L, D] and, if it is eager, its weights [B, H, L, W].

    Args:
        position_embeddings: cosine and sine, [B, L, d] each.
        attention_mask: [B, 1, L, W], for the kernel.
        given: the cache by its name in the installed transformers; without a cache there are no earlier tokens.

    Raises:
        UserError: there is another argument, which the layer's own attention may use.
    """
    refuse_others(given, GIVEN, "fused attention")
    projections = self.q_proj, self.k_proj, self.v_proj
    query, key, value = (part(hidden_states).unflatten(-1, (-1, self.head_dim)) for part in projections)
    cos, sin = (angle.unsqueeze(2) for angle in position_embeddings)
    halves = sin.chunk(2, -1)
    query, key = (rotated(heads, cos, *halves).transpose(1, 2) for heads in (query, key))
    value = value.transpose(1, 2)
    cache = cache_of(given)
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(getattr(self.config, KERNEL), eager_attention_forward)
    out, weights = kernel(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def rotated(heads: Tensor, cos: Tensor, sin1: Tensor, sin2: Tensor) -> Tensor:
    """[B, L, H, d] heads, rotated: (h1, h2) cos + (-h2, h1) sin.

    Args:
        cos: [B, L, 1, d].
        sin1, sin2: [B, L, 1, d / 2], the halves of the sine.
    """
    out = heads * cos
    (first, second), (out1, out2) = heads.chunk(2, -1), out.chunk(2, -1)
    out1.addcmul_(second, sin1, value=-1)
    out2.addcmul_(first, sin2)
    return out
