#!/usr/bin/env bash
# Style (ruff), types (mypy) and tests (pytest).
# Usage: bash scripts/test.sh [--slow] [pytest arguments]
#   --slow   also the tests that take more than a minute each
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
which='not slow'
if [ "${1:-}" = --slow ]; then which='slow or not slow'; shift; fi
ruff check .
ruff format --check .
mypy
# The whole suite runs in two processes of one thread each; named files and tests run in this one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ $# -gt 0 ] || set -- -n 2
python -m pytest -m "$which" "$@"
