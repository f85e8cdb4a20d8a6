#!/usr/bin/env bash
# Efficiency of VisionDrop on LLaVA-NeXT-7B: the table of efficiency_next.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/visiondrop/efficiency_next.sh --limit 20                      # every cell, quickly
#   DATA=/data/eval bash scripts/visiondrop/efficiency_next.sh                 # the paper's checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" visiondrop/efficiency_next "$@"
