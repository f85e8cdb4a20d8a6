"""Training videos on disk as what the decoder is trained on: features of eight frames, and what the frames show.

The eight frames are read back from the encoded file, so that training sees what a reader of the file sees.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from llava.processing.video import frame_indices, read_video
from tinyllava.corpus import memory_map
from tinyllava.coverage import patch_owners
from tinyllava.scenes import PATCH
from tinyllava.video_file import encode_video
from tinyllava.video_scenes import SEEN, SIDE, Plan, draw_video, plan_video
from tinyllava.vision import patchify, vision_states

PATCHES = (SIDE // PATCH) ** 2
FRAME_TOKENS = PATCHES + 1  # CLS in front of a frame's patches, as in Video-LLaVA
RUN = SEEN * FRAME_TOKENS


def encode_frames(frames: np.ndarray, tower: torch.nn.Module) -> torch.Tensor:
    """[F, 128, 128, 3] uint8 -> [F, 257, D] penultimate features, CLS first."""
    with torch.inference_mode():
        patches = patchify(frames).to(next(tower.parameters()).dtype)
        return vision_states(SimpleNamespace(vision_model=tower), patches, last=False)[0]


def encode_videos(folder: Path, split: str, size: int, tower: torch.nn.Module) -> None:
    """Draw, write, read back and encode the first `size` videos of a split; an interrupted call goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    features = memory_map(folder / "features.npy", (size, SEEN, FRAME_TOKENS, tower.config.hidden_size), np.int16)
    owners = memory_map(folder / "owners.npy", (size, SEEN, PATCHES), np.int8)
    done = memory_map(folder / "done.npy", (size,), np.uint8)  # as long as the rest: made anew with it
    for row in tqdm(range(int(done.sum()), size), desc=f"videos {split}", initial=int(done.sum()), total=size):
        plan = plan_video(split, row)
        video, owner = draw_video(plan)
        path = folder / "one.mp4"
        path.write_bytes(encode_video(video))
        frames = np.stack([np.asarray(frame) for frame in read_video(path, SEEN).frames])
        states = encode_frames(frames, tower)
        features[row] = states.bfloat16().contiguous().view(torch.int16).numpy()
        owners[row] = patch_owners(owner[frame_indices(plan.frames, SEEN)])
        done[row] = 1


class VideoCorpus:
    """Encoded videos.

    Attributes:
        split: the plans of its videos follow from it.
        features: [n, 8, 257, D] int16, the bits of bfloat16 features, CLS first.
        owners: [n, 8, 256] int8, number of the actor that covers a patch, -1 for background.
    """

    def __init__(self, folder: Path, split: str, limit: int | None = None):
        self.split = split
        self.features, self.owners = (
            np.load(folder / f"{name}.npy", mmap_mode="r")[:limit] for name in ("features", "owners")
        )

    def __len__(self) -> int:
        return len(self.features)

    def plan(self, row: int) -> Plan:
        return plan_video(self.split, row)
