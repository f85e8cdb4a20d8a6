"""The file for VQAv2's server, with the flags of LLaVA's script of this name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages of this checkout

from eval.llava_conversions import vqav2

if __name__ == "__main__":
    sys.exit(vqav2())
