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
    assets=$folder/assets measure=(--limit 20)
  fi
}

# train STAGE RANKS: trains a stage that is not finished; two ranks share the cores of a small CPU, DeepSpeed starts them.
train() {
  [ -f "$folder/$1.pt" ] && return
  RANKS=$(( $(nproc) < $2 ? 1 : $2 )) python -m toy.train "$1" --folder "$folder" $quick
}
