#!/usr/bin/env bash
# ConsensusDrop's premise on the toy model: how broad and how alike the two scores are, where fusing them gains, and with how bad a probe, by noise or by another layer.
# Writes CSV files and figures to results/findings; with --page docs/images/findings_{fusion_gain,probe_quality}.png and docs/tables/findings_{scores,fusion_gain,probe_quality,probe_layers}.csv instead;
# about 16 CPU minutes beside the scores of scripts/attnmix/alignment.sh. Interrupted, it goes on where it stopped (results/findings).
# Usage: bash scripts/consensusdrop/fusion_gain.sh [--page] [--images N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m lab.findings.command consensusdrop "$@"
