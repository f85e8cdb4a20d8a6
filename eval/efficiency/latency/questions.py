"""What is asked: questions about images without meaning, or the questions of a benchmark."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from llava.model.llava_arch import Llava
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.processing.sample import Sample
from llava.processing.video import Video

QUESTION = "What is the color of the small object on the left side of the image?"
SUFFIX = "Answer the question using a single word or phrase."
SIDE = 336


def noise(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """An image without meaning: the time of most methods does not depend on what is in it."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def visual(model: Llava, seed: int) -> Image.Image | Video:
    """An image or a video of noise with as many visual tokens as the model's budget is counted against."""
    if isinstance(model, VideoLlava):
        return Video(tuple(noise(1000 * seed + frame) for frame in range(model.frames)))
    if isinstance(model, QwenVL):
        # As square as whole merge groups allow.
        groups, edge = model.visual_tokens, model.image_processor.patch * model.image_processor.merge
        rows = next(rows for rows in range(int(groups**0.5), 0, -1) if groups % rows == 0)
        return noise(seed, groups // rows * edge, rows * edge)
    return noise(seed)


def noise_batches(model: Llava, size: int, differ: bool) -> Callable[[int], list[Sample]]:
    """Turn -> a batch of one question about `size` images of noise; other images in every turn where they `differ`."""
    known: dict[int, list[Sample]] = {}

    def ask(turn: int) -> list[Sample]:
        first = turn * size if differ else 0
        if first not in known:
            known.clear()
            seeds = range(first, first + size)
            known[first] = [Sample(f"s{seed}", QUESTION, SUFFIX, visual(model, seed)) for seed in seeds]
        return known[first]

    return ask
