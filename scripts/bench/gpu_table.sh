#!/usr/bin/env bash
# The GPU table, in two calls of at most ten minutes each: LLaVA-1.5-7B at 64, 128 and 192 of 576 tokens and LLaVA-NeXT-7B at 320,
# 640 and 160 of 2,880, random weights at full depth, bfloat16, three turns of every method beside `full` and its oracle.
# Usage: bash scripts/bench/gpu_table.sh first|second|pages [further arguments of python -m eval.efficiency.latency]
#   first    the device beside the CPU: wrong answers end the script. Then the prefill of 1 and 8 questions (less than five minutes on an H100).
#   second   goes on from the files of the first, also on another machine with the same GPU: 32 questions, and answers of 32
#            tokens by full, the papers' methods and their oracles (nine minutes at most). Called again, it measures what is missing.
#   pages    measures nothing: the page again on any machine, with operations counted on torch's meta device (ten minutes of CPU).
# From the environment: OUT, the folder of the 8 files (results/bench/gpu); COMMIT, where a copied tree has no .git.
#   OUT=/tmp/try bash scripts/bench/gpu_table.sh first --layers 4 --distinct 1 --method fastervlm --repeats 1 --deadline 60
set -euo pipefail
call=${1:-}
case $call in
  first | second | pages) shift ;;
  -h | --help) sed -n '2,10p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
  *) sed -n '2,10p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
out=${OUT:-results/bench/gpu} failed=0 SECONDS=0
mkdir -p "$out"

# measure NAME TITLE END ARGUMENTS: one process and its part of the page. It measures until END, seconds after the start of the
# script, less 20 to start Python. One that hangs is stopped 25 seconds after END, and its file keeps what was measured.
measure() {
  local name=$1 title=$2 end=$3 limit=() own=(--pages)
  shift 3
  if [ "$call" = pages ]; then
    [ -f "$out/$name.jsonl" ] || return 0
  else
    own=(--no-counts --deadline $((end - SECONDS - 20)))
    limit=(timeout --foreground -k 5 $((end - SECONDS + 25)))
  fi
  printf '\n## %s\n\n' "$title" >> "$out/README.md"
  "${limit[@]}" python -m eval.efficiency.latency --distinct 32 --dtype bfloat16 --repeats 3 --measurements "$out/$name.jsonl" \
    "${own[@]}" "$@" | tee -a "$out/README.md" || { failed=1; echo "Not finished; the same call goes on." | tee -a "$out/README.md"; }
}

echo '# The GPU table' > "$out/README.md"
if [ "$call" = first ]; then
  rm -f "$out/selfcheck.md"
  timeout --foreground 120 python -m lab.bench.selfcheck --markdown "$out/selfcheck.md" || failed=$?
fi
[ ! -f "$out/selfcheck.md" ] || { printf '\n## The device beside the CPU\n\n'; cat "$out/selfcheck.md"; } >> "$out/README.md"
[ $failed = 0 ] || exit $failed

sizes=1,8,32
[ "$call" != first ] || sizes=1,8
prefill=(--method all --lengths 0 --batch-size $sizes)
answers=(--method consensusdrop,visiondrop,attnmix --lengths 32)
measure llava-1.5-7b "LLaVA-1.5-7B, prefill" 200 --shape llava-1.5-7b --budget 64,128,192 "${prefill[@]}" --plot "$out/llava-1.5-7b.png" "$@"
if [ "$call" != first ]; then
  measure llava-1.5-7b-answers "LLaVA-1.5-7B, answers" 290 --shape llava-1.5-7b --budget 64 "${answers[@]}" --batch-size 1,32 "$@"
  measure llava-next-7b-answers "LLaVA-NeXT-7B, answers" 350 --shape llava-next-7b --budget 320 "${answers[@]}" --batch-size 1 "$@"
fi
# Last, because `full` fills 68 GiB with a batch of 32.
measure llava-next-7b "LLaVA-NeXT-7B, prefill" 560 --shape llava-next-7b --budget 320,640,160 "${prefill[@]}" --plot "$out/llava-next-7b.png" "$@"
echo "The page is $out/README.md."
exit $failed
