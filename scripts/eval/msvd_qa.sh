#!/usr/bin/env bash
# One method on MSVD-QA, graded by a judge, with the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/msvd_qa.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/msvd_qa.sh consensusdrop 136
#   MODEL=LanguageBind/Video-LLaVA-7B DATA=/data/eval bash scripts/eval/msvd_qa.sh consensusdrop 136 --dtype float16
#
# --judge endpoint asks the judge that JUDGE_URL and JUDGE_MODEL name; see docs/evaluation.md.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" msvd_qa "$@"
