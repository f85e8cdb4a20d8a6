"""Video-LLaVA: images go through one tower, the frames of videos through another.

Each of the 8 frames of a video becomes its class token and its patches, together 8 x 257 = 2,056 visual tokens. Methods
that choose patches choose among 8 x 256. As in the papers, class tokens are dropped unless a method keeps them.

The video tower (LanguageBind video) has CLIP blocks with attention over time before attention in space.

Official code read: PKU-YuanGroup/Video-LLaVA@984e65b (Apache-2.0), videollava/model/llava_arch.py and
multimodal_encoder/languagebind/video/modeling_video.py; also run, for comparison
Differs from it: one placeholder replaces the eight adjacent "<image>" of a video; no random flip.
Shapes: B videos of F frames, n tokens per frame (CLS and patches), D channels.
"""

from functools import cached_property
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.processing.prompt import Prompt, Sample, build_prompt
from llava.processing.video import FRAMES, LanguageBindImageProcessor, Video, VideoProcessor
from llava.reduction.token_layout import WITHOUT_PADDING, Canvas, ModelSpec, TokenLayout, frames, spec_of
from llava.transformers_names import CLIPAttention, CLIPEncoderLayer


class VideoLlava(Llava):
    """A LLaVA that takes llava.processing.video.Video in place of an image."""

    takes_videos = True

    def __init__(self, checkpoint: Any, device: torch.device):
        super().__init__(checkpoint, device)
        reading: Literal["original", "transformers"] = "original" if checkpoint.layout == "original" else "transformers"
        clip = checkpoint.image_processor
        self.frames: int = checkpoint.frames
        self.temporal: bool = checkpoint.temporal
        self.video_processor = VideoProcessor(clip, reading)
        if reading == "original":
            self.image_processor = LanguageBindImageProcessor(clip.size, clip.crop, clip.mean, clip.std)

    @property
    def conventions(self) -> dict[str, Any]:
        return {"video tower": "with temporal attention" if self.temporal else "without temporal attention"}

    def _read_tower(self) -> None:
        super()._read_tower()
        self.video_tower: Any = self.hf_model.model.video_tower

    def tower_of(self, temporal: bool) -> Any:
        return self.video_tower if temporal else self.tower

    def prompt(self, sample: Sample) -> Prompt:
        video = any(isinstance(image, Video) for image in sample.images)
        return build_prompt(sample, self.tokenizer, "llava_v1" if video else self.conversation, self.longest_text)

    def views(self, image: Any) -> tuple[Tensor, TokenLayout]:
        if not isinstance(image, Video):
            return super().views(image)
        if len(image.frames) != self.frames:
            raise UserError(
                f"{self.name} takes {self.frames} frames of a video, got {len(image.frames)}; "
                f"read it with read_video(path, frames={self.frames})."
            )
        return self.video_processor(image), self._run()

    def canvas(self, image: Any) -> Canvas | None:
        """See `Llava.canvas`; frames are cropped, so they have no padding."""
        return WITHOUT_PADDING if isinstance(image, Video) else super().canvas(image)

    def _run(self) -> TokenLayout:
        return frames(self.frames, self.layout.rows, self.layout.columns).with_cls

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a video before any reduction. An image has as many as a frame without its class token."""
        return self._run().tokens

    @cached_property
    def spec(self) -> ModelSpec:
        return spec_of(super().spec, self._run())


# The video tower


class TemporalLayer(CLIPEncoderLayer):
    """A CLIP block with attention over time before it: each position, also CLS, attends to itself in all F frames.

    These are the steps in the order of the official code, for frames folded into the batch, [B*F, n, D]:

    1. x = hidden + temporal_embedding, the same for all positions; left out if F is 1;
    2. x = x + temporal_attn(temporal_layer_norm1(x)) over the F frames of each position, without a mask; the residual
       starts from x, so the embedding stays in the residual stream and adds up from block to block;
    3. the usual block: x = x + self_attn(layer_norm1(x)) within each frame, x = x + mlp(layer_norm2(x)).

    Attention over time has no MLP. Weights in addition to CLIP's: temporal_embedding [1, F, D],
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
        """
        along_time = rearrange(hidden, "(videos frames) n width -> (videos n) frames width", frames=self.frames)
        if self.frames != 1:
            along_time = along_time + self.temporal_embedding
        attended, _ = self.temporal_attn(self.temporal_layer_norm1(along_time), None)
        summed: Tensor = rearrange(
            along_time + attended, "(videos n) frames width -> (videos frames) n width", n=hidden.shape[1]
        )
        return summed

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[B*F, n, D] -> [B*F, n, D]; a mask applies to the spatial attention only."""
        block: Any = super()
        after: Tensor = block.forward(self.before_space(hidden_states), attention_mask, **kwargs)
        return after


class LanguageBindVideoTower(CLIPVisionModel):
    """A CLIPVisionModel of transformers whose blocks are TemporalLayers; its attributes are the same.

    Its input is the frames of all videos folded into the batch, [B*F, 3, S, S]. The official code has patch dropout in
    training, which does nothing at inference and has no weights. Video-LLaVA uses the input of the last block for all
    tokens, including the CLS token of every frame.

    Attributes:
        frames: F, frames per video.
    """

    def __init__(self, config: CLIPVisionConfig, frames: int = FRAMES):
        super().__init__(config)
        self.frames = frames
        self.encoder.layers = nn.ModuleList(TemporalLayer(config, frames) for _ in range(config.num_hidden_layers))
        self.post_init()  # type: ignore[no-untyped-call]  # transformers'
