"""Penultimate patch features of the training scenes, cached once because the tower stays frozen in stage 2."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinyllava.corpus import Corpus
from tinyllava.scenes import GRID
from tinyllava.vision import patchify, vision_states

CHUNK = 40


class Features:
    """[n, 576, D] bfloat16 features of a corpus on disk, computed by all ranks together, resumable."""

    def __init__(self, path: Path, corpus: Corpus, clip, ranks: tuple[int, int] = (0, 1)):
        """`ranks` is (rank, number of ranks); each computes every so many-th chunk. The caller waits for all."""
        width = clip.config.vision_config.hidden_size
        self.bits = _shared(path, np.int16, (len(corpus), GRID * GRID, width))
        done = _shared(path.with_suffix(".done"), np.uint8, (-(-len(corpus) // CHUNK),))
        rank, count = ranks
        with torch.no_grad():
            for chunk in tqdm(range(rank, len(done), count), desc="features", disable=rank > 0):
                if done[chunk]:
                    continue
                rows = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, len(corpus)))
                penultimate, _ = vision_states(clip, patchify(corpus.images[rows]), last=False)
                self.bits[rows] = penultimate[:, 1:].bfloat16().contiguous().view(torch.int16).numpy()
                done[chunk] = 1

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.bits[rows])).view(torch.bfloat16)


def _shared(path: Path, dtype, shape: tuple[int, ...]) -> np.memmap:
    """A file of zeros that several processes map; making it twice is harmless."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with open(path, "ab") as file:
        file.truncate(size)
    return np.memmap(path, dtype, "r+", shape=shape)
