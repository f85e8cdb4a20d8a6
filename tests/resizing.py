"""Bicubic resizing of Pillow up to 12.3 by definition, slowly, to compare with whatever Pillow is installed."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image


def bicubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resized_rows(pixels: np.ndarray, width: int) -> np.ndarray:
    """One pass along axis 1: antialiased kernel, weights in 22-bit fixed point, result clipped to 8 bits."""
    if width == pixels.shape[1]:
        return pixels
    scale = pixels.shape[1] / width
    stretch = max(scale, 1.0)
    out = np.empty((pixels.shape[0], width, 3), np.uint8)
    for x in range(width):
        centre = (x + 0.5) * scale
        low = max(0, int(centre - 2 * stretch + 0.5))
        high = min(pixels.shape[1], int(centre + 2 * stretch + 0.5))
        weights = np.array([bicubic((place - centre + 0.5) / stretch) for place in range(low, high)])
        fixed = np.trunc(weights / weights.sum() * 2**22 + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
        total = (pixels[:, low:high].astype(np.int64) * fixed[None, :, None]).sum(1) + 2**21
        out[:, x] = np.clip(total >> 22, 0, 255)
    return out


def resized_by_the_book(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizing of Pillow up to 12.3: the width first, then the height."""
    wide = resized_rows(np.asarray(image), size[0])
    return Image.fromarray(resized_rows(wide.transpose(1, 0, 2), size[1]).transpose(1, 0, 2).copy())


@contextmanager
def old_pillow() -> Iterator[None]:
    """Run official code with the resizing of Pillow up to 12.3, with which its results were published."""

    def resize(image, size, resample=None, box=None, reducing_gap=None):
        assert (resample, box, reducing_gap) == (Image.Resampling.BICUBIC, None, None)
        return resized_by_the_book(image, tuple(size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        yield
