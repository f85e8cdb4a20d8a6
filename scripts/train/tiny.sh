#!/usr/bin/env bash
# Trains the toy model from nothing but this repository and writes assets/tinyllava and assets/eval/gqa:
# scenes are drawn, the CLIP towers are trained on them (1,400 steps), their features cached, projector and decoder are
# trained on questions (2,300 steps), then checkpoint and benchmark are written, and its accuracy is printed.
# The shipped model took about 80 minutes on two cores with bfloat16 instructions, 6 GB of disk. Interrupted, the same command goes on.
# Usage: bash scripts/train/tiny.sh [FOLDER for corpus, features, checkpoints and logs; default runs/tiny] [--quick]
# --quick: a few steps on a few scenes, to see that everything works; writes FOLDER/assets. About two minutes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup runs/tiny "$@"
train vision
train language
[ -n "$quick" ] || python -m lab.toy.benchmarks --output "$assets/eval" --only gqa
python -m lab.toy.export language --folder "$folder" --output "$assets/tinyllava"
measure tinyllava --benchmark gqa
