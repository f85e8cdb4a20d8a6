#!/usr/bin/env bash
# The claims of ConsensusDrop's abstract, tested on the toy model, and its budgets beside controls.
# Interrupted, the same command goes on. The runs are spread over the ranks (docs/cluster.md) and kept in results/sweep.
# Writes docs/consensusdrop.md, docs/images/accuracy.png and every format of the table to results/tables/consensusdrop/claims.
# Usage: bash scripts/consensusdrop/claims.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$root/results/tables/consensusdrop/claims
bash "$root/scripts/table.sh" consensusdrop/claims --page --output "$out" "$@"
cp "$out/claims.png" "$root/docs/images/accuracy.png"
