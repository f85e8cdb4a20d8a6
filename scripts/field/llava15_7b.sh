#!/usr/bin/env bash
# The field of 2026 on LLaVA-1.5-7B: the table of llava15_7b.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/field/llava15_7b.sh --limit 20                              # every cell, quickly
#   DATA=/data/eval bash scripts/field/llava15_7b.sh                         # the real checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" field/llava15_7b "$@"
