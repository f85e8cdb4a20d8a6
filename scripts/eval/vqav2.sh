#!/usr/bin/env bash
# One method on VQAv2, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/vqav2.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/vqav2.sh consensusdrop 64
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/vqav2.sh consensusdrop 64 --dtype float16
#
# --split testdev writes the file for the server, which the papers' numbers come from; val is scored here.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" vqav2 "$@"
