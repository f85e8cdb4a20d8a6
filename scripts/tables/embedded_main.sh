#!/usr/bin/env bash
# All methods at 192, 128, 64 and 32 of 576 visual tokens on the toy GQA test split: accuracy with 95 % intervals, relative
# to full, visual tokens per layer, time to first token, key/value bytes, significance of every difference, and the plot.
# The runs are spread over the ranks (docs/cluster.md); interrupted, the same command goes on. About half an hour on two cores.
# Writes docs/embedded.md, docs/tables/embedded_*, docs/images/embedded_cost.png.
# Usage: bash scripts/tables/embedded_main.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../ranks.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m eval.tables.embedded answers "$@"
python -m eval.tables.embedded tables "$@"
