#!/usr/bin/env bash
# What the scripts of scripts/<paper>/ have in common: set up, then make a table of eval/papers/specs/.
#   bash scripts/table.sh PAPER/NAME [arguments of vtr tables paper]
# From the environment: MODEL and DATA, the checkpoint and the data folder (none: toy model and toy data; DATA alone: the paper's
# checkpoint, downloaded by its id); GPUS, RANKS, HOSTFILE or a Slurm job: over what the cells are spread.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=${1:?PAPER/NAME, such as consensusdrop/llava15_7b}
shift
source "$root/scripts/ranks.sh"
here=$PWD
source "$root/scripts/setup.sh"
cd "$here" # setup.sh goes to the repository; relative paths were typed here
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m eval.papers.table "$name" ${MODEL:+--model="$MODEL"} ${DATA:+--data="$DATA"} "$@"
