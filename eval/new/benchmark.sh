#!/usr/bin/env bash
# One method on template_name, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/template_name.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/template_name.sh consensusdrop 64
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/template_name.sh consensusdrop 64 --dtype float16
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" template_name "$@"
