#!/usr/bin/env bash
# The efficiency protocol: seconds of vision, selection, merging and prefill, time to first token, decoding, whole answers,
# memory, KV cache, operations and accuracy of a method beside `full` and its oracle, in one process (docs/efficiency.md).
# Usage: bash scripts/bench/latency.sh METHOD BUDGET [further arguments of python -m eval.efficiency.latency]
#        bash scripts/bench/latency.sh --all BUDGET [...]      every method that runs at this budget
#   bash scripts/bench/latency.sh consensusdrop 64 --gate 100
#   bash scripts/bench/latency.sh consensusdrop 64 --scenario offline
#   bash scripts/bench/latency.sh --all 320 --shape llava-next-7b --dtype bfloat16 --batch-size 1,8,32
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,9p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit 2; fi
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
method=$1 budget=$2
[ "$method" = --all ] && method=all
shift 2
exec python -m eval.efficiency.latency --method "$method" --budget "$budget" "$@"
