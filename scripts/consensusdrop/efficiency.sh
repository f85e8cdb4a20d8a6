#!/usr/bin/env bash
# Efficiency of ConsensusDrop on LLaVA-1.5-7B: the table of efficiency.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/consensusdrop/efficiency.sh --limit 20                      # every cell, quickly
#   DATA=/data/eval bash scripts/consensusdrop/efficiency.sh                 # the paper's checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" consensusdrop/efficiency "$@"
