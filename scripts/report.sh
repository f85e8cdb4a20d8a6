#!/usr/bin/env bash
# Writes report.html: every result below results/ in a sortable table, with interactive plots and filters. It needs no server and no network.
# Usage: bash scripts/report.sh [FOLDER] [--output FILE]
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here" # paths are relative to the caller's folder
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python -m eval.cli report "$@"
