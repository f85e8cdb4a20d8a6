"""Write the toy benchmarks in the file layouts of the real ones.

    python -m lab.toy.benchmarks --output assets/eval
    python -m lab.toy.benchmarks --output assets/eval --only pope mme
    python -m lab.toy.benchmarks --output assets/eval_next --only large_gqa
    python -m lab.toy.benchmarks --output assets/eval_video --only video_qa

Pictures are test scenes of `lab.toy.data.scenes`, questions those of `lab.toy.data.formats`, all from fixed seeds.
Without `--only` everything of assets/eval is written. All groups except gqa link to the images of OUTPUT/gqa; `videos`
links to the videos of OUTPUT/../eval_video.
"""

import argparse
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from eval.command import exit_on_user_error
from lab.toy.benchmarks import choices, gqa_and_videos, images, words
from lab.toy.data.scenes import large_scene
from llava.errors import UserError

# Name of a group of sets -> what writes it below the output folder.
WRITERS: dict[str, Sequence[Callable[[Path], None]]] = {
    "gqa": [gqa_and_videos.write_gqa],
    "captions": [words.write_captions],
    "choices": [choices.write_scienceqa, choices.write_mmbench, choices.write_seed_bench],
    "judged": [words.write_mmvet, words.write_llavabench],
    "mme": [choices.write_mme],
    "mmmu": [choices.write_mmmu],
    "pope": [choices.write_pope],
    "tables": [
        *(choices.write_mmstar, choices.write_ai2d),
        *(words.write_chartqa, words.write_docvqa, words.write_realworldqa, words.write_ocrbench),
    ],
    "vqa": [words.write_textvqa, words.write_vizwiz, words.write_vqav2],
    "videos": [lambda root: gqa_and_videos.write_zero_shot_sets(root, root.parent / "eval_video" / "video_qa")],
}
# A further module of this package with a function `write`, as `vtr new benchmark` makes one, is a group too.
for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if found.name != "__main__" and hasattr(module := import_module(f"lab.toy.benchmarks.{found.name}"), "write"):
        WRITERS[found.name] = [module.write]
# Groups with a folder of their own, and that need no other group.
ALONE: dict[str, Callable[[Path], None]] = {
    "large_gqa": lambda root: gqa_and_videos.write_gqa(root, gqa_and_videos.LARGE_SPLITS, large_scene),
    "video_qa": gqa_and_videos.write_video_qa,
}


def size(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[*WRITERS, *ALONE], default=list(WRITERS), metavar="GROUP")
    args = parser.parse_args(arguments)
    for name in args.only:
        linked = name in WRITERS and name != "gqa"
        if linked and not images(args.output).is_dir():
            raise UserError(
                f"{name} links to {images(args.output)}, which is not there; "
                f"`python -m lab.toy.benchmarks --output {args.output} --only gqa` writes it."
            )
        for write in WRITERS.get(name) or [ALONE[name]]:
            write(args.output)
    print(f"Wrote {', '.join(args.only)}; {args.output} holds {size(args.output) / 1e6:.1f} MB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
