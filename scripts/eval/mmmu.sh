#!/usr/bin/env bash
# One method on MMMU validation, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/mmmu.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/mmmu.sh consensusdrop 64
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/mmmu.sh consensusdrop 64 --dtype float16
#
# --profile lmms asks with all images and lmms-eval's wording.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" mmmu "$@"
