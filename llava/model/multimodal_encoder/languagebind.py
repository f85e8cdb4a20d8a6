"""The video tower of Video-LLaVA (LanguageBind video): CLIP blocks with attention over time before attention in space.

Official code read: PKU-YuanGroup/Video-LLaVA @ 984e65b (Apache-2.0),
videollava/model/multimodal_encoder/languagebind/video/modeling_video.py; also run, for comparison
Differs from it: nothing known.
Shapes: B videos of F frames, n tokens per frame (CLS and patches), D channels.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from llava.errors import UserError

VIDEO_FRAMES = 8


class TemporalLayer(CLIPEncoderLayer):
    """A CLIP block after attention over time, in which each position, CLS included, attends to itself in all F frames.

    In the order of the official code, for frames folded into the batch, [B*F, n, D]:

    1. x = hidden + temporal_embedding, the same for all positions; left out if F is 1;
    2. x = x + temporal_attn(temporal_layer_norm1(x)) over the F frames of each position, without a mask; the residual
       starts from x, so the embedding stays in the residual stream and adds up from block to block;
    3. the usual block: x = x + self_attn(layer_norm1(x)) within each frame, x = x + mlp(layer_norm2(x)).

    Time has no MLP. Weights beyond CLIP's: temporal_embedding [1, F, D],
    temporal_attn.{q,k,v,out}_proj.{weight,bias}, temporal_layer_norm1.{weight,bias}.
    """

    def __init__(self, config: CLIPVisionConfig, frames: int):
        super().__init__(config)
        self.frames = frames
        self.temporal_embedding = nn.Parameter(torch.empty(1, frames, config.hidden_size))
        nn.init.normal_(self.temporal_embedding, std=config.hidden_size**-0.5)
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def before_space(self, hidden: Tensor) -> Tensor:
        """Return the input of the spatial part of the block (steps 1 and 2).

        Importance scores of this block (CLS attention, keys) are computed from it, not from the block's input.

        Args:
            hidden: [B*F, n, D], the frames of a video in order.

        Returns:
            [B*F, n, D].

        Raises:
            UserError: the number of frames is no multiple of F.
        """
        if hidden.shape[0] % self.frames:
            raise UserError(
                f"The video tower takes {self.frames} frames per video, but got {hidden.shape[0]} frames in total; "
                f"read every video with frames={self.frames}."
            )
        along_time = rearrange(hidden, "(videos frames) n width -> (videos n) frames width", frames=self.frames)
        if self.frames != 1:
            along_time = along_time + self.temporal_embedding
        attended, _ = self.temporal_attn(self.temporal_layer_norm1(along_time), None)
        return rearrange(along_time + attended, "(videos n) frames width -> (videos frames) n width", n=hidden.shape[1])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B*F, n, D] -> [B*F, n, D]; a mask applies to the spatial attention only."""
        return super().forward(self.before_space(hidden_states), attention_mask, **kwargs)


class LanguageBindVideoTower(CLIPVisionModel):
    """A transformers CLIPVisionModel with TemporalLayers: the same attributes, CLIP's weights and the temporal ones.

    Its input is the frames of all videos folded into the batch, [B*F, 3, S, S]. The official code has patch dropout in
    training, which does nothing at inference and has no weights. Video-LLaVA uses the input of the last block for all
    tokens, including the CLS token of every frame.

    Attributes:
        frames: F, frames per video.
    """

    def __init__(self, config: CLIPVisionConfig, frames: int = VIDEO_FRAMES):
        if frames < 1:
            raise UserError(f"A video tower needs at least one frame, got {frames}; set frames to 1 or more.")
        super().__init__(config)
        self.frames = frames
        self.encoder.layers = nn.ModuleList(TemporalLayer(config, frames) for _ in range(config.num_hidden_layers))
        self.post_init()
