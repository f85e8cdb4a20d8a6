#!/usr/bin/env bash
# What of each benchmark's data lies in a folder: complete, incomplete (which file, where to get it, licence) or absent.
# Usage: bash scripts/data/check.sh DATA [BENCHMARK ...] [--json OUT]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$PWD
source "$root/scripts/setup.sh"
cd "$here" # relative paths were typed here
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m eval.cli check-data "$@"
