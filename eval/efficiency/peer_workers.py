"""The workers of a comparison (eval/efficiency/peers.py), on random weights in the shape of a real model.

    python -m eval.efficiency.peer_workers ours --method visiondrop --budget 64 --set official=true
    python -m eval.efficiency.peer_workers ours --method full,consensusdrop,visiondrop --budget 64
    python -m eval.efficiency.peer_workers stock                       # dense: `generate` for one token, SDPA
    python -m eval.efficiency.peer_workers stock --attentions          # and with output_attentions=True beside it
    python -m eval.efficiency.peer_workers stock --layer 2 --keep 64   # FastV's rule, on attention of the eager kernel

`ours` is this repository: methods, and with `--oracle` their oracles. One method is measured as "ours", several under
their names. Seconds are those to the first token (vision, selection and prefill) from prepared pixels and token ids.

`stock` is transformers: dense, or pruning that a user would write. With `--attentions` a second measurement asks
`generate` for the attention maps from which a user would score tokens by the text: all modules then run the eager
kernel, as after `from_pretrained(attn_implementation="eager")`. FastV keeps the visual tokens to which the last token
attends most in the layer before `--layer`. transformers returns attention from its eager kernel alone, so that one
layer runs it, all others SDPA, and rows of the hidden states are dropped between two layers: what the model's public
modules allow in one pass.

Every measurement asks about another image.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.command import exit_on_user_error, make_parser
from eval.config import FULL
from eval.efficiency.counts import first_token
from eval.efficiency.oracle import chosen_options, oracle_of, oracles, reducers_of
from eval.efficiency.peers import serve
from eval.efficiency.shapes import SHAPES, noise_batches, random_llava
from eval.results.report import versions
from llava.errors import UserError, unknown
from llava.model.builder import DTYPES
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Sample
from llava.reduction.budget import planned
from llava.reduction.reducer import Reducer

# This repository


def ours(args: argparse.Namespace) -> None:
    """Serve measurements of methods, and of their oracles if asked."""
    names = args.method.split(",")
    if args.budget is None and names != [FULL]:
        raise UserError(f"--method {args.method} needs a --budget: the visual tokens to keep.")
    model = build(args)
    methods = reducers_of(names, args.budget or model.visual_tokens, chosen_options(args.set, names), model)
    theirs: dict[str, Reducer] = {}
    if args.oracle:
        for one in methods.values():
            oracle_of(one, model.spec)  # an error where there is none
        theirs, _ = oracles(methods, model.spec)
    runs = methods | theirs
    if len(methods) == 1:
        runs = dict(zip(("ours", "oracle") if theirs else ("ours",), runs.values(), strict=True))
    ask = noise_batches(model, 1, differ=True)

    def calls(number: int) -> dict[str, Callable[[], float]]:
        return {name: partial(ttft, model, reducer, ask(number)) for name, reducer in runs.items()}

    plans = {name: planned(one.for_picture(model.spec), model.spec) for name, one in methods.items()}
    plan = plans if len(plans) > 1 else plans[names[0]]
    serve_alternately(described(model, f"{args.method} {args.set}", args) | {"visual tokens per layer": plan}, calls)


@torch.inference_mode()
def ttft(model: Llava, reducer: Reducer, samples: list[Sample]) -> float:
    """Seconds from prepared pixels and token ids to the first token."""
    timer = Timer(model.device)
    first_token(model, reducer, samples, timer)
    spent = timer.seconds
    return sum(spent.values()) - spent.get("preprocess", 0.0)


# Stock transformers


def stock(args: argparse.Namespace) -> None:
    """Serve measurements of transformers on the same weights."""
    if args.attentions and args.keep is not None:
        raise UserError("--attentions asks the dense model; leave --layer and --keep out.")
    if (args.layer is None) != (args.keep is None):
        raise UserError("--layer and --keep belong together; give both, or none for the dense model.")
    model = build(args)
    if args.layer is not None and not 1 <= args.layer < model.spec.layers:
        raise UserError(f"--layer should be 1 to {model.spec.layers - 1}, got {args.layer}.")
    if args.keep is not None and not 1 <= args.keep <= model.visual_tokens:
        raise UserError(f"--keep should be 1 to {model.visual_tokens}, got {args.keep}.")
    runs: dict[str, Callable[..., object]] = {"transformers": dense}
    if args.attentions:
        runs["transformers, output_attentions"] = attentive
    elif args.keep is not None:
        runs = {"transformers, eager attention": partial(pruned_token, layer=args.layer, keep=args.keep)}

    def calls(number: int) -> dict[str, Callable[[], float]]:
        asked = inputs(model, number)
        return {name: partial(seconds, run, model.hf_model, *asked) for name, run in runs.items()}

    serve_alternately(described(model, ", then ".join(runs), args), calls)


def inputs(model: Llava, number: int) -> tuple[Tensor, Tensor]:
    """Token ids [1, L] with a placeholder for each visual token, and pixels [1, 3, S, S], of one question."""
    sample = noise_batches(model, 1, differ=True)(number)[0]
    place = model.hf_model.config.image_token_id
    ids: list[int] = []
    for token in model.prompt(sample).ids:
        ids += [place] * model.visual_tokens if token == IMAGE_TOKEN_INDEX else [token]
    pixels, _ = model.views(sample.image)
    return torch.tensor([ids], device=model.device), pixels.to(model.device, model.hf_model.dtype)


def seconds(run: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


@torch.inference_mode()
def dense(hf: Any, ids: Tensor, pixels: Tensor, **options: Any) -> Any:
    """[1]: the first token of `generate`, or what it returns with further options."""
    mask = torch.ones_like(ids)
    output = hf.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=1, do_sample=False, **options
    )
    return output if options else output[:, -1]


def attentive(hf: Any, ids: Tensor, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """[1]: the first token of `generate`, and the attention maps of all decoder layers, [1, H, L, L] each."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        output = dense(hf, ids, pixels, output_attentions=True, return_dict_in_generate=True)
    finally:
        hf.set_attn_implementation(before)
    return output.sequences[:, -1], output.attentions[0]


def pruned_token(hf: Any, ids: Tensor, pixels: Tensor, layer: int, keep: int) -> Tensor:
    """[1]: the first token of `pruned`."""
    return pruned(hf, ids, pixels, layer, keep).argmax(-1)


@torch.inference_mode()
def pruned(hf: Any, ids: Tensor, pixels: Tensor, layer: int, keep: int) -> Tensor:
    """[1, V]: logits of the first token, with `keep` visual tokens from decoder layer `layer` on."""
    decoder = hf.model.language_model
    visual = ids == hf.config.image_token_id
    features = torch.cat(tuple(hf.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
    hidden = decoder.embed_tokens(ids).masked_scatter(visual[..., None], features)
    cache = DynamicCache(config=decoder.config)
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    rope = decoder.rotary_emb(hidden, places)
    for index, block in enumerate(decoder.layers):
        if index == layer - 1:
            hidden, attention = eager_layer(block, hidden, rope, cache)
            score = attention[0].mean(0)[-1][visual[0]]
            best = score.topk(keep).indices.sort().values
            kept = torch.cat([(~visual[0]).nonzero()[:, 0], visual[0].nonzero()[:, 0][best]]).sort().values
            hidden, rope = hidden[:, kept], (rope[0][:, kept], rope[1][:, kept])
        else:
            hidden = block(hidden, position_embeddings=rope, past_key_values=cache, use_cache=True)
    return hf.lm_head(decoder.norm(hidden)[:, -1])


def eager_layer(
    block: torch.nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """One decoder layer with the eager kernel: its output [1, L, D], and its attention [1, H, L, L]."""
    attention: Any = block.self_attn
    length, shared, maps = hidden.shape[1], attention.config, []
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    mask = mask.triu(1)[None, None]
    attention.config = copy.copy(shared)
    attention.config._attn_implementation = "eager"
    hook = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    try:
        output = block(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=cache, use_cache=True)
    finally:
        hook.remove()
        attention.config = shared
    return output, maps[0]


# Both


def build(args: argparse.Namespace) -> Llava:
    """The model of a worker's flags. Its CPU threads are those of OMP_NUM_THREADS, which the parent sets."""
    if args.shape not in SHAPES:
        raise unknown("shape", args.shape, SHAPES)
    return random_llava(args.shape, args.distinct, args.dtype, args.layers)


def described(model: Llava, runs: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker says of itself."""
    return {
        "ready": runs,
        **versions(),
        "model": model.name,
        "layers": model.spec.layers,
        "distinct_layers": args.distinct,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "text tokens": len(model.prompt(noise_batches(model, 1, differ=False)(0)[0]).ids) - 1,
    }


def serve_alternately(ready: dict[str, Any], calls: Callable[[int], dict[str, Callable[[], float]]]) -> None:
    """Be a worker whose calls are measured forwards in even measurements and backwards in odd ones.

    Args:
        calls: number of the measurement -> what is called by name; each returns its seconds.
    """
    numbers = itertools.count()

    def measure() -> dict[str, float]:
        number = next(numbers)
        asked = calls(number)
        spent = {name: asked[name]() for name in list(asked)[:: 1 if number % 2 == 0 else -1]}
        return {name: spent[name] for name in asked}

    serve(ready, measure)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code when the input ends."""
    parser = make_parser("eval.efficiency.peer_workers", __doc__)
    workers = parser.add_subparsers(required=True, metavar="ours|stock")
    own = workers.add_parser("ours", help="methods of this repository", allow_abbrev=False)
    own.add_argument("--method", required=True, help="a name of `vtr show methods`, or several separated by commas")
    own.add_argument("--budget", type=int, help="visual tokens to keep; needless with --method full")
    own.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[METHOD.]KEY=VALUE",
        help="an option of the method or of one of them",
    )
    own.add_argument("--oracle", action="store_true", help="measure the methods' oracles, too")
    own.set_defaults(run=ours)
    theirs = workers.add_parser("stock", help="transformers on the same weights", allow_abbrev=False)
    theirs.add_argument(
        "--attentions", action="store_true", help="measure output_attentions=True beside the dense model"
    )
    theirs.add_argument("--layer", type=int, help="prune before this decoder layer")
    theirs.add_argument("--keep", type=int, help="visual tokens from that layer on")
    theirs.set_defaults(run=stock)
    for worker in (own, theirs):
        worker.add_argument("--shape", default="llava-1.5-7b", help=f"one of {', '.join(SHAPES)}")
        worker.add_argument("--layers", type=int, help="decoder layers; all of the real model if left out")
        worker.add_argument("--distinct", type=int, default=4, help="decoder layers with their own weights")
        worker.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES), help="of the weights")
    args = parser.parse_args(arguments)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
