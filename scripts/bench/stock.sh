#!/usr/bin/env bash
# Stock transformers beside this repository, on random weights of one shape: `generate` as a user runs it (SDPA), the same with
# output_attentions=True (eager), which a user needs to score visual tokens by the text, our full model, and our methods that
# score by attention in the decoder. Two workers take turns, so they need the memory of two models. Kept in
# results/bench/peers/stock.json; prints two tables, ratios to the first and to the second of METHODS.
# Usage: bash scripts/bench/stock.sh [--layers N] [further arguments of both workers: --shape, --distinct, --dtype]
# From the environment: METHODS, BUDGET (64), ROUNDS (7), THREADS (2).
#   bash scripts/bench/stock.sh --layers 8
#   METHODS=full,consensusdrop ROUNDS=1 bash scripts/bench/stock.sh --layers 1
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,9p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
methods=${METHODS:-full,consensusdrop,visiondrop,fastv,pyramiddrop,sparsevlm}
result=results/bench/peers/stock.json
ours="python -m lab.bench.peers ours --method $methods --budget ${BUDGET:-64}"
for method in fastv pyramiddrop sparsevlm; do # with few decoder layers a mean of 64 is out of their reach
  case ",$methods," in *",$method,"*) ours+=" --set $method.schedule=kept" ;; esac
done
theirs="python -m lab.bench.peers stock --attentions"
if [ $# -gt 0 ]; then ours+=$(printf ' %q' "$@") theirs+=$(printf ' %q' "$@"); fi
python -m lab.bench.peers measure --name stock --json "$result" \
  --worker "$ours" --worker "$theirs" --rounds "${ROUNDS:-7}" --threads "${THREADS:-2}"
case "$methods" in *,*) second=${methods#*,} && python -m lab.bench.peers table "$result" --beside "${second%%,*}" ;; esac
