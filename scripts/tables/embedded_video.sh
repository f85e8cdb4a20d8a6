#!/usr/bin/env bash
# All methods on the toy Video-LLaVA (256 and 136 tokens of 2,056); some hours of one core for all budgets and questions.
# Interrupted, the same command goes on. The runs are spread over the ranks (docs/cluster.md) and kept in results/sweep.
# Writes a table of docs/toy_results.md, and every format of it to results/tables/tables/.
# Usage: bash scripts/tables/embedded_video.sh [--budgets 136] [--limit 300]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" tables/embedded_video --page "$@"
