"""Write an HTML page of what every method keeps of an image, at every budget and before every decoder layer.

vtr gallery photo.jpg "What is the man holding?"
vtr gallery                                       # the first test question of the toy data
vtr gallery clip.mp4 "What happens?" --model LanguageBind/Video-LLaVA-7B-hf --budgets 256,128
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval import benchmarks
from eval.benchmarks.llava_files import SHORT
from eval.command import exit_on_user_error, make_parser, value
from eval.config import DEFAULT_MODEL, FULL, ROOT, count, options_by_method, path_name
from llava.budget import count_or_ratio
from llava.errors import UserError

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava
    from llava.processing.prompt import Sample

LLAVA_TOKENS = 576
VIDEO_FILES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".gif", ".m4v", ".mpg", ".mpeg")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("eval.pages.gallery", __doc__)
    p.add_argument("image", nargs="?", help="image file, or a video for a Video-LLaVA; left out: the toy data's first")
    p.add_argument("question", nargs="?", help="about the image")
    p.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id")
    p.add_argument("--methods", default="all", help="comma-separated names, or all")
    p.add_argument(
        "--budgets",
        type=value(budgets),
        default=[],
        help="comma-separated visual tokens or ratios; 1/3,2/9,1/9,1/18 if left out",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[METHOD.]KEY=VALUE",
        help="option of one method, or without METHOD of each that is named",
    )
    p.add_argument("--instruction", default=SHORT, help="answer format after the question; '' for none")
    p.add_argument("--max-new-tokens", type=value(count), default=16, help="longest answer, in tokens")
    p.add_argument("--output", type=value(path_name), default="gallery.html", help="file that is written")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    p.add_argument("--device", default="auto", help="torch device")
    args = p.parse_args(arguments)
    if args.image and not args.question:
        raise UserError(f'Ask something about {args.image}: vtr gallery {args.image} "What is this?"')
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"--output should be the name of a file, but {output} is a folder.")

    # Loading a model imports torch; mistakes above need not wait for it.
    from eval.pages.gallery_page import SHOWN, collect, render
    from llava.model.builder import load
    from llava.reduction import registry

    methods = words(args.methods)
    if args.methods == "all":  # those of this repository's papers first
        methods = [*SHOWN, *(name for name in registry.names() if name not in (*SHOWN, FULL))]
    if not methods:
        raise UserError("--methods names no method; see vtr show methods.")
    if FULL in methods:
        methods.remove(FULL)
        if not methods:
            raise UserError(f"--methods names {FULL} only, which is on every page; name a method to show beside it.")
        print(f"{FULL} is on every page, as the card “all tokens”; it has no budgets.", file=sys.stderr)
    options = options_by_method(methods, args.set)
    for name in methods:  # unknown names and options are errors before the model is loaded
        registry.build(name, LLAVA_TOKENS, options[name])
    own = sample_of(args.image, args.question, args.instruction) if args.image else None
    model = load(args.model, args.dtype, args.device)
    sample = own or toy_sample(model)
    gallery = collect(model, sample, methods, args.budgets, args.max_new_tokens, options)
    given = [*sys.argv[1:]] if arguments is None else [*arguments]
    page = render(gallery, shlex.join(["vtr", "gallery", *given]))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    print(
        f"Wrote {output}: {len(gallery.methods)} methods at {len(gallery.budgets)} budgets, "
        f"{len(gallery.results)} answers, {len(gallery.unavailable)} not possible; "
        f"{len(page.encode()) / 1e6:.1f} MB. Open it in a browser."
    )
    return 0


def words(text: str) -> list[str]:
    """Comma-separated words, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def budgets(text: str) -> list[int | float]:
    """Comma-separated numbers of visual tokens, or ratios of the image's."""
    return [count_or_ratio(word) for word in words(text)]


def sample_of(path: str, question: str, instruction: str) -> "Sample":
    """A user's question about a file."""
    from llava.processing.image import open_image
    from llava.processing.prompt import Sample
    from llava.processing.video import read_video

    is_video = Path(path).suffix.lower() in VIDEO_FILES
    return Sample("gallery", question, instruction, read_video(path) if is_video else open_image(path))


def toy_sample(model: "Llava") -> "Sample":
    """The first test question of the toy benchmark that suits the model: a video, a wide or a square image."""
    folder, name, split = "eval", "gqa", "testdev"
    if model.takes_videos:
        folder, name, split = "eval_video", "video_qa", "test"
    elif model.spec.crops:
        folder = "eval_next"
    data = ROOT / "assets" / folder
    if not data.is_dir():
        raise UserError(
            "The toy data is in the repository, not in its wheel; name an image and ask a question about it."
        )
    loaded = benchmarks.get(name).load(data, split)
    return loaded.sample(loaded.questions[0])


if __name__ == "__main__":
    sys.exit(main())
