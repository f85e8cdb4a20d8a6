# What the training scripts share; sourced by them.
set -euo pipefail

# setup DEFAULT_FOLDER [FOLDER] [--quick]: sets folder, assets, quick and limit, and enters the environment.
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
  assets=assets limit=()
  if [ -n "$quick" ]; then
    assets=$folder/assets limit=(--limit 8)
  fi
}

# train STAGE: trains a stage that is not finished.
train() {
  [ -f "$folder/$1.pt" ] && return
  python -m lab.toy.train "$1" --folder "$folder" $quick
}

# measure MODEL ARGUMENTS: the accuracy of the exported checkpoint with all visual tokens; arguments of python -m eval.
measure() {
  python -m eval --method full --model "$assets/$1" --output "$folder/result" --restart --wandb disabled "${limit[@]}" "${@:2}"
}
