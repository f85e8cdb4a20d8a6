#!/usr/bin/env bash
# Fine-tunes assets/tinyllava into a small LLaVA-NeXT and writes assets/tinyllava_next and assets/eval_next:
# large pictures are drawn and put through the frozen tower once, projector, decoder and newline vector are trained on
# questions about them, then checkpoint, benchmark and report are written.
# About half an hour of one free core (estimated; 44 minutes of training on a busy one), 1 GB of disk. Interrupted, the
# same command goes on.
# Usage: bash scripts/train/tiny_next.sh [FOLDER for features, checkpoints and logs; default runs/next]
set -euo pipefail
folder=${1:-runs/next}
[[ $folder = /* ]] || folder=$PWD/$folder
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
[ -f "$folder/next.pt" ] || python -m tinyllava.train_next --folder "$folder"
python -m tinyllava.export_next --folder "$folder" --output assets/tinyllava_next
python -m tinyllava.benchmark_next --output assets/eval_next
python -m tinyllava.report_next --folder "$folder"
