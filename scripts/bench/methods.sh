#!/usr/bin/env bash
# Every method beside `full` on LLaVA-1.5-7B shapes (random weights, full depth), in turns in one process: time to first token,
# selection and merging, operations by the formula. About a quarter of an hour on two cores, 10 GB of memory.
# Interrupted, it goes on where it was: every prefill is kept in results/bench/methods-BUDGET.jsonl (delete it to start anew).
# Usage: bash scripts/bench/methods.sh [BUDGET, default 64] [further arguments of python -m eval.efficiency.latency]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
budget=${1:-64}
[ $# -gt 0 ] && shift
exec python -m eval.efficiency.latency --method all --budget "$budget" --shape llava-1.5-7b --dtype bfloat16 --repeats 3 \
  --lengths 0 --no-oracle --no-counts --measurements "results/bench/methods-$budget.jsonl" "$@"
