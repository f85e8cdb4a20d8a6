"""Penultimate patch features of the training scenes, cached once because the tower stays frozen in stage 2."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinyllava.corpus import Corpus
from tinyllava.scenes import GRID
from tinyllava.vision import patchify, vision_states


class Features:
    """[n, 576, D] bfloat16 features of a corpus on disk; resumable like the corpus itself."""

    def __init__(self, path: Path, corpus: Corpus, clip, quiet: bool = False, chunk: int = 40):
        width = clip.config.vision_config.hidden_size
        done_path = path.with_suffix(".done")
        fresh = not path.exists()
        self.bits = np.memmap(path, np.int16, "w+" if fresh else "r+", shape=(len(corpus), GRID * GRID, width))
        done = 0 if fresh or not done_path.exists() else int(done_path.read_text())
        starts = range(done, len(corpus), chunk)
        with torch.no_grad():
            for start in tqdm(starts, desc="features", disable=quiet):
                rows = np.arange(start, min(start + chunk, len(corpus)))
                penultimate, _ = vision_states(clip, patchify(corpus.images[rows]), last=False)
                self.bits[rows] = penultimate[:, 1:].bfloat16().contiguous().view(torch.int16).numpy()
                done_path.write_text(str(int(rows[-1]) + 1))

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.bits[rows])).view(torch.bfloat16)
