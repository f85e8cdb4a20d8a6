#!/usr/bin/env bash
# Fine-tunes assets/tinyllava into a small Video-LLaVA and writes assets/tinyllava_video and assets/eval_video:
# short videos are drawn, encoded, read back and put through the frozen tower once, projector and decoder are trained on
# questions about them, then checkpoint, benchmark and report are written.
# About 45 minutes of one free core (estimated; 70 minutes of training on a busy one), 1 GB of disk. Interrupted, the
# same command goes on.
# Usage: bash scripts/train/tiny_video.sh [FOLDER for features, checkpoints and logs; default runs/video]
set -euo pipefail
folder=${1:-runs/video}
[[ $folder = /* ]] || folder=$PWD/$folder
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
[ -f "$folder/video.pt" ] || python -m tinyllava.train_video --folder "$folder"
python -m tinyllava.export_video --folder "$folder" --output assets/tinyllava_video
python -m tinyllava.benchmark_video --output assets/eval_video
python -m tinyllava.report_video --folder "$folder"
