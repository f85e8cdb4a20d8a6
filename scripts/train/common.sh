# What the training scripts share; sourced by them.
set -euo pipefail

# setup DEFAULT_FOLDER [FOLDER] [--quick]: sets folder, assets, quick and measure, and enters the environment.
setup() {
  folder=$1 quick=
  shift
  for word in "$@"; do
    case $word in
      --quick) quick=--quick ;;
      -*) echo "Expected [FOLDER] [--quick], got $word." >&2; exit 2 ;;
      *) folder=$word ;;
    esac
  done
  [[ $folder = /* ]] || folder=$PWD/$folder
  source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
  assets=assets measure=()
  if [ -n "$quick" ]; then
    assets=$folder/assets measure=(--limit 20 --output "$folder/answers")
  fi
}

# train STAGE PROCESSES: trains a stage that is not finished; two one-thread processes share the cores of a small CPU.
train() {
  [ -f "$folder/$1.pt" ] && return
  local ranks=$(( $(nproc) < $2 ? 1 : $2 ))
  if [ "$ranks" = 1 ]; then
    python -m toy.train "$1" --folder "$folder" $quick
  else
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / ranks ))} \
      torchrun --standalone --nproc-per-node "$ranks" -m toy.train "$1" --folder "$folder" $quick
  fi
}
