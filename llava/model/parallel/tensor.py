"""Tensor parallelism: every rank of a replica holds a part of each decoder layer, cut by DeepSpeed.

Split: the projections of attention (by heads) and MLP, and the head (by its input, as DeepSpeed does). The head of a
34B is 0.9 GB in bfloat16 and is read for every token; the sum of its parts is one row of logits per sample. Whole on
every rank: towers, projector, embeddings and norms, so that all ranks compute the same scores before the decoder.

Communicated per layer: two sums over ranks of the hidden states, [B, L, D] each; at the end of a pass one of the
logits [B, 1, V]. Where a method reads the decoder's attention, queries and keys are gathered, not the attention: keys
are L x Hkv x d and queries T x H x d numbers in the model's dtype, the attention of T rows T x H x L in float32. The
keys are fewer from T = Hkv x d / 2 H rows on (64 for Llama's 32 heads of 128, 9 for grouped-query heads with four key
heads per 28), and every rank then ranks by the float32 numbers that one process would compute, in the same order.

Paper: https://arxiv.org/abs/1909.08053 (Megatron-LM), https://arxiv.org/abs/2207.00032 (DeepSpeed Inference)
Official code read: deepspeedai/DeepSpeed@v0.19.8, deepspeed/inference/engine.py and deepspeed/module_inject
Differs from it: the policy names the decoder's layers, because DeepSpeed's automatic one also cuts CLIP's heads; the
weights keep the dtype of the file until they are cut, because DeepSpeed casts the whole module first.
"""

from typing import Self

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from llava.errors import UserError
from llava.model.parallel import group
from llava.model.parallel.mapped import settle

# Projections cut by their input, after which the ranks add their parts; all others are cut by their output.
SUMMED = ("self_attn.o_proj", "mlp.down_proj")
POLICY: dict[type[nn.Module], tuple[str, ...]] = {
    LlamaDecoderLayer: SUMMED,
    MistralDecoderLayer: SUMMED,
    Qwen2DecoderLayer: SUMMED,
    Qwen2_5_VLDecoderLayer: SUMMED,
    Qwen2VLDecoderLayer: SUMMED,
}


class SplitPart(nn.Module):
    """The modules that DeepSpeed cuts: decoder layers and head.

    DeepSpeed casts what it is given before it cuts it. A cast of mapped weights would be a copy of the whole model, so
    the three functions that it calls do nothing here.
    """

    def __init__(self, layers: nn.ModuleList, head: nn.Module, config: PretrainedConfig):
        super().__init__()
        self.layers = layers
        self.lm_head = head
        self.config = config

    def half(self) -> Self:
        return self

    def bfloat16(self) -> Self:
        return self

    def float(self) -> Self:
        return self


def split(model: PreTrainedModel, ranks: int, dtype: torch.dtype, device: torch.device) -> None:
    """Leave this rank's part of the decoder in the model, in place; all ranks of the replica call it together.

    Args:
        model: with mapped weights, see `llava.model.parallel.mapped`.
        ranks: the size of the group that this process has joined.
        dtype, device: of the weights afterwards.

    Raises:
        UserError: there is no policy for the decoder's layers.
    """
    deepspeed = group.import_deepspeed(device.type)
    llm = model.model.language_model
    kind = type(llm.layers[0])
    if kind not in POLICY:
        known = ", ".join(sorted(one.__name__ for one in POLICY))
        raise UserError(f"Tensor parallelism knows the decoder layers {known}, got {kind.__name__}; load it whole.")
    part = SplitPart(llm.layers, model.lm_head, model.config.get_text_config())
    whole = {
        name: (linear.in_features, linear.out_features)
        for name, linear in part.named_modules()
        if isinstance(linear, nn.Linear)
    }
    deepspeed.init_inference(
        part,
        tensor_parallel={"tp_size": ranks},
        dtype=torch.float32,  # SplitPart keeps what it has
        replace_with_kernel_inject=False,
        injection_policy={kind: POLICY[kind]},
    )
    model.lm_head = part.lm_head
    for name, sizes in whole.items():
        linear = part.get_submodule(name)
        # Operations are counted for the whole model.
        linear.in_features, linear.out_features = sizes
    for layer in llm.layers:
        layer.self_attn.gather = group.gather
    llm.ranks = ranks
    settle(model, dtype, device)
