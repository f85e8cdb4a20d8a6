#!/usr/bin/env bash
# Trains the embedded model from nothing but this repository and writes assets/tinyllava and assets/eval:
# scenes are drawn, the CLIP towers are trained on them (1,400 steps), their features cached, projector and decoder are
# trained on questions (2,300 steps), then checkpoint, benchmark and report are written.
# About 80 minutes on two cores with bfloat16 instructions, 6 GB of disk. Interrupted, the same command goes on.
# Usage: bash scripts/train/tiny.sh [FOLDER for corpus, features, checkpoints and logs; default runs/tiny]
set -euo pipefail
folder=${1:-runs/tiny}
[[ $folder = /* ]] || folder=$PWD/$folder
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
ranks=$(( $(nproc) >= 2 ? 2 : 1 ))
run() { OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / ranks ))} torchrun --standalone --nproc-per-node "$ranks" -m "$@" --folder "$folder"; }
[ -f "$folder/vision.pt" ] || run tinyllava.train_vision
[ -f "$folder/language.pt" ] || run tinyllava.train_language
python -m tinyllava.export --folder "$folder" --output assets/tinyllava
python -m tinyllava.benchmark --output assets/eval
python -m tinyllava.report --folder "$folder"
