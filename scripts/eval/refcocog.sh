#!/usr/bin/env bash
# One method on RefCOCOg: how often it finds the box of what a sentence describes, on the toy model and toy benchmark unless
# MODEL and DATA say otherwise.
#
#   bash scripts/eval/refcocog.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/refcocog.sh divprune 64 --set positions=original      # --split test; --profile lmms
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/refcocog.sh divprune 64 --dtype float16
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" refcocog "$@"
