#!/usr/bin/env bash
# The field of 2026 on the toy LLaVA-1.5 (192, 128 and 64 of 576 tokens, 600 questions of GQA); about an hour of one core.
# Interrupted, the same command goes on. The runs are spread over the ranks (docs/cluster.md) and kept in results/sweep.
# Writes a table of docs/toy_results.md, and every format of it to results/tables/tables/.
# Usage: bash scripts/tables/embedded_field.sh [--budgets 64] [--limit 300]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" tables/embedded_field --page "$@"
