#!/usr/bin/env bash
# Saves a W&B report: accuracy against tokens and TTFT, percent of full by method, tables and kept tokens (docs/evaluation.md).
# Needs `wandb login` or WANDB_API_KEY; --dry-run prints what would be sent.
# Usage: bash scripts/wandb/report.sh ENTITY/PROJECT [--table NAME] [--update URL] [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m eval.cli wandb report "$@"
