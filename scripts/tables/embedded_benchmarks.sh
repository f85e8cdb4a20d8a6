#!/usr/bin/env bash
# The embedded models on every embedded benchmark, with all visual tokens and with ConsensusDrop at 64 (videos: 136 of 2,056).
# Interrupted, the same command goes on. Writes the table of scores in docs/evaluation.md and docs/tables/embedded_benchmarks.csv.
# Usage: bash scripts/tables/embedded_benchmarks.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -c 'from eval import benchmarks; print(*benchmarks.names(), sep="\n")' | while read -r name; do
  budget=64
  data=assets/eval
  case $name in
  video_qa) budget=136 data=assets/eval_video ;;
  *_qa) budget=136 ;;
  esac
  for method in full consensusdrop; do
    echo "== $name, $method" >&2
    python -m eval --benchmark "$name" --data "$data" --method "$method" $([ $method = full ] || echo "--budget $budget") \
      --output "results/benchmarks/$name/$method" --wandb disabled "$@" </dev/null
  done
done
python -m eval.tables.benchmarks scores
