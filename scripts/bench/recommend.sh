#!/usr/bin/env bash
# How often vtr recommend finds what a full sweep finds, and how often it errs: the tables of docs/statistics.md.
# The sweep asks 45,000 questions of the toy model, a quarter of an hour on two busy cores; the draws take four minutes.
# Usage: bash scripts/bench/recommend.sh [LIMIT]    LIMIT: questions of the sweep, for a shorter one
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,4p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export OMP_NUM_THREADS=1
methods=consensusdrop,visiondrop,attnmix,divprune
python -m eval --benchmark gqa --method "full,$methods" --budget 64,128,192,288 --wandb disabled ${1:+--limit "$1"}
runs=results/gqa-testdev/tinyllava
python -m lab.bench.recommend sweep $runs/{full-576,{consensusdrop,visiondrop,attnmix,divprune}-{64,128,192,288}}${1:+/limit$1}
printf '\n'
python -m lab.bench.recommend tables
