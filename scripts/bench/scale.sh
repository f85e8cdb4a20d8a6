#!/usr/bin/env bash
# What several ranks cost and gain on this machine: start-up, throughput of two one-thread ranks beside one rank with two
# threads, the answer store per question, merging, scoring, W&B. From these the model of scale of docs/cluster.md is written.
# About five minutes on two cores that nobody else uses.
# Usage: bash scripts/bench/scale.sh [--questions 320] [--answers 1000000]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
python -m eval.efficiency.scale measure "$@"
python -m eval.efficiency.scale page
