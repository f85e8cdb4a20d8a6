"""Write the large pictures' benchmark in GQA's official file layout, as `tinyllava.benchmark` does for small ones.

python -m tinyllava.benchmark_next --output assets/eval_next
"""

import argparse
from pathlib import Path

from tinyllava.benchmark import write_split
from tinyllava.large_scenes import centred, large_scene
from tinyllava.paint import Thing

# As SPLITS of tinyllava.benchmark; the validation scenes lie behind those that training watches.
SPLITS = {"testdev": ("test", 0, 75), "val": ("val", 1000, 30)}


def draw_large(split: str, index: int, dense: bool) -> tuple[bytes, tuple[Thing, ...]]:
    """File of a large picture and its things, the picture's centre where the question writer expects it."""
    drawn = large_scene(split, index, dense)
    return drawn.jpeg, centred(drawn.things, drawn.image.shape[1], drawn.image.shape[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    for name, part in SPLITS.items():
        print(f"{name}: {write_split(args.output / 'gqa', name, part, draw_large)} questions")
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
