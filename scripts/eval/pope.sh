#!/usr/bin/env bash
# One method on POPE: F1 over random, popular and adversarial objects, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/pope.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/pope.sh consensusdrop 64
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/pope.sh consensusdrop 64 --dtype float16
#
# --split adversarial asks one part only.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" pope "$@"
