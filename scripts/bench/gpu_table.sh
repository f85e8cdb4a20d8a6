#!/usr/bin/env bash
# The whole GPU table: LLaVA-1.5-7B at 192, 128 and 64 of 576 tokens and LLaVA-NeXT-7B at 640, 320 and 160 of 2,880, random
# weights at full depth, bfloat16, batches of 1, 8 and 32, every method beside `full` and its oracle. Interrupted, it goes on where
# it was. Writes one JSON, page and plot for each budget and results/bench/gpu/README.md with all pages.
# Usage: bash scripts/bench/gpu_table.sh [further arguments of python -m eval.efficiency.latency]
# From the environment: METHODS (all), OUT (results/bench/gpu), CELLS ("llava-next-7b:320 llava-next-7b:160").
#   METHODS=consensusdrop,visiondrop bash scripts/bench/gpu_table.sh --device cuda
#   METHODS=fastervlm CELLS=llava-1.5-7b:64 OUT=results/try bash scripts/bench/gpu_table.sh --layers 1 --repeats 1 --lengths 0 --batch-size 1
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,9p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
out=${OUT:-results/bench/gpu}
mkdir -p "$out"
cells=${CELLS:-llava-1.5-7b:192 llava-1.5-7b:128 llava-1.5-7b:64 llava-next-7b:640 llava-next-7b:320 llava-next-7b:160}
for cell in $cells; do
  shape=${cell%:*} budget=${cell#*:}
  name=$out/$shape-$budget
  [ -f "$name.json" ] && continue
  python -m eval.efficiency.latency --method "${METHODS:-all}" --budget "$budget" --shape "$shape" --distinct 32 --dtype bfloat16 \
    --batch-size 1,8,32 --measurements "$name.jsonl" --json "$name.part" --markdown "$name.md" --plot "$name.png" "$@"
  mv "$name.part" "$name.json" # the mark of a finished cell
done
for cell in $cells; do
  printf '## %s at %s tokens\n\n' "${cell%:*}" "${cell#*:}"
  cat "$out/${cell%:*}-${cell#*:}.md"
  printf '\n'
done > "$out/README.md"
echo "The table is in $out/README.md."
