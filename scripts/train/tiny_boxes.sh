#!/usr/bin/env bash
# Fine-tunes assets/tinyllava_instruct on the boxes of things and writes assets/tinyllava_boxes and assets/eval/refcoco:
# scenes are drawn and put through the frozen tower once, projector, decoder and new words are trained on question-answer
# pairs about them, half of which ask for a box, then checkpoint and benchmark are written, and its accuracy is printed.
# About a quarter of an hour of one free core with bfloat16 instructions (estimated; 50 minutes of training on a busy
# one), 0.3 GB of disk. Interrupted, the same command goes on.
# Usage: bash scripts/train/tiny_boxes.sh [FOLDER for scenes, features, checkpoints, logs; default runs/boxes] [--quick]
# --quick: a few steps on a few scenes, to see that everything works; writes FOLDER/assets. About two minutes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup runs/boxes "$@"
train boxes
[ -n "$quick" ] || python -m lab.toy.benchmarks --output "$assets/eval" --only refcoco
python -m lab.toy.export boxes --folder "$folder" --output "$assets/tinyllava_boxes"
measure tinyllava_boxes --benchmark refcoco --split testA
