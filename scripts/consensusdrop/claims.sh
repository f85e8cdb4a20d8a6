#!/usr/bin/env bash
# The claims of ConsensusDrop's abstract, tested on the toy model, and its budgets beside controls. The runs are spread over the ranks
# (docs/cluster.md) and kept in results/sweep. Writes docs/consensusdrop.md, docs/tables/consensusdrop_*, docs/images/accuracy.png.
# Usage: bash scripts/consensusdrop/claims.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../ranks.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m eval.tables.consensusdrop "$@"
