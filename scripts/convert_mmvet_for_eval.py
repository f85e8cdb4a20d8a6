"""Answers as MM-Vet's evaluator reads them: --src ANSWERS --dst RESULTS."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages of this checkout

from eval.llava_conversions import mmvet

if __name__ == "__main__":
    sys.exit(mmvet())
