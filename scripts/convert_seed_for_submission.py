"""SEED-Bench's accuracies and its upload, with the flags of LLaVA's script of this name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages of this checkout

from eval.llava_conversions import seed_upload

if __name__ == "__main__":
    sys.exit(seed_upload())
