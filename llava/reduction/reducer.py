"""The base class of all methods: a frozen configuration and one function per stage that the method acts in.

A method never changes the model. It names the tower scores it needs, receives states and returns reductions. The
pipeline computes the scores, checks the reductions (`check_reductions`), applies them and counts tokens. Options are
dataclass fields with a description and choices.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from llava.budget import tokens_of
from llava.errors import MethodError, UserError
from llava.reduction.merging import Reduction
from llava.reduction.ranking import HOST, keep_top
from llava.reduction.scores import WITHOUT_CLS, WITHOUT_CLS_RULE, TowerScore
from llava.reduction.states import BlockState, DecoderState, EncoderState, PromptState
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout


def option(
    default: Any,
    doc: str,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A configuration field with a description, and allowed values of a string or the ends of a number."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "least": least, "most": most})


def options_of(cls: type[Any]) -> dict[str, Field[Any]]:
    """The configuration fields of a method (a Reducer) by name, without the budget."""
    return {known.name: known for known in fields(cls) if known.name != "budget"}


# One reduction for all images of a state, or one per image if they keep different numbers of tokens.
Reductions = Reduction | list[Reduction] | None

STAGES = ("input_grid", "tower", "encoder", "prompt", "decoder")
SPLITS = ("each", "thumbnail", "global")
NEWLINES = ("drop", "keep")
SHOWN = 12  # indices that an error quotes


@dataclass(frozen=True)
class Release:
    """How far the official code's result depends on more than image, question and budget.

    Each attribute is one short clause for docs/methods.md; "" where nothing is to be said.

    Attributes:
        random: what it draws without a fixed seed.
        batch: how the result of one sample depends on the others of its batch.
        dtype: what the precision of the model decides.
        order: in which order other than raster the kept tokens enter the decoder.
        count: which tokens or layers its budget leaves out.
        norms: which merged tokens grow longer than the tokens that they are made of.
        ours: what is done here instead.
        licence: of the official code.
    """

    random: str = ""
    batch: str = ""
    dtype: str = ""
    order: str = ""
    count: str = ""
    norms: str = ""
    ours: str = ""
    licence: str = ""


@dataclass(frozen=True)
class MethodMetadata:
    """One row of the table of methods.

    Attributes:
        acts: where tokens are reduced ("after the tower", "before decoder layer 2", ...).
        score: what tokens are ranked by.
        rest: what is done with the tokens that are not kept.
        order: order of the kept tokens.
        needs: what it needs besides pixels and prompt ("CLS token", "CLIP text tower", ...), "" for nothing.
        paper: title and identifier, "" for a control.
        url: address of the paper.
        code: owner/name@commit of the official code that was read, "" if there is none.
        reads: everything that the kept and merged tokens depend on with default options: tower scores as kind and block
            ("cls_attention -2"), "features", "tokens", "keys" and "values" (vectors of the tower, of the decoder and
            of the block or layer where the method acts), "attention" (of the decoder, or of the block where the method
            acts), "question", "grid" (rows and columns) and "order" (a token's number in raster order).
        similarity: the vectors whose cosine says which tokens are merged, or which are too alike to keep both:
            "keys", "features" or "tokens"; "none" for a method that merges by something else.
        weights: how tokens that are merged into one are weighted: "mean" (equally), "score" (by the method's first
            tower score), "size" (by the number of patches that each stands for), "similarity" (by the cosine to the
            token that they join) or "rounds" (the mean of each of several rounds is added to the target).
    """

    acts: str
    score: str = ""
    rest: str = "dropped"
    order: str = "raster"
    needs: str = ""
    paper: str = ""
    url: str = ""
    code: str = ""
    reads: tuple[str, ...] = ()
    similarity: str = ""
    weights: str = ""
    release: Release | None = None


@dataclass(frozen=True, kw_only=True)
class Reducer:
    """A method. Subclasses register themselves, add fields with `option`, and override the stages they act in.

    Class attributes:
        acts_in: the stages that the class overrides, of "input_grid", "tower", "encoder", "prompt" and "decoder".
        summary: one line for `vtr show methods`.
        metadata: the method's row in docs/methods.md.
        rounding: the largest difference between the mean over layers and the budget, in tokens.
        needs_text_tower: whether states must carry the CLIP text tower.
        tower_by_image: whether images run through the tower one at a time, with the tiles of an image together, because
            the image decides how many tokens leave a block.
        image_decides: a clause that says how the image decides the number of its tokens, for a method that lets it by
            default: its stage returns a list of reductions, one per image, and `tokens_per_layer` returns None. ""
            where the budget decides. Results then state mean, least and most tokens of an image beside the budget.
        needs_words: whether it reads the questions as text, for `PromptState.embed_words`.
        blind: whether the model answers without its images: their places in the prompt stay empty, and the tower does
            not run. The budget is 0 then. Of all methods only the control `none` is blind.
        known_deviations: in what the method, by its definition, breaks the contract of tests/test_every_method.py, and
            why. Keys are "appended" (merged tokens come after the kept ones), "scale" (merge weights do not sum to 1),
            "duplicates", "unsorted" (tokens are in an order of the method's own), "uncounted" (the mean is off the
            budget) and "unused OPTION" (its values change nothing on a small image). " with OPTION=VALUE" at the end
            limits a key to these options.
        parts: the two methods of a composition (llava/reduction/compose.py).
        second: the second method of a composition; set on its instances.

    Attributes:
        budget: visual tokens per image, as a mean over decoder layers; merged tokens count.
        positions: "renumber" gives the shortened sequence contiguous position ids, as LLaVA does; with "original"
            every token keeps its position id.
        tile_budget: how the budget of an image is split over its tiles, see llava/reduction/budget.py. A method that
            acts only in the decoder ranks all tokens together.
        retention_ratio: ratio of each image's visual tokens to keep, for images that differ in size; `budget` is then
            the one of the largest image. 0 for the same number of tokens everywhere.
        newlines: whether a method that chooses among patches keeps the newline tokens of LLaVA-NeXT.
    """

    name: ClassVar[str] = ""
    acts_in: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = ""
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="")
    rounding: ClassVar[float] = 0.5
    needs_text_tower: ClassVar[bool] = False
    tower_by_image: ClassVar[bool] = False
    image_decides: ClassVar[str] = ""
    needs_words: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    known_deviations: ClassVar[dict[str, str]] = {}
    parts: ClassVar[tuple[type["Reducer"], ...]] = ()
    second: ClassVar["Reducer | None"] = None

    budget: int
    positions: str = option("renumber", "position ids after a reduction", ("renumber", "original"))

    tile_budget: str = option(
        "each", "the budget over tiles: even, by the base image's attention, or all together", SPLITS
    )
    retention_ratio: float = option(
        0.0, "ratio of each image's visual tokens to keep, in place of a budget", least=0, most=1
    )
    newlines: str = option("drop", "newline tokens where patches are chosen: drop, or keep and count", NEWLINES)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.acts_in = frozenset(name for name in STAGES if getattr(cls, name) is not getattr(Reducer, name))

    def __post_init__(self) -> None:
        """Reject values outside the choices or the ends of a field."""
        for known in fields(self):
            choices, value = known.metadata.get("choices"), getattr(self, known.name)
            if choices and value not in choices:
                raise UserError(f"{self.name}.{known.name} must be one of {', '.join(choices)}, got {value!r}.")
            least, most = known.metadata.get("least"), known.metadata.get("most")
            if (least is not None and not value >= least) or (most is not None and not value <= most):
                limits = f"at least {least}" if most is None else f"between {least} and {most}"
                raise UserError(f"{self.name}.{known.name} must be {limits}, got {value:g}.")

    def deviates(self, kind: str) -> str:
        """Why `known_deviations` excuses the method with these options; "" if it does not."""
        for key, reason in self.known_deviations.items():
            name, _, condition = key.partition(" with ")
            option_, _, value = condition.partition("=")
            if name == kind and (not condition or str(getattr(self, option_)).lower() == value):
                return reason
        return ""

    @property
    def keep_cls(self) -> bool:
        """Whether the encoder stage sees the CLS token as token 0, if the tower has one.

        A class attribute or an option may replace this property.
        """
        return False

    def without_cls(self, spec: ModelSpec) -> str:
        """What replaces the CLS token if this method reads it and the tower has none; else ""."""
        reads = self.keep_cls or any(score.kind in WITHOUT_CLS for score in self.scores())
        return WITHOUT_CLS_RULE if reads and not spec.has_cls else ""

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError if this method cannot run on this model at this budget."""
        if not 1 <= self.budget <= spec.visual_tokens:
            raise UserError(
                f"The budget must be 1 to {spec.visual_tokens} (visual tokens of this model), got {self.budget}."
            )
        if self.needs_text_tower and not spec.has_text_tower:
            raise UserError(
                f"{self.name} compares the question with the image in CLIP's space and needs the CLIP text tower "
                "that belongs to the vision tower; this checkpoint names none. Put it into a folder text_tower/ "
                "beside the weights (a CLIPModel's text half with both projections), or take a checkpoint whose "
                "mm_vision_tower is a whole CLIP."
            )
        asked: Any = self.scores()
        if not isinstance(asked, tuple) or not all(isinstance(score, TowerScore) for score in asked):
            raise MethodError(f"{self.name}.scores: must return a tuple of TowerScore, got {_kind(asked)}.")
        for score in self.scores():
            if not -spec.tower_blocks <= score.index(spec.tower_blocks) < spec.tower_blocks:
                raise UserError(
                    f"{self.name} reads tower block {score.block}, but the tower has {spec.tower_blocks} blocks."
                )

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        """Visual tokens of one image that are planned to enter each layer; None if that depends on the image.

        For an image with tiles, llava.reduction.budget.planned calls this for each tile at the tile's budget and adds
        the results.
        """
        return (self.budget,) * spec.layers

    def bounds(self, spec: ModelSpec) -> tuple[float, float]:
        """The least and the most visual tokens of one image, as a mean over layers.

        With a plan both are its mean. A method without one overrides this where it knows more than "1 to all".
        """
        plan = self.tokens_per_layer(spec)
        return (1.0, float(spec.visual_tokens)) if plan is None else (sum(plan) / len(plan),) * 2

    def with_budget(self, budget: int) -> Self:
        """The same method at another budget."""
        unchanged = budget == self.budget and not self.retention_ratio
        return self if unchanged else replace(self, budget=budget, retention_ratio=0.0)

    def for_image(self, spec: ModelSpec) -> Self:
        """The same method at the budget of one image."""
        if self.retention_ratio:
            return self.with_budget(tokens_of(self.retention_ratio, spec.visual_tokens))
        return self

    def before_decoder(self, spec: ModelSpec) -> Self:
        """The method that reduces an image before the decoder, at its budget; a composition returns its first one."""
        return self

    def crop_shares(self, layout: TokenLayout, scores: dict[TowerScore, torch.Tensor], budget: int) -> list[int] | None:
        """Tokens of each tile of an image by the method's own rule; None for the rule of `tile_budget`.

        Args:
            scores: tower scores [tiles, P, ...] of whole tiles before unpadding.
            budget: number of patches that all tiles together may keep.
        """
        return None

    def split_scores(self) -> tuple[TowerScore, ...]:
        """Tower scores needed to split the budget over tiles, besides the method's own."""
        return (TowerScore("cls_attention"),) if self.tile_budget == "thumbnail" else ()

    def tower_scores(self, tiled: bool) -> tuple[TowerScore, ...]:
        """All tower scores to compute for images with or without tiles."""
        return tuple(dict.fromkeys((*self.scores(), *(self.split_scores() if tiled else ()))))

    def scores(self) -> tuple[TowerScore, ...]:
        """Tower scores to compute."""
        return ()

    def input_grid(self, layout: PatchGrid) -> tuple[int, int] | None:
        """Patch grid to shrink the image to before the tower, or None."""
        return None

    def merging_blocks(self, selected: int) -> tuple[int, ...]:
        """Tower blocks inside which `tower` is called; the features are the output of the first `selected` blocks."""
        return ()

    def tower(self, state: BlockState) -> Reduction | None:
        """Reduce tokens inside a tower block; CLS stays token 0. Attention then weighs merged tokens by their size."""
        return None

    def encoder(self, state: EncoderState) -> Reductions:
        """Reduce tower features before the projector."""
        return None

    def prompt(self, state: PromptState) -> Reductions:
        """Reduce visual tokens before decoder layer 0."""
        return None

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        """Decoder layers before which `decoder` is called."""
        return ()

    def decoder(self, state: DecoderState) -> Reductions:
        """Reduce visual tokens before decoder layer `state.layer`."""
        return None

    def cut_caches(self, layer: int) -> range:
        """Earlier decoder layers from whose cache the tokens dropped before `layer` are removed, too."""
        return range(0)

    def keeps_all(self, tokens: int) -> bool:
        """Whether an image with so many tokens is left as it is before the decoder, without calling the method."""
        return self.budget >= tokens


@dataclass(frozen=True, kw_only=True)
class Scorer(Reducer, ABC):
    """A method that only ranks: it keeps the tokens with the highest scores, in raster order.

    Class attributes:
        stage: where tokens are dropped, "encoder" or "prompt".
    """

    stage: ClassVar[str] = "encoder"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.acts_in = frozenset({cls.stage})

    @abstractmethod
    def score(self, state: EncoderState) -> Tensor:
        """[B, N], higher is kept, on a tie the lower index. At the stage "prompt" the state is a PromptState."""

    def encoder(self, state: EncoderState) -> Reduction:
        return self._keep(state)

    def prompt(self, state: PromptState) -> Reduction:
        return self._keep(state)

    def _keep(self, state: EncoderState) -> Reduction:
        score, shape = self.score(state), state.features.shape[:2]
        if not isinstance(score, Tensor) or score.shape != shape:
            got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise MethodError(
                f"{self.name}.score: must return a tensor of shape {list(shape)}, a score for every token of every "
                f"image, got {got}."
            )
        # Checked on the host alone, which would have to wait for an accelerator. NaN of the model is another error.
        readable = score.device.type == HOST and score.dtype == torch.float32 and not score.requires_grad
        if readable and np.isnan(np.from_dlpack(score)).any() and state.features.isfinite().all():
            raise MethodError(f"{self.name}.score: must return numbers, got NaN for images whose features are finite.")
        return Reduction(keep_top(score, self.budget), score.shape[1])


_read: set[tuple[Reducer, str]] = set()  # methods and stages whose values were read from an accelerator once


def check_reductions(
    method: Reducer, stage: str, returned: Any, ids: Sequence[str], tokens: int
) -> list[tuple[Reduction, range]]:
    """Check what a method returned, and pair each reduction with its images: all share one, or each has one.

    Types, shapes and dtypes are known on the host. Values on the host are always read. Reading them from an accelerator
    would stall it at every stage, so they are read only for the first batch of a method with its options and budget.

    Args:
        returned: what the method's function `stage` returned; the result is empty for None.
        ids: one name per image.
        tokens: number of tokens of each image.

    Raises:
        MethodError: it is no reduction of these images and tokens.
    """
    if returned is None:
        return []
    problem, parts = "", [(returned, range(len(ids)))]
    if isinstance(returned, list):
        parts = [(reduction, range(row, row + 1)) for row, reduction in enumerate(returned)]
        if len(returned) != len(ids):
            problem = f"must return one reduction for each of {len(ids)} images, got {len(returned)}"
    for reduction, rows in parts:
        problem = problem or _wrong(method, stage, reduction, ids[rows.start : rows.stop], tokens)
    if problem:
        raise MethodError(f"{method.name}.{stage}: {problem}.")
    return parts


def _wrong(method: Reducer, stage: str, returned: Any, ids: Sequence[str], tokens: int) -> str:
    """What is wrong with one reduction of all these images; "" if nothing is."""
    count = len(ids)
    if not isinstance(returned, Reduction):
        return f"must return a Reduction, a list of them or None, got {_kind(returned)}"
    if returned.inputs != tokens:
        return f"returned a reduction of {returned.inputs} tokens, but each image has {tokens}"
    outputs = returned.kept.shape[-1] if isinstance(returned.kept, Tensor) and returned.kept.dim() else 0
    merged = (returned.assignment is None, returned.merge_weight is None)
    if merged[0] != merged[1] or (returned.merge_matrix is not None and not merged[0]):
        return "merges by assignment and merge_weight together, or by merge_matrix alone"
    wanted = {
        "kept": (torch.int64, (count, outputs)),
        "assignment": (torch.int64, (count, tokens)),
        "merge_weight": (torch.float32, (count, tokens)),
        "merge_matrix": (torch.float32, (count, outputs, tokens)),
    }
    for name, (dtype, shape) in wanted.items():
        value = getattr(returned, name)
        if value is None and name != "kept":
            continue
        if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
            kind = f"{name} must be {str(dtype).removeprefix('torch.')} of shape {list(shape)}"
            return f"{kind} for {count} images of {tokens} tokens, got {_kind(value)}"
    if returned.kept.is_meta or (returned.kept.device.type != HOST and (method, stage) in _read):
        return ""
    _read.add((method, stage))
    parts = [part for part in (returned.kept, returned.assignment) if part is not None]
    # Unlike Tensor.numpy this dispatches nothing on a CPU, where dispatches are counted as on an accelerator.
    indices, *targets = (np.from_dlpack(part if part.device.type == HOST else part.cpu()) for part in parts)
    for name, kept in zip(ids, indices, strict=True):
        raster = kept[: len(kept) - returned.appended]
        problem, cause = "", ""
        if not len(kept) or kept.min() < 0 or kept.max() >= tokens:
            problem = f"kept must hold indices of the {tokens} tokens, 0 to {tokens - 1}"
        elif len(np.unique(kept)) < len(kept) and not method.deviates("duplicates"):
            problem = "kept must not hold a token twice"
            cause = " (it also can where features or scores are not finite)"
        elif (raster[1:] < raster[:-1]).any() and not method.deviates("unsorted"):
            problem = "kept must ascend (kept.sort(dim=1).values), but for tokens that `appended` counts at the end"
        if problem:
            shown = f"[{', '.join(map(str, kept[:SHOWN]))}{', ...' if len(kept) > SHOWN else ''}]"
            return f"{problem}, got {shown} for {name}{cause}"
    for target in targets:
        if target.min(initial=0) < -returned.drops or target.max(initial=-1) >= outputs:
            least = "-1 (dropped)" if returned.drops else "0 (drops=False)"
            got = f"{target.min()} to {target.max()}"
            return f"assignment must be {least} to {outputs - 1} (output tokens), got {got}"
    return ""


def _kind(value: Any) -> str:
    """A tensor's type and shape, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {list(value.shape)}"
    return f"{value!r}" if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def seed_of(*parts: object) -> int:
    """A seed that depends on the parts alone, not on process, order or batch."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=7).digest(), "big")
