#!/usr/bin/env bash
# One factor at a time around the defaults of VisionDrop and AttnMix, and their budgets with controls, with 95 % intervals; toy
# model and toy benchmark. ConsensusDrop's page has a script of its own, consensusdrop_ablation.sh. About a quarter of an hour on two cores.
# Interrupted, it goes on where it stopped. Writes docs/visiondrop.md, docs/attnmix.md, docs/tables/.
# Usage: bash scripts/tables/ablations.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../ranks.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
for method in visiondrop attnmix; do
  python -m eval.tables.papers "$method" "$@"
done
