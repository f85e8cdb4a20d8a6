#!/usr/bin/env bash
# Accuracy and cost of one method on GQA, on the toy model and toy benchmark unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/gqa.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/gqa.sh consensusdrop 64
#   bash scripts/eval/gqa.sh full --limit 100
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/gqa.sh consensusdrop 64 --dtype float16
#
# An interrupted run goes on where it stopped when the same command is given again.
# It uses all accelerators of the machine; GPUS, RANKS, HOSTFILE and TP choose others: docs/cluster.md.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" gqa "$@"
