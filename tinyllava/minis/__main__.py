"""Write every embedded benchmark but GQA in the file layout of the real one.

    python -m tinyllava.minis --output assets/eval
    python -m tinyllava.minis --output assets/eval --only pope mme

Pictures are test scenes of `tinyllava.scenes`, questions those of `tinyllava.formats`, all from fixed seeds. OUTPUT/gqa
(`python -m tinyllava.benchmark`) must be there, its images are linked; videos are those of OUTPUT/../eval_video.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tinyllava.minis import captions, choices, judged, mme, mmmu, pope, tables, videos, vqa
from tinyllava.minis.pictures import images

# Name of a group of sets -> what writes it below the output folder.
WRITERS: dict[str, Callable[[Path], None]] = {
    "pope": pope.write,
    "mme": mme.write,
    "vqa": vqa.write,
    "choices": choices.write,
    "judged": judged.write,
    "tables": tables.write,
    "mmmu": mmmu.write,
    "captions": captions.write,
    "videos": lambda root: videos.write(root, root.parent / "eval_video" / "video_qa"),
}


def size(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=WRITERS, default=list(WRITERS), metavar="GROUP")
    args = parser.parse_args()
    if not images(args.output).is_dir():
        sys.exit(f"No {images(args.output)}; python -m tinyllava.benchmark --output {args.output} writes it.")
    for name in args.only:
        WRITERS[name](args.output)
    print(f"Wrote {', '.join(args.only)}; {args.output} holds {size(args.output) / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
