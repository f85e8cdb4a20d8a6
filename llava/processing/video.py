"""Videos for Video-LLaVA: eight frames of a file, and from frames or pictures to the pixels of the towers.

Source: PKU-YuanGroup/Video-LLaVA @ 984e65b (Apache-2.0), languagebind/{video,image}/processing_*.py, with the versions
that it pins: torchvision 0.15.2, and pytorchvideo's ShortSideScale. Frames are decoded with PyAV instead of decord.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor

from llava.errors import UserError, unknown
from llava.processing.clip_image import CLIP_MEAN, CLIP_STD, ImageProcessor, as_rgb

FRAMES = 8
READINGS = ("original", "transformers")

# Quarter turns counter-clockwise -> how Pillow names them.
TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Video:
    """The frames of a video that the model sees; stands in a Sample where a picture would.

    Attributes:
        frames: in order of time, all of one size.
    """

    frames: tuple[Image.Image, ...]

    def __post_init__(self) -> None:
        sizes = {frame.size for frame in self.frames}
        if len(sizes) != 1:
            raise UserError(
                f"A video is one or more frames of one size, got {len(self.frames)} frames of sizes {sorted(sizes)}; "
                "bring the frames to one size first."
            )


def frame_indices(count: int, frames: int = FRAMES) -> list[int]:
    """Which of `count` frames are taken: evenly spread from the first to the last, rounded down.

    The official rule is an int-truncated linspace, first and last frame included; NumPy's own is called because its
    rounding decides where the spacing is no whole number.
    """
    return np.linspace(0, count - 1, frames, dtype=int).tolist()


def read_video(path: str | Path, frames: int = FRAMES) -> Video:
    """Decode `frames` evenly spread frames of a video file, as RGB.

    What a container says about its length can be wrong. Frames are therefore counted as decord counts them, by the
    packets of the stream, and the count is confirmed by the decoding itself, which goes through the whole stream and
    keeps only the chosen frames. Where another number of frames comes out, that number holds and the stream is decoded
    a second time. A file that ends early between two frames is as long as what is left of it.

    A rotation by quarter turns in the metadata is applied, as decord does; other angles, mirroring and pixels that are
    not square are ignored, as decord does too. Frames have equalled those of decord 0.6.0 in every pixel (MPEG-4,
    H.264 with B frames, VP9; BT.601 and BT.709, 4:2:0 and 4:4:4, turned).

    Args:
        path: any file that FFmpeg decodes; of several video streams the one that FFmpeg takes for the best.
        frames: how many; Video-LLaVA takes 8.

    Raises:
        UserError: there is no such file, it is no video, it has no video stream, it is damaged (the decoder stops, or
            marks a chosen frame as incomplete), or it is shorter. Decord repeats frames of a shorter video and puts a
            neighbour in the place of a frame that does not come; neither happens here.
    """
    if frames < 1:
        raise UserError(f"Cannot take {frames} frames of a video; ask for 1 or more.")
    path = Path(path)
    expected = _count_packets(path)
    chosen, count = _decode(path, frame_indices(expected, frames))
    if count != expected:
        chosen, count = _decode(path, frame_indices(count, frames))
    if count < frames:
        raise UserError(
            f"The video {path} has {count} frames, but {frames} are taken of each; leave it out or use a longer one."
        )
    return Video(tuple(chosen))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream; every error of reading inside becomes a UserError."""
    try:
        # A file object, and no other protocol: FFmpeg takes some names for addresses, and follows lists of files.
        with path.open("rb") as file, av.open(file, options={"protocol_whitelist": "none"}) as container:
            stream = container.streams.best("video")
            if container.format.name == "tty":  # what FFmpeg takes a .txt file for, frames and all
                raise _damaged(path, "it is text")
            if stream is None:
                raise UserError(f"The file {path} has no video stream; name a file with moving pictures, not cut off.")
            stream.thread_type = "AUTO"
            yield container, stream
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"No video at {path}; check the path and the video folder.") from error
    # PyAV mixes its own errors with built-in ones, depending on where FFmpeg gives up.
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        raise _damaged(path, getattr(error, "strerror", None) or str(error)) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"Cannot read the video {path} ({reason}); the file is damaged or no video, fetch it again.")


def _count_packets(path: Path) -> int:
    """Frames by the packets of the stream, without decoding."""
    count = 0
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _damaged(path, f"packet {count} is incomplete")
            count += packet.size > 0  # the last one is empty: it empties the decoder
    return count


def _decode(path: Path, indices: Sequence[int]) -> tuple[list[Image.Image], int]:
    """The frames at `indices`, as far as there are any, and how many there are in all."""
    chosen: dict[int, Image.Image] = {}
    count = 0
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            if count in indices:
                if frame.is_corrupt:
                    raise _damaged(path, f"frame {count} is incomplete")
                chosen[count] = _upright(frame)
            count += 1
    return [chosen[index] for index in indices if index in chosen], count


def _upright(frame: av.VideoFrame) -> Image.Image:
    """RGB, turned the way the metadata says it is to be shown."""
    image = frame.to_image()
    turn = TURNS.get(round(frame.rotation / 90) % 4)
    return image if turn is None else image.transpose(turn)


@dataclass(frozen=True)
class VideoProcessor:
    """Video -> [F, 3, S, S] float32 pixels.

    Attributes:
        size: the shorter edge after resizing.
        crop: S, the side of the centred crop that the tower sees.
        frames: F; a video with another number of frames is refused.
        mean, std: per channel, on pixels in 0..1.
        reading: "original": scale to 0..1, normalise, resize (bilinear, not antialiased), crop. "transformers": resize
            (bicubic, antialiased, to 8 bits), crop, scale, normalise, as the transformers conversion is run; with
            Pillow, from which the processor that needs torchvision differs by a step of 8 bits in a few pixels.
        flip: None, or a seed. The official code leaves a training step on at inference: it mirrors all frames of a
            video where a draw of Python's unseeded generator is below 0.5, so that its answers cannot be reproduced.
            With a seed, the k-th call of this object goes by the k-th draw of `random.Random(flip)`, as the official
            code would after `random.seed(flip)`. The order of the videos then matters.
    """

    size: int = 224
    crop: int = 224
    frames: int = FRAMES
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    reading: Literal["original", "transformers"] = "original"
    flip: int | None = None

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise unknown("video reading", self.reading, READINGS)
        if self.crop > self.size:
            raise UserError(
                f"A crop of {self.crop} pixels was asked from frames whose shorter edge is {self.size}; "
                "make the crop at most as large as the size."
            )
        if self.flip is not None and self.reading != "original":
            raise UserError(
                f"Mirroring belongs to the original preprocessing, not to {self.reading!r}; leave flip at None."
            )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], frames: int = FRAMES, reading: Literal["original", "transformers"] = "original"
    ) -> "VideoProcessor":
        """Read sizes, mean and std from a CLIP-like preprocessor_config.json."""
        image = ImageProcessor.from_config(config)
        return cls(image.size, image.crop, frames, image.mean, image.std, reading)

    def __call__(self, video: Video) -> Tensor:
        if len(video.frames) != self.frames:
            raise UserError(
                f"The model takes {self.frames} frames of each video, but this one has {len(video.frames)}; "
                f"read it with frames={self.frames}."
            )
        frames = [as_rgb(frame) for frame in video.frames]
        if self.reading == "transformers":
            return self._pillow.crops(frames)
        pixels = _normalise(_planes(frames), self.mean, self.std)
        height, width = pixels.shape[-2:]
        # pytorchvideo's rounding: the quotient first.
        if width < height:
            size = (math.floor(height / width * self.size), self.size)
        else:
            size = (self.size, math.floor(width / height * self.size))
        pixels = _centre(F.interpolate(pixels, size=size, mode="bilinear", align_corners=False), self.crop)
        if self.flip is not None and self._coin.random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels

    @cached_property
    def _coin(self) -> random.Random:
        return random.Random(self.flip)

    @cached_property
    def _pillow(self) -> ImageProcessor:
        return ImageProcessor(self.size, self.crop, self.mean, self.std, aspect="crop")


@dataclass(frozen=True)
class LanguageBindImageProcessor(ImageProcessor):
    """RGB image -> [3, S, S] float32 pixels, as the original Video-LLaVA prepares pictures.

    Padding and sizes are those of LLaVA-1.5; the resizing is not. It runs on tensors, where the pinned torchvision
    0.15.2 does no antialiasing unless told to (bicubic, a = -0.75), and nothing is clamped to 0..1. A picture that is
    shrunk much comes out rougher than by Pillow. For the transformers conversion use ImageProcessor.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        if self.aspect == "crop":
            return super().__call__(image)
        square = _square(_planes([as_rgb(image)]), self.padding_colour, self.size)
        return _normalise(_centre(square, self.crop), self.mean, self.std)[0]

    def crops(self, images: Sequence[Image.Image]) -> Tensor:
        """[n, 3, S, S] float32, one for each RGB image, which is cropped and never padded."""
        return torch.cat([self._middle(_planes([image])) for image in images])

    def _middle(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        short = min(height, width)
        # torchvision's rounding: the product first.
        size = (int(self.size * height / short), int(self.size * width / short))
        return _normalise(_centre(_bicubic(pixels, size), self.crop), self.mean, self.std)


def _square(pixels: Tensor, colour: Sequence[int], size: int) -> Tensor:
    """[1, 3, H, W] centred on a square of `colour` and resized to `size`; an odd remainder goes right or below.

    The longer edge is resized first: rows of one colour stay what they are, and the canvas never exists as a whole.
    """
    height, width = pixels.shape[-2:]
    if height > width:
        return _square(pixels.transpose(-1, -2), colour, size).transpose(-1, -2)
    canvas = (torch.tensor(colour) / 255)[:, None, None].repeat(1, 1, width, size)
    top = (width - height) // 2
    canvas[..., top : top + height, :] = _bicubic(pixels, (height, size))
    return _bicubic(canvas, (size, size))


def _bicubic(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)


def _planes(images: Sequence[Image.Image]) -> Tensor:
    """[F, 3, H, W] float32 in 0..1."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).contiguous() / 255


def _normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _centre(pixels: Tensor, side: int) -> Tensor:
    """The middle square; half a pixel is rounded to the even side, as Python's round does in torchvision."""
    top, left = (round((edge - side) / 2) for edge in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]
