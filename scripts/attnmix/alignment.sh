#!/usr/bin/env bash
# AttnMix's premise on the toy model: do word embeddings find their objects, and is their score free of a bias along the token order?
# Writes CSV files and figures to results/findings; with --page docs/images/findings_attnmix.png and docs/tables/findings_{scores,words}.csv instead; about 8 CPU minutes.
# Interrupted, it goes on where it stopped (results/findings).
# Usage: bash scripts/attnmix/alignment.sh [--page] [--images N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m lab.findings.command attnmix "$@"
