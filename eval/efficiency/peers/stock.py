"""The worker of stock transformers, on the same random weights: dense, or pruning that a user would write.

    python -m eval.efficiency.peers.stock                       # dense: `generate` for one token, SDPA
    python -m eval.efficiency.peers.stock --attentions          # dense, and with output_attentions=True beside it
    python -m eval.efficiency.peers.stock --layer 2 --keep 64   # FastV's rule, on the attention of the eager kernel

With `--attentions` a second measurement asks `generate` for the attention maps from which a user would score tokens by
the text: all modules then run the eager kernel, as after `from_pretrained(attn_implementation="eager")`.

FastV keeps the visual tokens to which the last token attends most in the layer before `--layer`. transformers returns
attention from its eager kernel alone. The script below runs that one layer with it, all others with SDPA, and drops
rows of the hidden states between two layers: what the model's public modules allow in one pass.
"""

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
from eval.efficiency.latency.questions import noise_batches
from eval.efficiency.peers.ours import add_model_flags, alternately, build, described
from eval.efficiency.peers.protocol import serve
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.llava_arch import Llava


def inputs(model: Llava, turn: int) -> tuple[Tensor, Tensor]:
    """Token ids [1, L] with a placeholder for each visual token, and pixels [1, 3, S, S], of one question."""
    sample = noise_batches(model, 1, differ=True)(turn)[0]
    place = model.hf_model.config.image_token_id
    ids: list[int] = []
    for token in model.prompt(sample).ids:
        ids += [place] * model.visual_tokens if token == IMAGE_TOKEN_INDEX else [token]
    pixels, _ = model.views(sample.image)
    return torch.tensor([ids], device=model.device), pixels.to(model.device, model.hf_model.dtype)


@torch.inference_mode()
def dense(hf: Any, ids: Tensor, pixels: Tensor) -> Tensor:
    """[1]: the first token of `generate`."""
    return hf.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=1, do_sample=False
    )[:, -1]


@torch.inference_mode()
def attentive(hf: Any, ids: Tensor, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """[1]: the first token of `generate`, and the attention maps of all decoder layers, [1, H, L, L] each."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        found = hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=1,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    finally:
        hf.set_attn_implementation(before)
    return found.sequences[:, -1], found.attentions[0]


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
    length, shared, found = hidden.shape[1], attention.config, []
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    attention.config = copy.copy(shared)
    attention.config._attn_implementation = "eager"
    hook = attention.register_forward_hook(lambda module, args, output: found.append(output[1]))
    try:
        output = block(
            hidden,
            attention_mask=mask.triu(1)[None, None],
            position_embeddings=rope,
            past_key_values=cache,
            use_cache=True,
        )
    finally:
        hook.remove()
        attention.config = shared
    return output, found[0]


def pruned_token(hf: Any, ids: Tensor, pixels: Tensor, layer: int, keep: int) -> Tensor:
    """[1]: the first token of `pruned`."""
    return pruned(hf, ids, pixels, layer, keep).argmax(-1)


def seconds(run: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code when the input ends."""
    parser = make_parser("eval.efficiency.peers.stock", __doc__)
    parser.add_argument(
        "--attentions", action="store_true", help="measure output_attentions=True beside the dense model"
    )
    parser.add_argument("--layer", type=int, help="prune before this decoder layer")
    parser.add_argument("--keep", type=int, help="visual tokens from that layer on")
    add_model_flags(parser)
    args = parser.parse_args(arguments)
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
    turns = itertools.count()

    def measure() -> dict[str, float]:
        turn = next(turns)
        ids, pixels = inputs(model, turn)
        return alternately(
            turn, {name: partial(seconds, run, model.hf_model, ids, pixels) for name, run in runs.items()}
        )

    serve(described(model, ", then ".join(runs), args), measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
