#!/usr/bin/env bash
# Time to first token, KV cache, operations and peak memory of a method beside `full`, in one process.
# Usage: bash scripts/bench/latency.sh METHOD BUDGET [further arguments of python -m eval.efficiency.latency]
#   bash scripts/bench/latency.sh consensusdrop 64
#   bash scripts/bench/latency.sh consensusdrop 64 --shape llava-1.5-7b --dtype bfloat16
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,5p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit 2; fi
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
method=$1 budget=$2
shift 2
exec python -m eval.efficiency.latency --method "$method" --budget "$budget" "$@"
