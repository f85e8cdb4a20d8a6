#!/usr/bin/env bash
# Boxes and answers with renumbered and with original position ids: the table of localisation.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/field/localisation.sh --limit 50 --methods divprune,uniform  # a quick look
#   DATA=/data/eval bash scripts/field/localisation.sh                       # the real checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" field/localisation "$@"
