#!/usr/bin/env bash
# ConsensusDrop on Qwen2.5-VL-7B: the table of qwen25_vl_7b.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/consensusdrop/qwen25_vl_7b.sh --limit 20                      # every cell, quickly
#   DATA=/data/eval bash scripts/consensusdrop/qwen25_vl_7b.sh                 # the paper's checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" consensusdrop/qwen25_vl_7b "$@"
