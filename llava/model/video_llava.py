"""Video-LLaVA at run time: images go through one tower, videos frame by frame through another.

Every frame gives its class token and its patches, 8 x 257 = 2,056 visual tokens. Methods that choose patches choose
among 8 x 256 and leave class tokens out unless they keep them on purpose, as the papers count.

Official code read: PKU-YuanGroup/Video-LLaVA@984e65b, videollava/model/llava_arch.py
Differs from it: one slot stands for the eight "<image>" of a video, which have nothing between them; no random flip.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.processing.prompt import Prompt, build_prompt
from llava.processing.sample import Sample
from llava.processing.video import LanguageBindImageProcessor, Video, VideoProcessor
from llava.reduction.model_spec import ModelSpec, spec_of
from llava.reduction.token_layout import TokenLayout, frames


class VideoLlava(Llava):
    """A LLaVA that takes llava.processing.video.Video in place of an image.

    Args:
        flip: None, or a seed for the official code's random mirroring of whole videos, see VideoProcessor.
    """

    takes_videos = True

    def __init__(self, checkpoint, device: torch.device, flip: int | None = None):
        super().__init__(checkpoint, device)
        reading = "original" if checkpoint.layout == "original" else "transformers"
        clip = checkpoint.image_processor
        self.frames: int = checkpoint.frames
        self.temporal: bool = checkpoint.temporal
        self.video_conversation: str = checkpoint.video_conversation
        self.video_processor = VideoProcessor(
            clip.size, clip.crop, self.frames, clip.mean, clip.std, reading=reading, flip=flip
        )
        if reading == "original":
            self.image_processor = LanguageBindImageProcessor(
                size=clip.size, crop=clip.crop, mean=clip.mean, std=clip.std
            )

    takes_videos = True

    @property
    def conventions(self) -> dict[str, Any]:
        attention = "with temporal attention" if self.temporal else "without temporal attention"
        return {"video tower": attention, "flip": "off" if self.video_processor.flip is None else "on"}

    def _read_tower(self) -> None:
        super()._read_tower()
        self.video_tower: nn.Module = self.hf_model.model.video_tower

    def tower_of(self, temporal: bool) -> nn.Module:
        return self.video_tower if temporal else self.tower

    def prompt(self, sample: Sample) -> Prompt:
        video = any(isinstance(picture, Video) for picture in sample.images)
        return build_prompt(
            sample, self.tokenizer, self.video_conversation if video else self.conversation, self.longest_text
        )

    def views(self, picture) -> tuple[Tensor, TokenLayout]:
        if not isinstance(picture, Video):
            return super().views(picture)
        if len(picture.frames) != self.frames:
            raise UserError(
                f"{self.name} takes {self.frames} frames of a video, got {len(picture.frames)}; "
                f"read it with read_video(path, frames={self.frames})."
            )
        return self.video_processor(picture), self._run()

    def _run(self) -> TokenLayout:
        return frames(self.frames, self.layout.rows, self.layout.columns).with_cls()

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a video before any reduction; an image has as many as a frame without its class token."""
        return self._run().tokens

    @cached_property
    def spec(self) -> ModelSpec:
        return spec_of(super().spec, self._run())
