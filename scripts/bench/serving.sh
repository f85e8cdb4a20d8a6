#!/usr/bin/env bash
# vLLM under load: requests per second, times to the first token, cache and memory with methods at a budget and with `full`, at 1, 8, 32
# and 64 requests in flight; with caches, long answers, and EVS on videos (docs/models/serving.md). The toy model, then 7B shapes:
# four decoder layers on a CPU (hours of two idle cores, 26 GB of memory), the full depth where there is nvidia-smi.
# Interrupted, it goes on where it was: every turn is kept in results/bench/serving-NAME-BUDGET.jsonl (delete it to start anew).
# Usage: bash scripts/bench/serving.sh [BUDGET, default 64] [further arguments of python -m lab.bench.serving]
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,6p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-6} # GiB of each of two engines: 64 requests of `full` in four layers
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # the client's threads leave the processor to the engine while they wait
source "$(dirname "${BASH_SOURCE[0]}")/../serve_setup.sh"
budget=${1:-64}
[ $# -gt 0 ] && shift
size=(--layers 4 --blocks 3) long=(--at-once 8 --new-tokens 128) many=1
if [ "$build" = vllm ]; then
  size=(--layers 32 --blocks 24 --dtype bfloat16 --per-slot 8) long=(--at-once 8,64 --new-tokens 256) many=3
elif grep -q avx512_bf16 /proc/cpuinfo; then
  size+=(--dtype bfloat16) many=3
fi
measure() { # NAME ARGUMENTS
  local out=results/bench/serving-$1-$budget
  shift
  "$serving" -m lab.bench.serving --budget "$budget" --measurements "$out.jsonl" --json "$out.json" --markdown "$out.md" "$@"
}
measure toy "$@"
measure memory --at-once 8 --per-slot 63 --repeats 1 "$@" # memory at the 100th and the 504th request
measure llava-1.5-7b --shape llava-1.5-7b "${size[@]}" --at-once 1,8 "$@"
measure llava-1.5-7b-many --shape llava-1.5-7b "${size[@]}" --at-once 32,64 --repeats $many "$@" # float32 takes an hour for a round
measure llava-1.5-7b-caches --shape llava-1.5-7b "${size[@]}" --at-once 8 --caches on "$@"
measure llava-1.5-7b-answers --shape llava-1.5-7b "${size[@]}" "${long[@]}" "$@"
VLLM_CPU_KVCACHE_SPACE=2 measure qwen2.5-vl-7b-evs --shape qwen2.5-vl-7b --videos 0.5 "${size[@]}" --at-once 1,8 "$@"
