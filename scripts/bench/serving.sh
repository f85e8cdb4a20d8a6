#!/usr/bin/env bash
# vLLM under a method: requests per second, time to first token and KV blocks at a budget and of full, at 1, 8 and 32 requests at once,
# beside this package's decoder; the toy model, then two decoder layers of LLaVA-1.5-7B's shapes (docs/models/serving.md).
# About 25 minutes of two idle cores, 12 GB of memory. Interrupted, it goes on where it was: every turn is kept in
# results/bench/serving-MODEL-BUDGET.jsonl (delete it to start anew).
# Usage: bash scripts/bench/serving.sh [BUDGET, default 64] [further arguments of python -m lab.bench.serving]
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,6p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB of each of three engines
source "$(dirname "${BASH_SOURCE[0]}")/../serve_setup.sh"
budget=${1:-64}
[ $# -gt 0 ] && shift
measure() { # NAME ARGUMENTS
  local out=results/bench/serving-$1-$budget
  shift
  "$serving" -m lab.bench.serving --budget "$budget" --measurements "$out.jsonl" --json "$out.json" --markdown "$out.md" "$@"
}
measure toy "$@"
measure llava-1.5-7b --shape llava-1.5-7b --dtype bfloat16 "$@"
