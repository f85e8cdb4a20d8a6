"""Start a local web page: ask about an image, with a method beside all visual tokens.

vtr demo
vtr demo --model liuhaotian/llava-v1.5-7b --dtype float16
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from eval.command import Parser, Terminated, exit_on_user_error, make_parser, terminate, value
from eval.config import DEFAULT_MODEL, count, pairs, path_name
from llava.errors import UserError

LARGEST_UPLOAD = "20mb"


def parser() -> Parser:
    p = make_parser("eval.pages.demo", __doc__)
    p.add_argument("--model", type=value(path_name), default=DEFAULT_MODEL, help="folder or hub name of a checkpoint")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    p.add_argument("--device", default="auto", help="torch device")
    p.add_argument("--text-tower", type=value(path_name), help="the CLIP of the vision tower, for cdpruner and trim")
    p.add_argument(
        "--picture", action="append", default=[], metavar="KEY=VALUE", help="how images are read, as vtr eval has it"
    )
    p.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 lets other machines in")
    p.add_argument("--port", type=value(count, maximum=65535), default=7860, help="port to serve on")
    return p


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, that of the signal which ends it."""
    args = parser().parse_args(arguments)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
            # A shell starts background jobs with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        serve(args)
    except KeyboardInterrupt as stop:
        print("\nStopped.", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    return 0


def serve(args: Any) -> None:
    """Load the model, show the page, and wait until a signal ends the process.

    Raises:
        UserError: Gradio is not installed, the model cannot be loaded, or the port is in use.
    """
    if find_spec("gradio") is None:
        raise UserError('The demo needs Gradio, which is not installed: pip install "gradio>=6.31".')
    check_address(args.host, args.port)
    # Before Gradio is imported: it asks its makers' server for news, and reaches its own page through a proxy.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost,127.0.0.1", args.host]))

    from llava.model.builder import load, parse

    conventions = {key: parse(key, text) for key, text in pairs("--picture", args.picture).items()}
    model = load(args.model, args.dtype, args.device, text_tower=args.text_tower, **conventions)
    from eval.pages.demo_page import CSS, THEME, examples, layout, warm_up

    print("Warming up ...", file=sys.stderr, flush=True)
    warm_up(model)
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
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it reports what is cut off
        blocks.server.force_exit = True  # an open page holds a connection, and the server would wait for it
        blocks.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be served on, before the model is loaded."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"Cannot serve on {host}, port {port} ({reason}); choose others with --host and --port."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
