#!/usr/bin/env bash
# The ConsensusDrop page's tables: the ablation of every open choice (validation split), then the claims and the budget
# table (test split), with 95 % intervals, and the plot. Toy model and toy benchmark; about half an hour on two cores.
# Interrupted, it goes on where it stopped. Writes docs/consensusdrop.md, docs/tables/, docs/images/.
# Usage: bash scripts/tables/consensusdrop_ablation.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../ranks.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m eval.tables.consensusdrop ablation "$@"
python -m eval.tables.consensusdrop claims "$@"
