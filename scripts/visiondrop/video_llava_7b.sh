#!/usr/bin/env bash
# VisionDrop on Video-LLaVA-7B: the table of video_llava_7b.yaml, on the toy model and toy data unless DATA (and MODEL) say otherwise.
#   bash scripts/visiondrop/video_llava_7b.sh --limit 20                      # every cell, quickly
#   DATA=/data/eval bash scripts/visiondrop/video_llava_7b.sh                 # the paper's checkpoint: docs/paper_tables.md
# An interrupted run goes on where it stopped; --help lists the choices.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../table.sh" visiondrop/video_llava_7b "$@"
