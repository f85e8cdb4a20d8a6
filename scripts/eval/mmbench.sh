#!/usr/bin/env bash
# One method on MMBench dev, circular groups, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/mmbench.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/mmbench.sh consensusdrop 64
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/mmbench.sh consensusdrop 64 --dtype float16
#
# --split test writes the spreadsheet for the server.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" mmbench "$@"
