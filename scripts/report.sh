#!/usr/bin/env bash
# Writes report.html: every result below results/ in a sortable table, with interactive plots and filters. It needs no server and no network.
# Usage: bash scripts/report.sh [FOLDER] [--output FILE]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m eval.pages.report "$@"
