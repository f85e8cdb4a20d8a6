"""A method inside an engine: which methods can run there, how many tokens an image keeps, and the reduction itself.

An engine reserves the tokens of an image before the tower runs, and caches the tower's output for the image alone,
whatever the question. So a method must know from the size of an image how many tokens it keeps, must not read the
question, and must act before the decoder. `why_not_pixels` says which of these a method fails. Every method that acts
before the decoder can run in the client instead, which sends whole prompts as embeddings (llava/serving/client.py).

The engine's own tower and projector run. Their output goes through the stages that answer benchmarks
(llava/pipeline/stages.py), in prompts that consist of one image. Tower scores come from the queries and keys that the
tower passes to its attention kernel (llava/model/multimodal_encoder/stock_tower.py). Nothing here imports the engine.

Differs from the pipeline: with positions of three axes, text after an image keeps the positions that it has with all
visual tokens (`positions=original`), because the engine numbers the text before it knows which tokens are kept.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from llava.budget import BLIND, FULL
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError, unknown
from llava.hf.families import FAMILIES, Family, joined, layout_of
from llava.model.llava_arch import EncodedImage, encoded_image_of
from llava.model.multimodal_encoder.clip_encoder import Encoded
from llava.model.multimodal_encoder.stock_tower import Call, StockTower
from llava.pipeline.accounting import Record, Timer
from llava.pipeline.stages import Stages, embed
from llava.processing.image import AnyresProcessor, ImageProcessor
from llava.processing.prompt import Prompt, Sample
from llava.reduction.budget import plan_image, require
from llava.reduction.reducer import Reducer
from llava.reduction.registry import build
from llava.reduction.scores import TowerScore
from llava.reduction.states import PromptState
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout, single, spec_of
from llava.serving import MODELS
from llava.transformers_names import refuse_others

SETTINGS = ("method", "budget", "options")  # the keys of "vtr" in --hf-overrides '{"vtr": {...}}'
CLIP = Family("LLaVA", "vision_tower.vision_model.encoder.layers", cls=0)
ONLY_IMAGE = Prompt((IMAGE_TOKEN_INDEX,), (1, 1), (1, 1), "<image>")


# Which methods


class _Question:
    """Takes the place of the prompts in a state, and raises Read when a method uses them."""

    class Read(Exception):
        pass

    def __getattr__(self, name: str) -> NoReturn:
        raise self.Read


def reads_question(reducer: Reducer) -> bool:
    """Whether a method reads the prompt before the decoder; found by running it on a small random image without one."""
    if reducer.needs_text_tower or reducer.needs_words:
        return True
    if "prompt" not in reducer.acts_in:
        return False
    layout, draw = PatchGrid(8, 8), torch.Generator().manual_seed(0)
    tokens = torch.rand(1, layout.tokens, 8, generator=draw)
    scores = {score: tokens if score.kind.endswith("keys") else tokens[..., 0] for score in reducer.scores()}
    absent: Any = _Question()
    state = PromptState(
        ids=("0",),
        spec=ModelSpec(layout.tokens, 1, layout, tower_blocks=1),
        features=tokens,
        tokens=tokens,
        scores=scores,
        layout=layout,
        sequence=absent,
        llm=absent,
        run_layers=absent,
    )
    try:
        reducer.with_budget(16).prompt(state)
    except _Question.Read:
        return True
    return False


def why_not_anywhere(reducer: Reducer) -> str:
    """Why no route can serve a method, in one sentence; "" if one can."""
    if "decoder" in reducer.acts_in:
        return (
            f"{reducer.name} reduces between decoder layers, where vLLM has one length for all layers; serve a method "
            'that acts before the decoder, such as consensusdrop or divprune, or use scripts/eval (engine "own").'
        )
    return ""


def why_not_pixels(reducer: Reducer, tower_blocks: int = 0, built: int = 0) -> str:
    """Why a method cannot run inside an engine, in one sentence; "" if it can.

    Args:
        tower_blocks: number of blocks of the model's tower; 0 if not known.
        built: how many of these blocks the engine builds; 0 if not known.
    """
    name, why = reducer.name, why_not_anywhere(reducer)
    if why:
        return why
    if not reducer.acts_in.isdisjoint(("tower", "input_grid")):
        why = "acts on pixels or inside the vision tower"
    elif reads_question(reducer):
        why = "reads the question, and an engine keeps an image's tokens for all questions"
    elif reducer.tokens_per_layer(ModelSpec(576, 1, PatchGrid(24, 24), 24, has_text_tower=True)) is None:
        why = "decides from the image how many tokens stay, and an engine reserves them before"
    elif built and any(score.index(tower_blocks) % tower_blocks >= built for score in reducer.scores()):
        why = f"reads a tower block behind the last that the engine builds ({built} of {tower_blocks})"
    return why and f"{name} {why}; send prompt embeddings instead: bash scripts/serve.sh {name} chooses that route."


def refuse_gaps(reducer: Reducer) -> None:
    """Raise UserError unless a method numbers its prompts 0, 1, 2, ..., as engines do."""
    if reducer.positions != "renumber" and reducer.name != FULL:
        raise UserError(
            f"An engine numbers a prompt without gaps; {reducer.name}.positions={reducer.positions} does not. "
            "Set it to renumber."
        )


# The method of an engine


@dataclass(frozen=True)
class EngineMethod:
    """A method for models with one configuration.

    Attributes:
        reducer: the method.
        spec: the model with its largest image.
        family: what must be known about the model and cannot be found in it.
        side: tokens along the edge of a tile; 0 if every image has its own grid.
        merge: patches along the edge of a token.
        anyres: how LLaVA-NeXT cuts images into tiles; None for other families.
    """

    reducer: Reducer
    spec: ModelSpec
    family: Family
    side: int
    merge: int = 1
    anyres: AnyresProcessor | None = None

    def layout(self, tokens: int, size: tuple[int, int] = (0, 0), grid: Sequence[int] = ()) -> TokenLayout:
        """The token layout of an image.

        Args:
            tokens: number of tokens that the model makes of the image.
            size: (width, height) of the image in pixels, for LLaVA-NeXT.
            grid: rows and columns of the image's tokens, if every image has its own grid.
        """
        if self.anyres is not None:
            return self.anyres.arrange(size)
        if grid:
            return single(grid[0], grid[1])
        return layout_of(tokens // self.side**2, self.side, self.side, False, False)

    def kept(self, layout: TokenLayout) -> int:
        """How many tokens an image keeps."""
        plan = plan_image(self.reducer, self.spec, layout).tokens
        assert plan is not None, "refused by why_not_pixels"
        return plan[0]


def served_by(config: Any) -> EngineMethod | None:
    """The method that a model's configuration or the environment names; None if neither does.

    Args:
        config: the model's configuration in the engine. `--hf-overrides '{"vtr": {"method": ...}}'` sets its attribute
            `vtr`. Without that, the variables VTR_METHOD and VTR_BUDGET are read.

    Raises:
        UserError: the settings are wrong, or the method cannot run inside the engine.
    """
    given = getattr(config, "vtr", None)
    if given is None:
        name = os.environ.get("VTR_METHOD", "")
        given = {"method": name, "budget": os.environ.get("VTR_BUDGET") or None} if name else None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f'vtr should be an object such as {{"method": "divprune", "budget": 64}}, got {given!r}.')
    for key in given:
        if key not in SETTINGS:
            raise unknown("setting of vtr", key, SETTINGS)
    settings = json.dumps(dict(given), sort_keys=True)
    architecture = next((name for name in config.architectures or () if name in MODELS), "")
    if not architecture:
        raise UserError(f"The plug-in serves {', '.join(MODELS)}; got a checkpoint of {config.architectures}.")
    return _served(settings, architecture, json.dumps(config.to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _served(settings: str, architecture: str, written: str) -> EngineMethod:
    given, config = json.loads(settings), json.loads(written)
    text, vision = config.get("text_config") or config, config["vision_config"]
    family = FAMILIES.get(architecture, CLIP)
    layers = text["num_hidden_layers"]
    blocks = vision.get("num_hidden_layers") or vision["depth"]
    anyres, built, merge = None, 0, 1
    if family is CLIP:
        if vision.get("model_type") != "clip_vision_model":
            raise UserError(f"The plug-in serves LLaVA with a CLIP tower, got {vision.get('model_type')}.")
        side = vision["image_size"] // vision["patch_size"]
        layer = config["vision_feature_layer"]
        built = layer % (blocks + 1) if isinstance(layer, int) else 0
        if not built or config["vision_feature_select_strategy"] != "default":
            raise UserError(
                "The plug-in serves LLaVA with the patches of one tower layer: vision_feature_layer must be one "
                "number, vision_feature_select_strategy 'default'."
            )
        spec = ModelSpec(side * side, layers, PatchGrid(side, side), blocks)
        if architecture.startswith("LlavaNext"):
            clip = ImageProcessor(size=vision["image_size"], crop=vision["image_size"])
            anyres = AnyresProcessor(clip, (side, side), config["image_grid_pinpoints"], "transformers")
            runs = [anyres.arrange(size) for size in anyres.pinpoints]
            spec = spec_of(spec, max(runs, key=lambda run: run.tokens))
    else:
        most, side, merge = text["max_position_embeddings"], 0, vision.get("spatial_merge_size", 1)
        if family.tiles:
            edge, patch = vision["image_size"][0], vision["patch_size"][0]
            side = int(edge // patch * config["downsample_ratio"])
            merge = edge // patch // side
        spec = ModelSpec(most, layers, PatchGrid(1, most), blocks, family.cls is not None)
    options = dict(given.get("options") or {})
    if family.axes and options.setdefault("positions", "original") != "original":
        raise UserError(f"{family.title} is served with positions=original: the engine numbers text before it reduces.")
    budget = given.get("budget")
    method = str(given.get("method"))
    if method == BLIND:
        raise UserError(f"{method} cannot be served: an engine keeps at least one visual token of an image.")
    if budget is None and method != FULL:
        raise UserError(f"{method} needs a budget: visual tokens per image (64), or their ratio (1/9).")
    reducer = build(method, spec.visual_tokens if budget is None else budget, options, spec.visual_tokens)
    if why := why_not_pixels(reducer, blocks, built):
        raise UserError(why)
    if not family.axes:
        refuse_gaps(reducer)
    require(
        reducer,
        spec if family is CLIP else replace(spec, visual_tokens=reducer.budget, layout=PatchGrid(1, reducer.budget)),
    )
    return EngineMethod(reducer, spec, family, side, merge, anyres)


# Inside the engine


class EngineTower:
    """Tower and projector of an engine's model as the stages see them (`llava.pipeline.stages.StagedModel`).

    Args:
        model: the engine's model.
        attentions: for each block of its tower, the module that projects queries and keys and passes them to its
            `attn`; None for a block that the engine does not build.
        group: the engine's group of tensor-parallel ranks, each of which may have a part of the tower's heads; None for
            one rank.
    """

    def __init__(self, model: Any, served: EngineMethod, attentions: Sequence[Any], group: Any = None):
        weight = next(model.parameters())
        self.engine_model, self.device, self.served, self.group = model, weight.device, served, group
        family, layer = served.family, getattr(model.config, "vision_feature_layer", -1)
        last = family.block or (layer if isinstance(layer, int) and layer < 0 else -1)
        self.stock_tower = StockTower(attentions, model.config.vision_config, family.cls, family.runs, last)
        self.spec, self.axes, self.clip, self.tokenizer = served.spec, family.axes, None, None
        width = model.config.get_text_config().hidden_size
        layers = [None] * served.spec.layers
        self.llm = SimpleNamespace(embed_tokens=lambda ids: weight.new_empty(len(ids), width), layers=layers)
        self.projector = model.multi_modal_projector if served.family is CLIP else nn.Identity()
        self.newline = getattr(model, "image_newline", None)

    def reduce(self, images: Sequence[EncodedImage], beside: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Reduce images.

        Args:
            beside: for each image, more channels [N, E] of its tokens, which are reduced in the same way.

        Returns:
            For each image, its tokens [K, H]; with `beside`, [K, H + E]. With positions of three axes, three more
            channels follow: frame, row and column, counted from the start of the image.
        """
        reducer = self.served.reducer
        samples = [Sample(str(number), "") for number in range(len(images))]
        stages = Stages(self, reducer, samples, Record([[] for _ in images], [[] for _ in images]), Timer(self.device))
        stages.take_images({(number, 0): image for number, image in enumerate(images)})
        sequence = embed(self, reducer, [ONLY_IMAGE] * len(images), stages.images)
        if "prompt" in reducer.acts_in:
            sequence = stages.reduce_prompt(sequence)
        out = []
        for row, length in enumerate(sequence.lengths):
            own = slice(sequence.hidden.shape[1] - length, None)
            parts = [sequence.hidden[row, own]]
            if beside is not None:
                values = beside[row][None]
                for step in stages.record.reductions[row]:
                    values = step.reduction.only(step.row).apply(values)
                parts.append(values[0])
            if self.axes:
                parts.append(sequence.position[row, own])
            out.append(torch.cat([part.to(parts[0].dtype) for part in parts], 1))
            if self.group is not None:  # ranks whose scores round differently would keep other tokens
                self.group.broadcast(out[-1])
        return out

    def clip_images(self, pixels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """For each image, its reduced tokens [K, H]; for LLaVA, whose features may be reduced before the projector.

        Args:
            pixels: for each image, its crops [C, 3, S, S].
            sizes: for each image (width, height), for LLaVA-NeXT.
        """
        reducer, side, tiled = self.served.reducer, self.served.side, self.served.anyres is not None
        layouts = [self.served.layout(side * side, size) for size in sizes]
        counts = [len(layout.crops) for layout in layouts]  # tiles that unpadding removes are not computed
        crops = torch.cat([own[:count] for own, count in zip(pixels, counts, strict=True)])
        with self.watched(tiled) as calls:
            features = self.engine_model.vision_tower(crops, feature_select_strategy="full")
        grids = [(side, side)] * len(crops)
        found = self.stock_tower.scores_of_tokens(calls, grids, 1, self.device)
        scores = {score: torch.stack(values) for score, values in found.items()}
        encoded = Encoded(features if reducer.keep_cls else features[:, 1:], scores, (side, side))
        ends = torch.tensor(counts).cumsum(0).tolist()
        parts = [encoded.rows(slice(end - count, end)) for end, count in zip(ends, counts, strict=True)]
        pairs = zip(parts, layouts, strict=True)
        return self.reduce([encoded_image_of(own, layout, reducer.keep_cls) for own, layout in pairs])

    def merged_images(
        self, encode: Callable[[], Tensor], grids: Sequence[tuple[int, int]], owners: Sequence[int]
    ) -> list[Tensor]:
        """For each image, its reduced tokens; for families whose projector makes one token from several patches.

        Args:
            encode: runs tower and projector, and returns the tokens [n, H + E] of all tiles, with E channels that
                methods do not read.
            grids: for each tile, its rows and columns of tokens.
            owners: for each tile, the number of its image, in ascending order.
        """
        with self.watched() as calls:
            tokens = encode()
        width, counts = (
            self.engine_model.config.get_text_config().hidden_size,
            [rows * columns for rows, columns in grids],
        )
        side = self.served.merge
        patches = [(rows * side, columns * side) for rows, columns in grids]
        scores = self.stock_tower.scores_of_tokens(calls, patches, side, self.device)
        views: list[list[EncodedImage]] = [[] for _ in {*owners}]
        beside: list[list[Tensor]] = [[] for _ in {*owners}]
        for i, (own, grid, owner) in enumerate(zip(tokens.split(counts), grids, owners, strict=True)):
            layout = layout_of(1, *grid, False, False)
            encoded = Encoded(own[None, :, :width], {score: values[i][None] for score, values in scores.items()}, grid)
            views[owner].append(EncodedImage(encoded, layout, layout, layout.tokens))
            beside[owner].append(own[:, width:])
        return self.reduce([joined(run) for run in views], [torch.cat(run) for run in beside])

    @contextmanager
    def watched(self, tiled: bool = False) -> Iterator[dict[TowerScore, list[Call]]]:
        """Record, inside the context, the attention of the blocks that the method's scores are read from.

        The result maps each score to the calls of its block's attention.
        """
        tower, scores = self.stock_tower, self.served.reducer.tower_scores(tiled)
        wanted = {score: tower.blocks[tower.block_of(score)] for score in scores}
        calls: dict[Any, list[Call]] = {module: [] for module in wanted.values()}
        projected: dict[Any, Tensor] = {}  # keys before norms and rotation
        hooks = []
        for module in calls:
            parts = dict(module.named_children())
            name = next(name for name in ("k_proj", "qkv_proj", "qkv") if name in parts)

            def keep(_: Any, args: Any, output: Any, module: Any = module, name: str = name) -> None:
                output = output if isinstance(output, Tensor) else output[0]
                projected[module] = output if name == "k_proj" else output.chunk(3, -1)[1]

            def note(inner: Any, args: tuple[Any, ...], given: dict[str, Any], module: Any = module) -> None:
                calls[module] += map(self.all_heads, handed_over(inner, projected[module], *args, **given))

            hooks.append(parts[name].register_forward_hook(keep))
            hooks.append(parts["attn"].register_forward_pre_hook(note, with_kwargs=True))
        try:
            yield {score: calls[module] for score, module in wanted.items()}
        finally:
            for hook in hooks:
                hook.remove()

    def all_heads(self, call: Call) -> Call:
        """A call with the heads of all ranks, in the order of ranks, where each rank has a part of them."""
        vision = self.engine_model.config.vision_config
        heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
        if self.group is None or call.query.shape[1] == heads:
            return call
        query, key, projected = self.group.all_gather(torch.stack(call[:3]), 2)
        return call._replace(query=query, key=key, projected=projected)


def handed_over(
    attention: Any, projected: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Any = None, **others: Any
) -> list[Call]:
    """The arguments of one call of an engine's encoder attention, split into images if `cu_seqlens` is given.

    Args:
        attention: the engine's module.
        projected: keys before norms and rotation, [B, P, H * d] or [P, B, H * d].
        query, key, value: [B, P, H, d] or [B, P, H * d].
        cu_seqlens: the places where images begin, and the end of the last one.

    Raises:
        UserError: there is an unknown argument, which may say where images begin.
    """
    refuse_others(others, ("max_seqlen",), "hook of a vision tower's attention", "vLLM")
    rows, columns = query.shape[:2]
    projected = projected if projected.shape[:2] == (rows, columns) else projected.transpose(0, 1)
    heads = attention.num_heads, attention.num_kv_heads, attention.num_kv_heads
    given = zip((query, key, projected), heads, strict=True)
    parts = [part.reshape(rows, columns, count, -1).transpose(1, 2) for part, count in given]
    lengths = [columns] if cu_seqlens is None else cu_seqlens.diff().tolist()
    cut = zip(*(part.split(lengths, 2) for part in parts), strict=True)
    return [Call(own_query, own_key, own_projected, None, attention.scale) for own_query, own_key, own_projected in cut]
