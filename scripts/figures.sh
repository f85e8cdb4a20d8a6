#!/usr/bin/env bash
# Draws docs/images/kept_tokens.png, the image in the README, and those of docs/methods.md. The accuracy plot comes from the table script,
# scripts/consensusdrop/claims.sh.
# Usage: bash scripts/figures.sh [--output FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m lab.pages.kept "$@"
