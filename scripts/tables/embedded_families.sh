#!/usr/bin/env bash
# All methods on the embedded LLaVA-NeXT (640, 320, 160 tokens of up to 2,928) and the embedded Video-LLaVA (256, 136 of 2,056).
# Interrupted, the same command goes on. About an hour on two cores. Writes tables of docs/models.md and docs/tables/embedded_*.csv.
# Usage: bash scripts/tables/embedded_families.sh [next|video]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for family in ${1:-next video}; do
  python -m eval.tables.families "$family" answers
  python -m eval.tables.families "$family" tables
done
