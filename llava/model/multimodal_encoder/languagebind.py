"""The video tower of Video-LLaVA: CLIP blocks that first look along time, then over the frame (LanguageBind video).

Source: PKU-YuanGroup/Video-LLaVA @ 984e65b (Apache-2.0),
videollava/model/multimodal_encoder/languagebind/video/modeling_video.py, read and executed for comparison.
Shapes: B videos of F frames, n tokens per frame (CLS and patches), D channels.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from llava.errors import UserError

VIDEO_FRAMES = 8


class TemporalLayer(CLIPEncoderLayer):
    """A CLIP block with attention over time in front: every position, CLS included, attends itself in all F frames.

    In the order of the official code, for frames folded into the batch, [B*F, n, D]:

    1. x = hidden + temporal_embedding, the same for all positions; left out where F is 1;
    2. x = x + temporal_attn(temporal_layer_norm1(x)) over the F frames of each position, without a mask; the residual
       starts from x, so the embedding stays in the stream and adds up from block to block;
    3. the usual block: x = x + self_attn(layer_norm1(x)) within each frame, x = x + mlp(layer_norm2(x)).

    There is no MLP of its own for time. Keys beyond CLIP's: temporal_embedding [1, F, D],
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
        """Steps 1 and 2: what the spatial part of the block really works on.

        A signal of this block (CLS attention, keys) is computed from here, not from the block's input.

        Args:
            hidden: [B*F, n, D], the frames of a video one behind another.

        Returns:
            [B*F, n, D].

        Raises:
            UserError: the frames do not make whole videos.
        """
        if hidden.shape[0] % self.frames:
            raise UserError(
                f"The video tower takes {self.frames} frames of each video, but got {hidden.shape[0]} in all; "
                f"read every video with frames={self.frames}."
            )
        tokens = hidden.shape[1]
        along_time = hidden.unflatten(0, (-1, self.frames)).transpose(1, 2).flatten(0, 1)  # [B*n, F, D]
        if self.frames != 1:
            along_time = along_time + self.temporal_embedding
        attended, _ = self.temporal_attn(self.temporal_layer_norm1(along_time), None)
        return (along_time + attended).unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B*F, n, D] -> [B*F, n, D]; a mask concerns the spatial attention only."""
        return super().forward(self.before_space(hidden_states), attention_mask, **kwargs)


class LanguageBindVideoTower(CLIPVisionModel):
    """A transformers CLIPVisionModel with TemporalLayers: same attributes, CLIP's keys and the temporal ones.

    It takes the frames of all videos folded into the batch, [B*F, 3, S, S]. The official code regularises training
    with patch dropout, which does nothing at inference and has no weights. Video-LLaVA takes the input of the last
    block for all tokens, CLS of every frame included.

    Attributes:
        frames: F, how many frames make a video.
    """

    def __init__(self, config: CLIPVisionConfig, frames: int = VIDEO_FRAMES):
        if frames < 1:
            raise UserError(f"A video tower needs at least one frame, got {frames}; set frames to 1 or more.")
        super().__init__(config)
        self.frames = frames
        self.encoder.layers = nn.ModuleList(TemporalLayer(config, frames) for _ in range(config.num_hidden_layers))
        self.post_init()
