"""Training videos on disk: the features of eight frames, and what the frames show.

The eight frames are read back from the encoded file, so that training sees what a reader of the file sees.
"""

from pathlib import Path

import numpy as np
import torch

from llava.processing.video import frame_indices, read_video
from toy.data.corpus import feature_bits, patch_owners, tower_states, write_rows
from toy.data.scenes import PATCH
from toy.data.video_scenes import SEEN, SIDE, Plan, draw_video, encode_video, plan_video

PATCHES = (SIDE // PATCH) ** 2
FRAME_TOKENS = PATCHES + 1  # CLS before the patches of a frame, as in Video-LLaVA
RUN = SEEN * FRAME_TOKENS


def encode_videos(folder: Path, split: str, size: int, tower: torch.nn.Module) -> None:
    """Draw, write, read back and encode the first `size` videos of a split."""

    def draw(row: int) -> dict[str, np.ndarray]:
        plan = plan_video(split, row)
        video, owners = draw_video(plan)
        path = folder / "one.mp4"
        path.write_bytes(encode_video(video))
        frames = np.stack([np.asarray(frame) for frame in read_video(path, SEEN).frames])
        shown = owners[frame_indices(plan.frames, SEEN)]
        return {"features": feature_bits(tower_states(tower, frames)), "owners": patch_owners(shown)}

    arrays = {
        "features": (np.int16, (SEEN, FRAME_TOKENS, tower.config.hidden_size)),
        "owners": (np.int8, (SEEN, PATCHES)),
    }
    write_rows(folder, size, arrays, draw, f"videos {split}")


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
        """What happens in one video."""
        return plan_video(self.split, row)
