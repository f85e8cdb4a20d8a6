#!/usr/bin/env bash
# Makes .venv, installs requirements.txt and the console command vtr; does nothing when that is already done. Sourced by every other script:
#   source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Afterwards the working directory is the repository root and `python` is .venv's.
# PYTHON=/path/to/python3.11 chooses the interpreter; VENV=/path puts the environment elsewhere. VENV=none makes and installs nothing:
# PYTHON, or python or python3, runs with the packages that it has (docs/cluster.md, "Nodes without network").
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
if [ "$venv" = none ]; then
  python=$(command -v "${PYTHON:-python}" || command -v "${PYTHON:-python3}" || true)
  needed='torch transformers accelerate einops numpy PIL pydantic safetensors sentencepiece scipy matplotlib psutil'
  lacks='import importlib.util, sys; print(*["Python 3.11"] * (sys.version_info < (3, 11)), *(n for n in sys.argv[1:] if not importlib.util.find_spec(n)))'
  missing=$("${python:-false}" -c "$lacks" $needed 2>/dev/null) || missing='a Python that runs'
  if [ -n "$missing" ]; then
    echo "VENV=none: ${python:-${PYTHON:-python3}} lacks ${missing/PIL/pillow}; install it there, from wheels if it has no network (docs/cluster.md), or set PYTHON." >&2
    exit 2
  fi
  if [ "$python" != "$(command -v python || true)" ]; then # the name that scripts call; a link would lose the packages of an environment
    named=.venv/none${python//\//_}
    mkdir -p "$named"
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" > "$named/python.$$"
    chmod +x "$named/python.$$"
    mv "$named/python.$$" "$named/python"
    PATH=$PWD/$named:$PATH
  fi
else
  stamp=$venv/requirements.sha256
  wanted=$(sha256sum requirements.txt | cut -d' ' -f1)
  if [ ! -x "$venv/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    python=${PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3 || true)}
    if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "Python 3.11 or newer is needed, found ${python:-none}; install it or set PYTHON=/path/to/python3.11." >&2
      exit 2
    fi
    echo "Setting up $venv (once; about two minutes and 2 GB with the CPU build of torch, more with CUDA) ..." >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable . >&2
    echo "$wanted" > "$stamp"
  fi
  # A relative VENV must still be found after a later cd.
  PATH="$(cd "$venv/bin" && pwd):$PATH"
fi
export PATH
# Fork-safe tokenizers, no DeepSpeed banner on a machine without a GPU.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
if [ -z "${DS_ACCELERATOR:-}" ] && ! command -v nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
