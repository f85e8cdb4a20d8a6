#!/usr/bin/env bash
# One method on TextVQA val, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/textvqa.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/textvqa.sh consensusdrop 64
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/textvqa.sh consensusdrop 64 --dtype float16
#
# --profile lmms asks without OCR tokens, as lmms-eval does.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" textvqa "$@"
