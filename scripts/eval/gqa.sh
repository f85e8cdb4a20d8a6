#!/usr/bin/env bash
# Accuracy and cost of one method on GQA, on the embedded model and data unless MODEL and DATA say otherwise.
#
#   bash scripts/eval/gqa.sh METHOD [BUDGET] [further arguments of python -m eval]
#   bash scripts/eval/gqa.sh consensusdrop 64
#   bash scripts/eval/gqa.sh full --limit 100
#   MODEL=liuhaotian/llava-v1.5-7b DATA=/data/eval bash scripts/eval/gqa.sh consensusdrop 64 --dtype float16
#
# An interrupted run goes on where it stopped when the same command is given again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

case ${1:-} in
"" | -h | --help)
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  [[ -n ${1:-} ]] && exit 0
  exit 2
  ;;
esac

arguments=(--benchmark gqa --method="$1")
shift
if [[ $# -gt 0 && $1 != --* ]]; then
  arguments+=(--budget="$1")
  shift
fi
arguments+=(${MODEL:+--model="$MODEL"} ${DATA:+--data="$DATA"} "$@")

here=$PWD
source "$root/scripts/setup.sh"
cd "$here" # setup.sh goes to the repository; relative paths above were typed here
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m eval "${arguments[@]}"
