#!/usr/bin/env bash
# Starts a web page on this machine: drop an image, ask, choose a method and a budget, and see answer, kept tokens and time beside `full`.
# Usage: bash scripts/demo.sh [--model MODEL] [--port 7860] [further arguments of vtr demo]
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here" # paths are relative to the caller's folder
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python -m eval.cli demo ${MODEL:+--model "$MODEL"} "$@"
