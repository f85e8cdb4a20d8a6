#!/usr/bin/env bash
# Fine-tunes assets/tinyllava into a small LLaVA-NeXT and writes assets/tinyllava_next and assets/eval_next:
# large images are drawn and put through the frozen tower once, projector, decoder and newline vector are trained on
# questions about them, then checkpoint and benchmark are written, and its accuracy is printed.
# About half an hour of one free core (estimated; 44 minutes of training on a busy one), 1 GB of disk. Interrupted, the
# same command goes on.
# Usage: bash scripts/train/tiny_next.sh [FOLDER for features, checkpoints and logs; default runs/next] [--quick]
# --quick: a few steps on a few images, to see that everything works; writes FOLDER/assets. About two minutes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup runs/next "$@"
train next
[ -n "$quick" ] || python -m lab.toy.benchmarks --output "$assets/eval_next" --only large_gqa
python -m lab.toy.export next --folder "$folder" --output "$assets/tinyllava_next"
measure tinyllava_next --benchmark gqa --data assets/eval_next
