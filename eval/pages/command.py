"""The commands of the gallery and the demo.

Torch and Gradio are imported late, so that mistakes in the arguments are reported at once.
"""

import logging
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import benchmarks
from eval.__main__ import names, sizes
from eval.benchmarks.llava_files import SHORT
from eval.command import Parser, exit_on_user_error, make_parser, value
from eval.config import DEFAULT_MODEL, FULL, count, options_by_method, pairs, path_name
from llava.budget import BLIND, WITHOUT_BUDGET
from llava.errors import UserError, optional_imports
from llava.places import ASSETS

if TYPE_CHECKING:
    from llava.model.llava_arch import Llava
    from llava.processing.prompt import Sample

LLAVA_TOKENS = 576
LARGEST_UPLOAD = "20mb"
VIDEO_FILES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".gif", ".m4v", ".mpg", ".mpeg")


def parser_of(command: str, documentation: str | None) -> Parser:
    """The parser of `vtr COMMAND`, with the flags that say how the model is loaded."""
    p = make_parser(f"eval.cli {command}", documentation)
    p.add_argument("--model", type=value(path_name), default=DEFAULT_MODEL, help="folder or hub id of a checkpoint")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    p.add_argument("--device", default="auto", help="torch device")
    return p


@exit_on_user_error
def gallery(arguments: Sequence[str] | None = None) -> int:
    """Write an HTML page of what every method keeps of an image, at every budget and before every decoder layer.

    vtr gallery photo.jpg "What is the man holding?"
    vtr gallery                                       # the first test question of the toy data
    vtr gallery clip.mp4 "What happens?" --model LanguageBind/Video-LLaVA-7B-hf --budgets 256,128
    """
    p = parser_of("gallery", gallery.__doc__)
    p.add_argument("image", nargs="?", help="image file, or a video for a Video-LLaVA; left out: the toy data's first")
    p.add_argument("question", nargs="?", help="about the image")
    p.add_argument("--methods", type=names, default="all", help="comma-separated names, or all")
    p.add_argument("--budgets", type=value(sizes), default=[], help="visual tokens or ratios; default 1/3,2/9,1/9,1/18")
    p.add_argument(
        "--set", action="append", default=[], metavar="[METHOD.]KEY=VALUE", help="option of one or all methods"
    )
    p.add_argument("--instruction", default=SHORT, help="answer format after the question; '' for none")
    p.add_argument("--max-new-tokens", type=value(count), default=16, help="longest answer, in tokens")
    p.add_argument("--output", type=value(path_name), default="gallery.html", help="file that is written")
    args = p.parse_args(arguments)
    if args.image and not args.question:
        raise UserError(f'Ask something about {args.image}: vtr gallery {args.image} "What is this?"')
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"--output should be the name of a file, but {output} is a folder.")

    from eval.pages.gallery import SHOWN, collect, render
    from llava.model.builder import load
    from llava.reduction import registry

    methods = args.methods
    if methods == ["all"]:  # the methods of this repository's papers come first
        methods = [*SHOWN, *(name for name in registry.names() if name not in (*SHOWN, *WITHOUT_BUDGET))]
    if FULL in methods:
        methods.remove(FULL)
        print(f"{FULL} is on every page, as the card “all tokens”; it has no budgets.", file=sys.stderr)
    if BLIND in methods:
        raise UserError(f"{BLIND} keeps no visual token that could be shown; leave it out of --methods.")
    if not methods:
        raise UserError(f"--methods names no method to show beside {FULL}; see vtr show methods.")
    options = options_by_method(methods, args.set)
    for name in methods:  # unknown names and options are errors before the model is loaded
        registry.build(name, LLAVA_TOKENS, options[name])
    own = sample_of(args.image, args.question, args.instruction) if args.image else None
    model = load(args.model, args.dtype, args.device)
    found = collect(model, own or toy_sample(model), methods, args.budgets, args.max_new_tokens, options)
    given = sys.argv[1:] if arguments is None else arguments
    page = render(found, shlex.join(["vtr", "gallery", *given]))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    print(
        f"Wrote {output}: {len(found.methods)} methods at {len(found.budgets)} budgets, "
        f"{len(found.results)} answers, {len(found.unavailable)} not possible; "
        f"{len(page.encode()) / 1e6:.1f} MB. Open it in a browser."
    )
    return 0


def sample_of(path: str, question: str, instruction: str) -> "Sample":
    """The user's question about an image or video file."""
    from llava.processing.image import open_image
    from llava.processing.prompt import Sample
    from llava.processing.video import read_video

    is_video = Path(path).suffix.lower() in VIDEO_FILES
    image = read_video(path) if is_video else open_image(path, upright=True)
    return Sample("gallery", question, instruction, image)


def toy_sample(model: "Llava") -> "Sample":
    """The first test question of the toy benchmark that suits the model: a video, a wide or a square image."""
    folder, name, split = "eval", "gqa", "testdev"
    if model.takes_videos:
        folder, name, split = "eval_video", "video_qa", "test"
    elif model.spec.crops:
        folder = "eval_next"
    data = ASSETS / folder
    if not data.is_dir():
        raise UserError("The toy data is not installed here; name an image and ask a question about it.")
    loaded = benchmarks.get(name).load(data, split)
    return loaded.sample(loaded.questions[0])


@exit_on_user_error
def demo(arguments: Sequence[str] | None = None) -> int:
    """Start a local web page: ask about an image, and compare a method with all visual tokens.

    vtr demo
    vtr demo --model liuhaotian/llava-v1.5-7b --dtype float16
    """
    p = parser_of("demo", demo.__doc__)
    p.add_argument("--text-tower", type=value(path_name), help="the CLIP of the vision tower, for cdpruner and trim")
    p.add_argument("--image-option", action="append", default=[], metavar="KEY=VALUE", help="as vtr eval has it")
    p.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 lets other machines in")
    p.add_argument("--port", type=value(count, maximum=65535), default=7860, help="port to serve on")
    args = p.parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        # A shell starts background jobs with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(args)
    return 0


def serve(args: Any) -> None:
    """Load the model, show the page, and wait until a signal ends the process.

    Raises:
        UserError: Gradio is not installed, the model cannot be loaded, or the port is in use.
    """
    check_address(args.host, args.port)
    # Set before Gradio is imported. It would report to its makers' server, and look for its own page through a proxy.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost,127.0.0.1", args.host]))
    with optional_imports():  # before the model is loaded
        import gradio  # noqa: F401

    from llava.model.builder import load, parse

    conventions = {key: parse(key, text) for key, text in pairs("--image-option", args.image_option).items()}
    model = load(args.model, args.dtype, args.device, text_tower=args.text_tower, **conventions)
    from eval.pages.demo import CSS, THEME, examples, layout

    print("Answering the example ...", file=sys.stderr, flush=True)
    blocks = layout(model, examples())
    blocks.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=LARGEST_UPLOAD,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        theme=THEME,
        css=CSS,
    )
    try:
        print(f"Open http://{args.host}:{args.port} in a browser; Ctrl-C ends the demo.", flush=True)
        threading.Event().wait()
    finally:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would report every connection that is cut
        blocks.server.force_exit = True  # otherwise the server would wait for the connection of an open page
        blocks.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Raise UserError if the page cannot be served on this address, before the model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"Cannot serve on {host}, port {port} ({reason}); choose others with --host and --port."
        ) from error
