#!/usr/bin/env bash
# A method of this repository beside the code that a user would run instead, on one machine and the same shapes: two workers
# take turns. The other worker is any command that speaks the lines of lab/bench/peers.py, in an environment of
# its own; without COMMAND it is stock transformers, dense beside `full`. The result is kept in results/bench/peers/NAME.json,
# and the table is that of all results there. About ten minutes at 64 tokens on two cores that nobody else uses, 10 GB of memory.
# Model flags such as --layers belong into COMMAND too: workers of unequal depth are refused. All of stock at once: stock.sh.
# Usage: bash scripts/bench/peers.sh NAME METHOD BUDGET [COMMAND] [further arguments of python -m lab.bench.peers ours]
#   bash scripts/bench/peers.sh dense full 576
#   bash scripts/bench/peers.sh visiondrop visiondrop 64 "/envs/peer/bin/python worker.py" --oracle --set official=true
set -euo pipefail
if [ $# -lt 3 ]; then sed -n '2,9p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit 2; fi
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
name=$1 method=$2 budget=$3
shift 3
theirs="python -m lab.bench.peers stock"
if [ $# -gt 0 ] && [[ $1 != --* ]]; then theirs=$1; shift; fi
ours="python -m lab.bench.peers ours --method $method --budget $budget"
[ $# -gt 0 ] && ours+=$(printf ' %q' "$@")
python -m lab.bench.peers measure --name "$name" --json "results/bench/peers/$name.json" \
  --worker "$ours" --worker "$theirs" --rounds "${ROUNDS:-7}" --threads "${THREADS:-2}"
python -m lab.bench.peers table results/bench/peers/*.json
