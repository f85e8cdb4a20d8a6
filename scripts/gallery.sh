#!/usr/bin/env bash
# Writes a self-contained HTML page of what every method keeps of an image: kept and merged patches, answers, score maps, sliders over budgets and decoder layers.
# Usage: bash scripts/gallery.sh [IMAGE "QUESTION"] [arguments of vtr gallery]
#   bash scripts/gallery.sh                                              the toy model about the first toy test image -> gallery.html
#   bash scripts/gallery.sh photo.jpg "What is the man holding?" --output photo.html
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/gallery.sh photo.jpg "What is this?" --methods consensusdrop,visionzip --budgets 128,64 --dtype float16
# A Video-LLaVA takes a video file in the place of the image. `vtr gallery --help` lists all arguments.
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here" # IMAGE and --output are relative to the caller's folder
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} python -m eval.cli gallery ${MODEL:+--model "$MODEL"} "$@"
