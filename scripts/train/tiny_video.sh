#!/usr/bin/env bash
# Fine-tunes assets/tinyllava into a small Video-LLaVA and writes assets/tinyllava_video and assets/eval_video:
# short videos are drawn, encoded, read back and put through the frozen tower once, projector and decoder are trained on
# questions about them, then checkpoint and benchmark are written, and its accuracy is printed.
# About 45 minutes of one free core (estimated; 70 minutes of training on a busy one), 1 GB of disk. Interrupted, the
# same command goes on.
# Usage: bash scripts/train/tiny_video.sh [FOLDER for features, checkpoints and logs; default runs/video] [--quick]
# --quick: a few steps on a few videos, to see that everything works; writes FOLDER/assets. About two minutes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup runs/video "$@"
train video
[ -n "$quick" ] || python -m lab.toy.benchmarks --output "$assets/eval_video" --only video_qa
python -m lab.toy.export video --folder "$folder" --output "$assets/tinyllava_video"
measure tinyllava_video --benchmark video_qa --data assets/eval_video
