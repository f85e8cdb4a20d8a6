"""Answers as GQA's official script reads them: --src ANSWERS --dst PREDICTIONS."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages of this checkout

from eval.llava_conversions import gqa

if __name__ == "__main__":
    sys.exit(gqa())
