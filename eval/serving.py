"""Ask a server of scripts/serve.sh with prompts as embeddings, or write the embeddings to a file.

    vtr serve-client consensusdrop 64 --image dog.jpg --question "What is the dog doing?"
    vtr serve-client consensusdrop 32,64,128 --questions questions.jsonl
    vtr export prompts.safetensors consensusdrop 64 --questions questions.jsonl

A file of questions has a line {"question_id": ..., "image": ..., "text": ...} for each, like LLaVA's files; images are
in the folder of the file. KEY in the environment is the server's key. `python -m eval.serving METHOD BUDGET`, which
scripts/serve.sh calls, prints the route of a method and the engine's arguments. All commands take --set KEY=VALUE, an
option of the method.
"""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from eval.answers.jsonl import read_jsonl, write_bytes
from eval.benchmarks.llava_files import split_suffix
from eval.command import Parser, exit_on_user_error, make_parser, value
from eval.config import DEFAULT_MODEL, count, options_by_method, path_name
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.processing.image import open_image
from llava.processing.prompt import Sample
from llava.reduction.registry import build
from llava.serving.client import Server, configured, load_client_model, prompt_embeddings, route
from llava.serving.engine_method import refuse_gaps

BATCH = 8  # prompts that are embedded at once


def default_model() -> str:
    return os.environ.get("MODEL") or DEFAULT_MODEL


def add_method(p: Parser) -> None:
    p.add_argument("method", help="one that acts before the decoder; see vtr show methods")
    p.add_argument("budget", nargs="?", help="visual tokens per image or their ratio, or several by commas")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")


def options(args: argparse.Namespace) -> dict[str, str]:
    return options_by_method([args.method], args.set)[args.method]


def parser(command: str, description: str) -> Parser:
    p = make_parser(command, description)
    if command == "eval.serving export":
        p.add_argument("file", type=Path, metavar="FILE.safetensors")
    add_method(p)
    p.add_argument("--image", type=Path, help="of one question")
    p.add_argument("--question", help="one question")
    p.add_argument("--questions", type=Path, metavar="FILE", help="a question with an image on each line")
    p.add_argument("--model", type=value(path_name), default=default_model(), help="checkpoint")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the embeddings")
    p.add_argument("--device", default="auto", help="torch device")
    return p


def asked(args: argparse.Namespace) -> list[Sample]:
    """The questions that the flags name; images are opened later."""
    if (args.questions is None) == (args.image is None or args.question is None):
        raise UserError("Give one question with --image and --question, or a file of questions with --questions.")
    if args.questions is None:
        lines = [(1, {"question_id": "1", "image": str(args.image.absolute()), "text": args.question})]
    else:
        lines = list(read_jsonl(args.questions))
    samples = []
    for number, line in lines:
        if missing := [name for name in ("question_id", "image", "text") if not str(line.get(name) or "").strip()]:
            raise UserError(f"{args.questions} line {number} has no {', no '.join(missing)}.")
        path = (args.questions or args.image).absolute().parent / str(line["image"])
        samples.append(Sample(str(line["question_id"]), *split_suffix(str(line["text"])), image_ids=(str(path),)))
    return samples


def front(args: argparse.Namespace) -> Llava:
    """The model that the flags name; mistakes in flags and questions are reported before it is loaded."""
    asked(args)
    reducer = build(args.method, 1, options(args))
    refuse_gaps(reducer)
    return load_client_model(args.model, reducer, args.dtype, args.device)


def prompts(args: argparse.Namespace, model: Llava) -> Iterator[tuple[dict[str, str], Tensor]]:
    """For every question at every budget: what is asked, in words, and the prompt's embeddings [L, H]."""
    budgets: list[str | None] = [budget for budget in (args.budget or "").split(",") if budget] or [None]
    reducers = [configured(args.method, budget, model.spec, options(args)) for budget in budgets]
    samples = asked(args)
    for start in range(0, len(samples), BATCH):
        batch = [
            Sample(one.id, one.question, one.suffix, open_image(one.image_ids[0], upright=True), one.image_ids)
            for one in samples[start : start + BATCH]
        ]
        for reducer in reducers:
            for sample, own in zip(batch, prompt_embeddings(model, batch, reducer), strict=True):
                asked_for = {"method": args.method, "budget": str(reducer.budget), "image": sample.image_ids[0]}
                if args.set:
                    asked_for["set"] = " ".join(args.set)
                yield {"question_id": sample.id, "question": sample.message, **asked_for}, own


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `vtr serve-client`; returns the exit code."""
    p = parser("eval.serving serve-client", "Ask a server of scripts/serve.sh with prompts as embeddings.")
    p.add_argument("--url", default="http://127.0.0.1:8000", help="of the server; its key is KEY in the environment")
    p.add_argument("--max-new-tokens", type=value(count), default=128, help="longest answer")
    p.add_argument("--concurrent", type=value(count), default=8, help="requests at once")
    args = p.parse_args(arguments)
    server = Server(args.url, os.environ.get("KEY", ""))
    model = front(args)
    ends = sorted(model.end_ids)
    server.check(model.name)

    def answer(words: dict[str, str], embeddings: Tensor) -> str:
        text = server.complete(model.name, embeddings, args.max_new_tokens, ends)
        return text if args.questions is None else json.dumps({**words, "text": text}, ensure_ascii=False)

    running: deque[Future[str]] = deque()
    with ThreadPoolExecutor(args.concurrent) as pool:
        for words, embeddings in prompts(args, model):
            running.append(pool.submit(answer, words, embeddings))
            while len(running) > 2 * args.concurrent:
                print(running.popleft().result(), flush=True)
        for one in running:
            print(one.result(), flush=True)
    return 0


@exit_on_user_error
def export_command(arguments: Sequence[str] | None = None) -> int:
    """The command line `vtr export`: write tensors 0, 1, ..., and a JSON line on each; returns the exit code."""
    args = parser("eval.serving export", "Write prompts as embeddings to a safetensors file.").parse_args(arguments)
    if args.file.suffix != ".safetensors":
        raise UserError(f"The file to write should end in .safetensors, got {args.file}.")
    model = front(args)
    lines, tensors = [], {}
    for number, (words, embeddings) in enumerate(prompts(args, model)):
        tensors[str(number)] = embeddings.clone()
        lines.append(json.dumps({"tensor": str(number), **words, "model": model.name}, ensure_ascii=False) + "\n")
    save_file(tensors, args.file)
    write_bytes(args.file.with_suffix(".jsonl"), "".join(lines).encode())
    print(f"{len(lines)} prompts of {model.name} in {args.file}, what they ask in {args.file.with_suffix('.jsonl')}.")
    return 0


@exit_on_user_error
def route_command(arguments: Sequence[str] | None = None) -> int:
    """For scripts/serve.sh: print the route, then one line for each argument of the engine; returns the exit code."""
    p = make_parser("eval.serving", "The route of a method, and the engine's arguments.")
    add_method(p)
    args = p.parse_args(arguments)
    way, found = route(args.method, args.budget, default_model(), options(args))
    print(way, *found, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(route_command())
