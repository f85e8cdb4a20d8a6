"""Fine-tune the embedded model into a Video-LLaVA: eight frames of 257 tokens, questions about what happens.

    python -m tinyllava.train_video --folder runs/video

The video tower stays as it is and sees every frame alone; what changes from frame to frame is the decoder's to find.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from eval.config import DEFAULT_MODEL
from tinyllava import ranks
from tinyllava.longer import Trainee, answer_loss, forward, load_embedded
from tinyllava.optimizer import MasterOptimizer
from tinyllava.tracking import start_tracking
from tinyllava.train_language import accuracy
from tinyllava.trainer import train
from tinyllava.video_batches import (
    STATES,
    anywhere,
    questions_about,
    things_first,
    visuals,
    watched,
    whole_video,
)
from tinyllava.video_corpus import PATCHES, VideoCorpus, encode_videos
from tinyllava.video_model import build_video_llava
from tinyllava.video_questions import FAMILIES
from tinyllava.video_vocabulary import ids, prefix_ids
from tinyllava.vocabulary import EOS

SAMPLED = [*FAMILIES, "direction", "mover", "mover", "appear", "appear", "appear", "order", "times", "count"]
# The first part of the steps sees few tokens of many videos, the next whole things of fewer, as in train_next.
FEW_TOKENS, BLIND = 0.62, 0.05  # share of the steps; of the videos in them whose tokens are drawn blindly
WHOLE_RUNS = 0.085  # share of the steps, at the end, that see all tokens
# Which frame a token is from, and what its thing has done, is read off the decoder's states here. Without it nothing
# tells the lower layers to compare frames until a question happens to need it.
PROBE_AT, PROBE_LOSS = 4, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where features, checkpoints and logs go")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the embedded model to start from")
    parser.add_argument("--steps", type=int, default=1160)
    parser.add_argument("--videos", type=int, default=1000, help="training videos")
    parser.add_argument("--batch", type=int, default=12, help="videos per step")
    parser.add_argument("--questions", type=int, default=10, help="questions per video")
    parser.add_argument("--keep", type=int, default=208, help="visual tokens per video in the first part")
    parser.add_argument("--keep-later", type=int, default=640, help="visual tokens per video after it")
    args = parser.parse_args()
    torch.manual_seed(0)
    llava = build_video_llava(load_embedded(args.model))
    encode_videos(args.folder / "val", "val", 100, llava.model.video_tower)
    encode_videos(args.folder / "train", "train", args.videos, llava.model.video_tower)
    corpus, val = VideoCorpus(args.folder / "train", "train", args.videos), VideoCorpus(args.folder / "val", "val")
    trainee = Trainee(llava, newline=False, probe=1 + len(STATES))
    optimizer = MasterOptimizer(trainee, lambda name: ".layers." in name, 2e-3, 1e-3, clip=1.0, dtype=torch.float32)
    end = ids()[EOS]
    rarely = torch.tensor([0.4 if state == "still" else 1.0 for state in STATES])  # most things do nothing

    def choose(row: int, few: bool, rng: np.random.Generator) -> np.ndarray:
        if not few:
            return things_first(corpus, row, args.keep_later, rng, enough=PATCHES)
        return anywhere(args.keep, rng) if rng.random() < BLIND else things_first(corpus, row, args.keep, rng)

    def loss_of(step: int, rng: np.random.Generator):
        few, whole = step < FEW_TOKENS * args.steps, step >= (1 - WHOLE_RUNS) * args.steps
        batch = args.batch if few else 2 if whole else args.batch // 3
        count = args.questions if few else args.questions + 4
        rows = np.sort(rng.choice(len(corpus), batch, replace=False))
        families = [[SAMPLED[k] for k in rng.integers(0, len(SAMPLED), count)] for _ in rows]
        questions = questions_about(corpus, rows, families, rng)
        renumber = not whole and rng.random() < 0.15
        seen = visuals(corpus, rows, [whole_video() if whole else choose(row, few, rng) for row in rows])
        logits, read = forward(trainee, prefix_ids(), seen, questions, renumber, PROBE_AT)
        frame, states = watched(corpus, rows, seen)
        frame_error = (read[..., 0] - frame).square().mean()
        state_loss = F.cross_entropy(read[..., 1:].flatten(0, 1), states.flatten(), rarely)
        numbers = {**accuracy(logits, questions, FAMILIES), "frame": frame_error.item(), "state": state_loss.item()}
        return answer_loss(logits, questions.answer, end) + PROBE_LOSS * (frame_error + state_loss), numbers

    @torch.no_grad()
    def evaluate(videos: int = 16) -> dict[str, float]:
        rng, parts = np.random.default_rng(5), []
        for start in range(0, videos, 4):
            rows = np.arange(start, start + 4)
            questions = questions_about(val, rows, [list(FAMILIES)] * 4, rng)
            seen = visuals(val, rows, [whole_video()] * 4)
            parts.append(accuracy(forward(trainee, prefix_ids(), seen, questions)[0], questions, FAMILIES))
        return {name: float(np.nanmean([part.get(name, np.nan) for part in parts])) for name in ["all", *FAMILIES]}

    tracker = start_tracking("video", args.folder, vars(args)) if ranks.RANK == 0 else None
    train("video", args.folder, optimizer, args.steps, loss_of, evaluate, 200, 25, decay=0.4, tracker=tracker)
    torch.save(optimizer.masters, args.folder / "video.pt")
    print({name: round(value, 4) for name, value in evaluate(40).items()})


if __name__ == "__main__":
    main()
