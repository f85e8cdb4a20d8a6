#!/usr/bin/env bash
# Coverage of intervals and errors of tests in simulated answer files: the tables of docs/statistics.md. About fifteen minutes of one core.
# Usage: bash scripts/bench/coverage.sh [TRIALS]
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,3p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export OMP_NUM_THREADS=1
for table in intervals differences averages gains shares gain_shares; do
  printf '\n%s\n\n' "$table"
  python -m tests.simulated_errors "$table" "$@"
done
