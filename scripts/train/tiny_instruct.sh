#!/usr/bin/env bash
# Fine-tunes assets/tinyllava on the answer formats of all benchmarks and writes assets/tinyllava_instruct:
# scenes are drawn and put through the frozen tower once, projector, decoder and new words are trained on exchanges about
# them, then checkpoint and report are written.
# About 70 minutes on two cores with bfloat16 instructions, 4 GB of disk. Interrupted, the same command goes on.
# Usage: bash scripts/train/tiny_instruct.sh [FOLDER for scenes, features, checkpoints and logs; default runs/instruct]
set -euo pipefail
folder=${1:-runs/instruct}
[[ $folder = /* ]] || folder=$PWD/$folder
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
ranks=$(( $(nproc) >= 2 ? 2 : 1 ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / ranks ))}
[ -f "$folder/instruct.pt" ] ||
    torchrun --standalone --nproc-per-node "$ranks" -m tinyllava.train_instruct --folder "$folder"
python -m tinyllava.export_instruct --folder "$folder" --output assets/tinyllava_instruct
python -m tinyllava.report_instruct --folder "$folder"
