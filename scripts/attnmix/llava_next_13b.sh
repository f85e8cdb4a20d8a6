#!/usr/bin/env bash
# AttnMix (AdaV) on LLaVA-NeXT-13B: the table of llava_next_13b.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/attnmix/llava_next_13b.sh --limit 20                      # every cell, quickly
#   DATA=/data/eval bash scripts/attnmix/llava_next_13b.sh                 # the paper's checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" attnmix/llava_next_13b "$@"
