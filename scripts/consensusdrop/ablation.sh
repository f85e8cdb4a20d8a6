#!/usr/bin/env bash
# ConsensusDrop, one choice at a time: the table of ablation.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/consensusdrop/ablation.sh --limit 20                      # every cell, quickly
#   DATA=/data/eval bash scripts/consensusdrop/ablation.sh                 # the paper's checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" consensusdrop/ablation "$@"
