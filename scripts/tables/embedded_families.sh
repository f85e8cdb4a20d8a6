#!/usr/bin/env bash
# All methods on the toy LLaVA-NeXT (320, 640 and 160 tokens of up to 2,928) or the toy Video-LLaVA (136 and 256 of 2,056).
# Interrupted, the same command goes on. The runs are spread over the ranks (docs/cluster.md); some hours of one core for all budgets and questions.
# Writes tables of docs/methods.md and docs/tables/embedded_*.csv.
# Usage: bash scripts/tables/embedded_families.sh next|video [--budgets 320] [--limit 300]
set -euo pipefail
family=${1:?next or video}
shift
source "$(dirname "${BASH_SOURCE[0]}")/../ranks.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m eval.tables.families "$family" answers "$@"
python -m eval.tables.families "$family" tables "$@"
