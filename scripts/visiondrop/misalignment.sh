#!/usr/bin/env bash
# VisionDrop's premise on the toy model: the spatial, causal and semantic misalignment of text-guided attention, by decoder layer.
# Writes CSV files and figures to results/findings; with --page docs/images/findings_visiondrop.png and docs/tables/findings_{scores,visiondrop_differences}.csv instead; about 8 CPU minutes,
# most of which it shares with scripts/attnmix/alignment.sh. Interrupted, it goes on where it stopped (results/findings).
# Usage: bash scripts/visiondrop/misalignment.sh [--page] [--images N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m lab.findings.command visiondrop "$@"
