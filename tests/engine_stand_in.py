"""A stand-in for a serving engine's LLaVA: the modules that the plug-in looks for, around a tiny model's weights.

vLLM is not installed where most tests run. Its vision attention projects queries, keys and values and hands them to a
module `attn`; here this is torch's kernel. `EngineTower` can so be compared with the pipeline token by token.
"""

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.errors import UserError
from llava.serving.engine_method import EngineTower, served_by
from tests.tiny_checkpoints import make_tiny_llava


class Kernel(nn.Module):
    """The engine's attention for encoders: [B, P, H * d] each."""

    def __init__(self, heads: int, scale: float):
        super().__init__()
        self.num_heads = self.num_kv_heads = heads
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(*parts, scale=self.scale).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """The attention of a tower block, with the projections of a transformers CLIPAttention."""

    def __init__(self, stock: Any):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.out_proj
        self.attn = Kernel(stock.num_heads, stock.scale)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        projected = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        return self.out_proj(self.attn(*projected)), None


class EngineLlava(nn.Module):
    """What the plug-in's classes inherit from: tower, projector and configuration."""

    def __init__(self, stock: Any, settings: dict[str, Any]):
        super().__init__()
        self.config = copy.deepcopy(stock.config)
        self.config.vtr = settings
        self.config.architectures = ["LlavaForConditionalGeneration"]
        self.multi_modal_projector = stock.model.multi_modal_projector
        self.tower = copy.deepcopy(stock.model.vision_tower)
        for layer in self.tower.encoder.layers:
            layer.self_attn = Attention(layer.self_attn)

    def vision_tower(self, pixels: Tensor, feature_select_strategy: str) -> Tensor:
        assert feature_select_strategy == "full"
        hidden: Tensor = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        layers: list[Any] = list(self.tower.encoder.layers)
        for layer in layers[: len(layers) + 1 + self.config.vision_feature_layer]:
            hidden = layer(hidden, None)
        return hidden


@cache
def stock() -> Any:
    return make_tiny_llava().eval()


def engine_tower(method: str, budget: int, **options: str) -> EngineTower:
    """The tower of an engine whose settings name a method.

    Raises:
        UserError: the engine cannot run it.
    """
    model = EngineLlava(stock(), {"method": method, "budget": budget, "options": options})
    served = served_by(model.config)
    assert served is not None
    layers: list[Any] = list(model.tower.encoder.layers)
    return EngineTower(model, served, [layer.self_attn for layer in layers[:-1]] + [None])


def kept_tokens(method: str, budget: int = 6) -> Any:
    """The visual tokens that three images become, rounded, or the sentence of a refusal."""
    side = stock().config.vision_config.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        tower = engine_tower(method, budget)
        with torch.no_grad():
            tokens = tower.clip_images([one[None] for one in pixels], [(0, 0)] * 3)
    except UserError as error:
        return str(error)
    return [[round(value, 4) for value in one.sum(-1).tolist()] for one in tokens]
