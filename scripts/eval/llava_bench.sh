#!/usr/bin/env bash
# One method on LLaVA-Bench-in-the-Wild, graded by a judge, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/llava_bench.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/llava_bench.sh consensusdrop 64
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/llava_bench.sh consensusdrop 64 --dtype float16
#
# --judge endpoint asks the judge that JUDGE_URL and JUDGE_MODEL name; see docs/evaluation.md.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" llava_bench "$@"
