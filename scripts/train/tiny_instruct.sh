#!/usr/bin/env bash
# Fine-tunes assets/tinyllava on the answer formats of all benchmarks and writes assets/tinyllava_instruct:
# scenes are drawn and put through the frozen tower once, projector, decoder and new words are trained on question-answer
# pairs about them, then the checkpoint is written and its accuracy is printed.
# The shipped model took about 70 minutes on two cores with bfloat16 instructions, 4 GB of disk. Interrupted, the same command goes on.
# Usage: bash scripts/train/tiny_instruct.sh [FOLDER for scenes, features, checkpoints, logs; default runs/instruct] [--quick]
# --quick: a few steps on a few scenes, to see that everything works; writes FOLDER/assets. About two minutes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup runs/instruct "$@"
train instruct
python -m lab.toy.export instruct --folder "$folder" --output "$assets/tinyllava_instruct"
measure tinyllava_instruct --benchmark gqa
