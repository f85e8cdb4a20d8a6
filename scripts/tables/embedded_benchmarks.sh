#!/usr/bin/env bash
# The toy models on every toy benchmark, with all visual tokens and with ConsensusDrop at 64 (videos: 136 of 2,056).
# Interrupted, the same command goes on. About a quarter of an hour on two cores. Writes the table of scores in docs/toy_results.md and docs/tables/embedded_benchmarks.csv.
# Usage: bash scripts/tables/embedded_benchmarks.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -c 'from lab.pages.benchmarks import reported; print(*(b.name for b in reported()), sep="\n")' | while read -r name; do
  case $name in
  *_qa) budget=136 ;;
  *) budget=64 ;;
  esac
  for method in full consensusdrop; do
    echo "== $name, $method" >&2
    python -m eval --benchmark "$name" --method "$method" $([ $method = full ] || echo "--budget $budget") \
      --output "results/benchmarks/$name/$method" "$@" </dev/null
  done
done
python -m lab.pages.benchmarks scores
