"""Video-LLaVA's preprocessing: read eight frames of a video file, and prepare frames and images for the towers.

Official code read: PKU-YuanGroup/Video-LLaVA@984e65b (Apache-2.0), languagebind/{video,image}/processing_*.py, with the
versions that it pins: torchvision 0.15.2, and pytorchvideo's ShortSideScale
Differs from it: frames are decoded with PyAV instead of decord.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llava.errors import UserError, optional_imports
from llava.processing.image import ImageProcessor, as_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

FRAMES = 8

# Quarter turns counter-clockwise -> Pillow's names.
TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Video:
    """The frames of a video for the model; a Sample can have it instead of an image.

    Attributes:
        frames: at least one, in temporal order, all of one size.
        indices: of the frames in the file; () if they come from no file.
        total: number of frames of the file.
        rate: frames per second of the file on average; None if it is not known.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...] = ()
    total: int = 0
    rate: float | None = None

    def __post_init__(self) -> None:
        if not self.frames:
            raise UserError("A video needs at least one frame, got none; leave it out or decode it again.")


def frame_indices(count: int, frames: int = FRAMES) -> list[int]:
    """Return the indices of `frames` of `count` frames, evenly spaced from the first to the last, rounded down.

    The official rule is NumPy's linspace truncated to integers. NumPy is called because its rounding decides if the
    spacing is not an integer.
    """
    indices: list[int] = np.linspace(0, count - 1, frames, dtype=int).tolist()
    return indices


def read_video(path: str | Path, frames: int = FRAMES) -> Video:
    """Decode `frames` evenly spaced frames of a video file, as RGB.

    The length in a file's header can be wrong, so this counts the packets of the stream, as decord does. The whole
    stream is decoded, and only the chosen frames are kept. If decoding finds another number of frames, the stream is
    decoded again with that number. A file that was cut off between two frames is as long as the part that is left.

    As in decord, a rotation by quarter turns in the metadata is applied, and other angles, mirroring and non-square
    pixels are ignored. Frames were equal to decord 0.6.0's in every pixel (MPEG-4, H.264 with B frames, VP9; BT.601
    and BT.709, 4:2:0 and 4:4:4, rotated).

    Args:
        path: any file that FFmpeg decodes. If it has several video streams, FFmpeg chooses the best.
        frames: number of frames; Video-LLaVA takes 8.

    Raises:
        UserError: there is no such file, it is no video, it has no video stream, it is damaged (the decoder stops, or
            marks a chosen frame as incomplete), or it has fewer frames. Decord repeats frames of a shorter video and
            replaces missing frames by their neighbours; this function does neither.
    """
    path = Path(path)
    expected = _count_packets(path)
    chosen, count, rate = _decode(path, frame_indices(expected, frames))
    if count != expected:
        chosen, count, rate = _decode(path, frame_indices(count, frames))
    if count < frames:
        raise UserError(
            f"The video {path} has {count} frames, but {frames} are needed; leave it out or use a longer one."
        )
    return Video(tuple(chosen), tuple(frame_indices(count, frames)), count, rate)


def pyav() -> ModuleType:
    """The module `av`, imported when a video file is first opened, as nothing else needs it.

    Raises:
        UserError: it is not installed.
    """
    with optional_imports("av"):
        import av
    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open a file and its best video stream. Errors of reading it inside the block become a UserError."""
    av = pyav()
    try:
        # A file object and no protocol: FFmpeg treats some names as addresses, and opens the files of playlists.
        with path.open("rb") as file, av.open(file, "r", options={"protocol_whitelist": "none"}) as container:
            stream: Any = container.streams.best("video")
            if container.format.name == "tty":  # FFmpeg renders the text of a .txt file as frames
                raise _damaged(path, "it is text")
            if stream is None:
                raise UserError(f"The file {path} has no video stream; give a complete video file.")
            stream.thread_type = "AUTO"
            yield container, stream
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"No video at {path}; check the path and the video folder.") from error
    # PyAV raises its own errors or built-in ones, depending on where the damage is.
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        raise _damaged(path, getattr(error, "strerror", None) or str(error)) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"Cannot read the video {path} ({reason}); the file is damaged or no video, fetch it again.")


def _count_packets(path: Path) -> int:
    """Count the frames by the packets of the stream, without decoding."""
    count = 0
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _damaged(path, f"packet {count} is incomplete")
            count += packet.size > 0  # the last packet is empty and flushes the decoder
    return count


def _decode(path: Path, indices: Sequence[int]) -> tuple[list[Image.Image], int, float | None]:
    """Return the frames at `indices` that exist, upright and RGB, the number of all frames, and their rate."""
    chosen: dict[int, Image.Image] = {}
    count = 0
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            if count in indices:
                if frame.is_corrupt:
                    raise _damaged(path, f"frame {count} is incomplete")
                turn = TURNS.get(round(frame.rotation / 90) % 4)
                image: Image.Image = frame.to_image()
                chosen[count] = image if turn is None else image.transpose(turn)
            count += 1
        rate = stream.average_rate
    return [chosen[index] for index in indices if index in chosen], count, float(rate) if rate else None


@dataclass(frozen=True)
class VideoProcessor:
    """Video -> [F, 3, S, S] float32 pixels.

    Attributes:
        clip: sizes, mean and deviation; frames are cropped, never padded.
        reading: "original" scales to 0..1, normalises, resizes (bilinear, not antialiased) and crops. "transformers",
            for the transformers conversion, resizes (see llava.processing.image.resize), crops, scales and normalises;
            its torchvision processor differs by one 8-bit step in a few pixels.
    """

    clip: ImageProcessor
    reading: Literal["original", "transformers"] = "original"

    def __call__(self, video: Video) -> Tensor:
        frames, size = [as_rgb(frame) for frame in video.frames], self.clip.size
        if self.reading == "transformers":
            return self.clip.crops(frames)
        pixels = _normalise(_planes(frames), self.clip)
        height, width = pixels.shape[-2:]
        # pytorchvideo's rounding: the quotient first.
        if width < height:
            edges = (math.floor(height / width * size), size)
        else:
            edges = (size, math.floor(width / height * size))
        return _centre(F.interpolate(pixels, size=edges, mode="bilinear", align_corners=False), self.clip.crop)


@dataclass(frozen=True)
class LanguageBindImageProcessor(ImageProcessor):
    """RGB image -> [3, S, S] float32 pixels, as the original Video-LLaVA prepares images.

    Padding and sizes are those of LLaVA-1.5, but tensors are resized instead of images (bicubic, a = -0.75). By
    default, the pinned torchvision 0.15.2 then neither antialiases nor clamps to 0..1, so that strongly reduced images
    are rougher than with Pillow. Use ImageProcessor for the transformers conversion.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        square = _square(_planes([as_rgb(image)]), self.padding_colour, self.size)
        return _normalise(_centre(square, self.crop), self)[0]


def _square(pixels: Tensor, colour: Sequence[int], size: int) -> Tensor:
    """Centre [1, 3, H, W] on a square of `colour` and resize it to `size`; an odd remainder goes right or below.

    The longer side is resized first. Rows of one colour do not change, so the whole canvas never exists.
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


def _normalise(pixels: Tensor, clip: ImageProcessor) -> Tensor:
    return (pixels - torch.tensor(clip.mean)[:, None, None]) / torch.tensor(clip.std)[:, None, None]


def _centre(pixels: Tensor, side: int) -> Tensor:
    """Crop the centre square; half pixels are rounded to even, as torchvision does with Python's round."""
    top, left = (round((edge - side) / 2) for edge in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]
