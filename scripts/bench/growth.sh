#!/usr/bin/env bash
# How time to first token, selection and memory grow with visual tokens (256 to 11,520), fitted and drawn.
# About a quarter of an hour on two cores.
# Usage: bash scripts/bench/growth.sh [further arguments of python -m lab.bench.growth]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
exec python -m lab.bench.growth --json results/bench/growth.json --markdown results/bench/growth.md \
  --plot results/bench/growth.png "$@"
