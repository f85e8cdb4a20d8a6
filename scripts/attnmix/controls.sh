#!/usr/bin/env bash
# AttnMix beside its variants and controls: the table of controls.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/attnmix/controls.sh --limit 20                      # every cell, quickly
#   DATA=/data/eval bash scripts/attnmix/controls.sh                 # the paper's checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" attnmix/controls "$@"
