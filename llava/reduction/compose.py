"""Two methods with one budget: the second acts on top of the first, between decoder layers, or completes its choice.

`llava.reduction.compose("divprune", "fastv")` gives the class. Its name, divprune+fastv, can be used wherever the name
of a method can. Its budget B means what it means for every method: the mean over decoder layers of the visual tokens
that enter a layer. The first method acts before the decoder.

A second method between decoder layers (`Staged`): of an image with N tokens the first method leaves

    K = N^(1 - share) * B^share, rounded: with share=0.5 the geometric mean, so that both keep the same ratio.

The second receives an image of K tokens. Its stages have the budget B as their mean over all layers, including those
before the stages. With share=0 the second method does everything, with share=1 the first. Every stage numbers
positions as its method does.

A second method that is a `Completion` (`Completed`), as in divprune+restore: the first method keeps share * B tokens,
and at the same place in the model the second makes the rest of the B tokens out of those that were not kept. With tiles
it does so for each view that the first method receives.

A composition has the options of both methods, METHOD.OPTION on a command line and METHOD__OPTION in Python and in
results. `tile_budget` and `newlines` of the first method and `positions` (of the first; of a completion where there is
one) are written without a name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llava.errors import UserError
from llava.reduction.budget import in_decoder, planned, require
from llava.reduction.merging import Reduction
from llava.reduction.reducer import MethodMetadata, Reducer, Reductions, check_reductions, option, options_of
from llava.reduction.scores import TowerScore
from llava.reduction.states import DecoderState, EncoderState, PromptState
from llava.reduction.token_layout import ModelSpec, TokenLayout

POSITIONS, TILES = {"positions"}, {"tile_budget", "newlines"}  # options that a composition has once, without a name
# Where each part may act, in words and as stages.
PLACES = {
    "first": ("after the tower or before decoder layer 0", {"encoder", "prompt"}),
    "second": ("between decoder layers", {"decoder"}),
}


@dataclass(frozen=True, kw_only=True)
class Completion(Reducer, ABC):
    """A method that can also make tokens out of those that another one does not keep, as METHOD+NAME.

    Class attributes:
        completes: what it then does, in words that follow METHOD's summary.
    """

    completes: ClassVar[str]

    @abstractmethod
    def complete(self, state: EncoderState, tokens: Tensor, kept: Tensor) -> Reduction:
        """A reduction to the budget: the kept tokens, unchanged, and at least one made of the others.

        Args:
            tokens: [B, N, D] what METHOD reduces: features of the tower, or projected tokens.
            kept: [B, K] int64, indices of the tokens that METHOD keeps; none twice.
        """


@dataclass(frozen=True, kw_only=True)
class Composed(Reducer):
    """What all compositions share; `composition` makes their classes.

    Class attributes:
        roles: the attributes of an instance that hold its parts.
        plain: the options that are written without the name of their method, with it ("divprune__positions").

    Attributes:
        first: the method before the decoder.
    """

    roles: ClassVar[tuple[str, str]]
    plain: ClassVar[frozenset[str]]
    first: ClassVar[Reducer]

    def __post_init__(self) -> None:
        for role, part in zip(self.roles, self.parts, strict=True):
            names = {key: _field_name(key, part, self.plain) for key in options_of(part)}
            values = {key: getattr(self, name) for key, name in names.items() if name in options_of(type(self))}
            # A part refuses a wrong value in its own words, before the composition does.
            object.__setattr__(self, role, part(budget=self.budget, **values))
        super().__post_init__()

    @property
    def keep_cls(self) -> bool:
        return self.first.keep_cls

    def scores(self) -> tuple[TowerScore, ...]:
        return self.first.scores()

    def split_scores(self) -> tuple[TowerScore, ...]:
        return self.first.split_scores()

    def no_plan(self) -> UserError:
        return UserError(
            f"{self.name} has no plan: with these options {self.first.name} keeps a number of tokens that depends on "
            "the image."
        )


@dataclass(frozen=True, kw_only=True)
class Staged(Composed):
    """The base of compositions with a second method between decoder layers.

    Attributes:
        first: `before_decoder` gives it its budget.
        second: at the budget of the composition.
    """

    roles: ClassVar[tuple[str, str]] = ("first", "second")
    second: ClassVar[Reducer]

    share: float = option(
        0.5, "the first method leaves N^(1-share) B^share of N tokens at a budget of B; 0: all, 1: B", least=0, most=1
    )

    def check(self, spec: ModelSpec) -> None:
        first, total = self.before_decoder(spec), spec.visual_tokens
        require(first, spec)
        plan = planned(first, spec)
        if plan is None:
            raise self.no_plan()
        try:
            require(*in_decoder(self.for_image(spec).second, spec, plan[0]))
        except UserError as error:
            raise type(error)(
                f"{self.name} at a share of {self.share:g}: {first.name} leaves {plan[0]} of {total} tokens. Of these, "
                f"{error} Another {self.name}.share may do."
            ) from None

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return planned(self, spec)

    def before_decoder(self, spec: ModelSpec) -> Any:
        budget, total = self.for_image(spec).budget, spec.visual_tokens
        shared = 1 <= budget < total  # else the first method says what is wrong with the budget, or keeps everything
        return self.first.with_budget(round(total ** (1 - self.share) * budget**self.share) if shared else budget)

    def scores(self) -> tuple[TowerScore, ...]:
        return tuple(dict.fromkeys((*self.first.scores(), *self.second.scores())))

    def encoder(self, state: EncoderState) -> Reductions:
        first = self.before_decoder(state.spec)
        return None if first.keeps_all(state.features.shape[1]) else first.encoder(state)

    def prompt(self, state: PromptState) -> Reductions:
        first = self.before_decoder(state.spec)
        return None if first.keeps_all(state.tokens.shape[1]) else first.prompt(state)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return self.second.decoder_layers(layers)

    def cut_caches(self, layer: int) -> range:
        return self.second.cut_caches(layer)

    def decoder(self, state: DecoderState) -> Reductions:
        start, stop = state.start.images[0]  # all images of a state had the same number of tokens at layer 0
        second, state.spec = in_decoder(self.second, state.spec, stop - start)
        return second.decoder(state)


@dataclass(frozen=True, kw_only=True)
class Completed(Composed):
    """The base of compositions with a `Completion`.

    Attributes:
        first: at its part of the budget.
        completion: at the budget of the composition.
    """

    roles: ClassVar[tuple[str, str]] = ("first", "completion")
    completion: ClassVar[Completion]

    share: float = option(
        0.5, "share of the budget that the first method keeps, halves up, at least one token", least=0, most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "first", self.first.with_budget(max(1, int(self.share * self.budget + 0.5))))

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        self.first.check(spec)
        if self.first.tokens_per_layer(spec) is None:
            raise self.no_plan()
        if self.first.deviates("duplicates"):
            raise UserError(
                f"{self.name} needs distinct tokens: with these options {self.first.name} may keep one twice."
            )

    def crop_shares(self, layout: TokenLayout, scores: dict[TowerScore, Tensor], budget: int) -> list[int] | None:
        return self.first.crop_shares(layout, scores, budget)

    def encoder(self, state: EncoderState) -> Reductions:
        return self._completed("encoder", state, state.features)

    def prompt(self, state: PromptState) -> Reductions:
        return self._completed("prompt", state, state.tokens)

    def _completed(self, stage: str, state: EncoderState, tokens: Tensor) -> Reductions:
        returned: Reductions = getattr(self.first, stage)(state)
        if returned is None or self.first.budget == self.budget:
            return returned
        parts = [part for part, _ in check_reductions(self.first, stage, returned, state.ids, tokens.shape[1])]
        state.flops += sum(part.flops for part in parts)
        return self.completion.complete(state, tokens, torch.cat([part.kept for part in parts]))


def composition(first: type[Reducer], second: type[Reducer]) -> type[Composed]:
    """The class of `first` before the decoder with `second` inside it or, if it is a `Completion`, beside it.

    Raises:
        UserError: one of them acts elsewhere, or nothing is left for a completion.
    """
    parts, name, completed = (first, second), f"{first.name}+{second.name}", issubclass(second, Completion)
    then = second.completes if issubclass(second, Completion) else f"then {second.summary}"
    for part, (role, (where, stages)) in zip(parts[: 2 - completed], PLACES.items(), strict=False):
        if not part.acts_in or not part.acts_in <= stages:
            acts = f"acts {part.metadata.acts}" if part.acts_in or part.blind else "reduces nothing"
            raise UserError(f"{name} is no method: the {role} one may act {where} only, and {part.name} {acts}.")
    if completed and first.metadata.weights:
        raise UserError(
            f"{name} is no method: {first.name} itself merges the tokens that it does not keep, so that none are left "
            f"for {second.name}."
        )
    once = {first: TILES, second: POSITIONS} if completed else {first: POSITIONS | TILES, second: set()}
    plain = frozenset(f"{part.name}__{key}" for part, keys in once.items() for key in keys)
    leaves = {first: POSITIONS if completed else set(), second: TILES}
    options, deviations = [], {}
    for part in parts:
        for key, known in options_of(part).items():
            if key not in {"retention_ratio"} | leaves[part]:
                own = field(default=known.default, metadata=known.metadata)
                options.append((_field_name(key, part, plain), known.type, own))
        for excuse, reason in part.known_deviations.items():
            kind, condition, option_ = excuse.partition(" with ")
            if completed and part is first and not kind.startswith("unused "):
                continue  # order and weights are the completion's
            if condition:
                kind += condition + _field_name(option_, part, plain)
            elif kind.startswith("unused "):
                kind = f"unused {_field_name(kind.removeprefix('unused '), part, plain)}"
            deviations[kind] = reason
    about: dict[str, Any] = {
        known.name: "; ".join(dict.fromkeys(filter(None, (getattr(part.metadata, known.name) for part in parts))))
        for known in fields(MethodMetadata)
        if known.name not in ("reads", "release")  # those of the parts, see `registry.describe`
    }
    reads = [word for part in parts for word in part.metadata.reads]
    if completed:
        about |= {key: getattr(second.metadata, key) for key in ("rest", "order", "similarity", "weights")}
        about["acts"] = first.metadata.acts
        if "encoder" in first.acts_in:  # the vectors there
            reads = ["features" if word == "tokens" else word for word in reads]
            about["similarity"] = about["similarity"].replace("tokens", "features")
    about["reads"] = tuple(dict.fromkeys(reads))
    made: type[Composed] = make_dataclass(
        f"{first.__name__}Then{second.__name__}",
        options,
        bases=(Completed if completed else Staged,),
        frozen=True,
        kw_only=True,
        namespace={
            "__module__": __name__,
            "name": name,
            "parts": parts,
            "plain": plain,
            "summary": f"{first.summary}; {then}",
            "metadata": MethodMetadata(**about),
            "rounding": max(part.rounding for part in parts),
            "needs_text_tower": any(part.needs_text_tower for part in parts),
            "image_decides": "; ".join(filter(None, (part.image_decides for part in parts))),
            "needs_words": any(part.needs_words for part in parts),
            "known_deviations": deviations,
        },
    )
    made.acts_in = first.acts_in if completed else first.acts_in | second.acts_in
    return made


def _field_name(option_: str, part: type[Reducer], plain: frozenset[str]) -> str:
    """The composition's field for an option of a part: fastv__layer for "layer", fastv__layer=3 for "layer=3"."""
    named = f"{part.name}__{option_}"
    return option_ if named.partition("=")[0] in plain else named
