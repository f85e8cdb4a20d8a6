#!/usr/bin/env bash
# One method on VizWiz, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/vizwiz.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/vizwiz.sh consensusdrop 64
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/vizwiz.sh consensusdrop 64 --dtype float16
#
# --split test writes the file for the server, which the papers' numbers come from; val is scored here.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" vizwiz "$@"
