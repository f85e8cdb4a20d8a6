#!/usr/bin/env bash
# All methods at 192, 128, 64 and 32 of 576 visual tokens on the toy GQA test split: accuracy with 95 % intervals, visual tokens per layer, time to first token,
# key/value bytes, operations, significance of every difference, and the plot. About two hours on two cores.
# Interrupted, the same command goes on. The runs are spread over the ranks (docs/cluster.md) and kept in results/sweep.
# Writes docs/toy_results.md, docs/tables/embedded_*, docs/images/embedded_cost.png and every format of the table to results/tables/tables/embedded_main.
# Usage: bash scripts/tables/embedded_main.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$root/results/tables/tables/embedded_main
bash "$root/scripts/table.sh" tables/embedded_main --page --output "$out" "$@"
cp "$out/embedded_main.csv" "$out/embedded_main.tex" "$root/docs/tables/"
cp "$out/embedded_main_pairs.csv" "$root/docs/tables/embedded_pairs.csv"
cp "$out/embedded_main.png" "$root/docs/images/embedded_cost.png"
