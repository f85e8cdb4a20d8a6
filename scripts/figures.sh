#!/usr/bin/env bash
# Draws docs/images/kept_tokens.png, the picture in the README, and those of docs/methods.md. The accuracy plot comes from the table script,
# scripts/consensusdrop/claims.sh.
# Usage: bash scripts/figures.sh [--questions ID,ID] [--budget B] [--output FILE]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m eval.figures.kept tokens "$@"
[ $# -gt 0 ] || python -m eval.figures.kept tiles
