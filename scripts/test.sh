#!/usr/bin/env bash
# Style (ruff), types (mypy) and tests (pytest).
# Usage: bash scripts/test.sh [--all] [pytest arguments]
#   without arguments   the fast set: all but the tests with a mark (pyproject.toml says what the marks mean)
#   --all               every test; what continuous integration runs
#   pytest arguments    the tests that they choose, with or without a mark, in one process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
marked='process or table or java or training or browser or slow or lab'
case "${1:-}" in
  '') set -- -n 2 --dist worksteal -m "not ($marked)" ;;
  --all) shift; [ $# -gt 0 ] || set -- -n 2 --dist worksteal ;;
esac
TIMEFORMAT='%0R seconds on the clock; CPU: %0U seconds of the programs, %0S of the system.'
time {
  ruff check .
  ruff format --check .
  mypy
  python -m pytest "$@"
}
