#!/usr/bin/env bash
# Uploads the offline W&B runs below a folder, all parts of continued runs together; skips those that are uploaded, still running, or replaced by
# --restart. Needs `wandb login` or WANDB_API_KEY. Results are only read.
# Usage: bash scripts/wandb/sync.sh [FOLDER=results] [--dry-run]
set -euo pipefail
[ $# -eq 0 ] || [[ $1 == -* ]] || [[ $1 == /* ]] || set -- "$PWD/$1" "${@:2}"
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m eval.tracking.sync "$@"
