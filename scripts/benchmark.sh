#!/usr/bin/env bash
# What the scripts in scripts/eval/ have in common: set up, then ask one method the questions of one benchmark.
#   bash scripts/benchmark.sh BENCHMARK METHOD [BUDGET] [further arguments of python -m eval]
# Each of the three may be a list such as gqa,pope; every combination is a run of its own, on one loaded model.
# From the environment: MODEL and DATA, the checkpoint and the data folder; GPUS, RANKS or HOSTFILE, the accelerators, one
# rank each (none: all of this machine, or of the Slurm job); TP, over how many ranks a model is split; ENGINE=vllm decodes
# by vLLM in an environment of its own (scripts/serve_setup.sh).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=${1:?name of a benchmark}
shift

case ${1:-} in
"" | -h | --help)
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$root/scripts/eval/${name%%,*}.sh" >&2
  [[ -n ${1:-} ]] && exit 0
  exit 2
  ;;
esac

arguments=(--benchmark "$name" --method="$1")
shift
if [[ $# -gt 0 && $1 != --* ]]; then
  arguments+=(--budget="$1")
  shift
fi
arguments+=(${MODEL:+--model="$MODEL"} ${DATA:+--data="$DATA"} ${TP:+--tensor-parallel="$TP"} ${ENGINE:+--engine="$ENGINE"} "$@")

here=$PWD
if [ "${ENGINE:-}" = vllm ]; then
  source "$root/scripts/serve_setup.sh"
  PATH=${serving%/*}:$PATH
else
  source "$root/scripts/setup.sh"
fi
cd "$here" # setup.sh goes to the repository; relative paths above were typed here
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m eval "${arguments[@]}"
