#!/usr/bin/env bash
# All methods on the toy LLaVA-NeXT (640, 320 and 160 tokens of up to 2,928); some hours of one core for all budgets and questions.
# Interrupted, the same command goes on. The runs are spread over the ranks (docs/cluster.md) and kept in results/sweep.
# Writes a table of docs/toy_results.md, and every format of it to results/tables/tables/.
# Usage: bash scripts/tables/embedded_next.sh [--budgets 320] [--limit 300]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" tables/embedded_next --page "$@"
