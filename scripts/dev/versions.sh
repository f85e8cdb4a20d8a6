#!/usr/bin/env bash
# The benchmarks and the tests of the model code with other versions of Python, torch and transformers: makes an environment of
# them in FOLDER (some GB: the package index has CUDA builds) and runs everything there. Without versions: the lowest of llava/versions.py.
# Usage: bash scripts/dev/versions.sh FOLDER [PYTHON [TORCH [TRANSFORMERS|newest]]]
#   bash scripts/dev/versions.sh /tmp/oldest
#   bash scripts/dev/versions.sh /tmp/newer python3.12 2.12 5.24
set -euo pipefail
if [ $# -lt 1 ]; then sed -n '2,6p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit 2; fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
lowest() { python3 -c "from llava.versions import TESTED; print(TESTED['$1'][0])"; }
python=${2:-python$(lowest python)} torch=${3:-$(lowest torch)} transformers=${4:-$(lowest transformers)}
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
wanted="transformers~=$transformers.0"
if [ "$transformers" = newest ]; then wanted=transformers; fi
sed "s/^torch==.*/torch~=$torch.0/; s/^transformers==.*/$wanted/" requirements.txt > "$folder/requirements.txt"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade -r "$folder/requirements.txt"
export VENV=none PYTHON="$folder/bin/python" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for shape in '' '--shape llava-1.5-7b --layers 1 --distinct 1 --lengths 0' '--shape llava-next-7b --layers 1 --distinct 1 --lengths 0'; do
  # shellcheck disable=SC2086
  bash scripts/bench/latency.sh consensusdrop 64 --repeats 1 $shape
done
bash scripts/eval/gqa.sh consensusdrop 64 --limit 40 --output "$folder/gqa"
"$folder/bin/python" -m eval.cli bench stability --methods consensusdrop --budget 64
"$folder/bin/python" -m pytest tests/test_versions.py tests/test_fused.py tests/test_stock_families.py tests/test_family_pipeline.py tests/test_contract.py \
  tests/test_golden.py tests/test_wrap.py tests/test_wrap_refusals.py tests/test_families.py tests/test_checkpoint.py tests/test_shipped_processors.py \
  tests/test_parallel_model.py tests/test_pretended.py tests/parity
