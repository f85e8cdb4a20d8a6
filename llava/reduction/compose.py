"""One method on top of another: the first before the decoder, the second between its layers, with one budget.

`llava.reduction.compose("divprune", "fastv")` gives the class. Its name, divprune+fastv, can be used wherever the name
of a method can. Its budget B means what it means for every method: the mean over decoder layers of the visual tokens
that enter a layer. Of an image with N tokens the first method leaves

    K = N^(1 - share) * B^share, rounded: with share=0.5 the geometric mean, so that both keep the same ratio.

The second receives an image of K tokens. Its stages have the budget B as their mean over all layers, including those
before the stages. With share=0 the second method does everything, with share=1 the first.

A composition has the options of both methods, METHOD.OPTION on a command line and METHOD__OPTION in Python and in
results. `positions`, `tile_budget` and `newlines` of the first method are written without its name. Every stage numbers
positions as its method does.
"""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, ClassVar

from llava.errors import UserError
from llava.reduction.budget import in_decoder, planned, require
from llava.reduction.reducer import MethodMetadata, Reducer, Reductions, option, options_of
from llava.reduction.scores import TowerScore
from llava.reduction.states import DecoderState, EncoderState, PromptState
from llava.reduction.token_layout import ModelSpec

OWN = ("positions", "tile_budget", "newlines")  # of the first method, without its name
# Where each part may act, in words and as stages.
PLACES = {
    "first": ("after the tower or before decoder layer 0", {"encoder", "prompt"}),
    "second": ("between decoder layers", {"decoder"}),
}


@dataclass(frozen=True, kw_only=True)
class Composed(Reducer):
    """The base of all compositions; `composition` makes their classes.

    Attributes:
        first: the method before the decoder; `before_decoder` gives it its budget.
        second: the method between decoder layers.
    """

    first: ClassVar[Reducer]
    second: ClassVar[Reducer]

    share: float = option(
        0.5, "the first method leaves N^(1-share) B^share of N tokens at a budget of B; 0: all, 1: B", least=0, most=1
    )

    def __post_init__(self) -> None:
        for role, part in zip(("first", "second"), self.parts, strict=True):
            names = {key: _field_name(key, part, role == "first") for key in options_of(part)}
            values = {key: getattr(self, name) for key, name in names.items() if name in options_of(type(self))}
            # A part refuses a wrong value in its own words, before the composition does.
            object.__setattr__(self, role, part(budget=self.budget, **values))
        super().__post_init__()

    @property
    def keep_cls(self) -> bool:
        return self.first.keep_cls

    def check(self, spec: ModelSpec) -> None:
        first, total = self.before_decoder(spec), spec.visual_tokens
        require(first, spec)
        plan = planned(first, spec)
        if plan is None:
            raise UserError(
                f"{self.name} has no plan: with these options {first.name} keeps a number of tokens that depends on "
                "the image."
            )
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
        return self.first.scores()

    def split_scores(self) -> tuple[TowerScore, ...]:
        return self.first.split_scores()

    def encoder(self, state: EncoderState) -> Reductions:
        first = self.before_decoder(state.spec)
        return None if first.keeps_all(state.features.shape[1]) else first.encoder(state)

    def prompt(self, state: PromptState) -> Reductions:
        first = self.before_decoder(state.spec)
        return None if first.keeps_all(state.tokens.shape[1]) else first.prompt(state)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return self.second.decoder_layers(layers)

    def decoder(self, state: DecoderState) -> Reductions:
        start, stop = state.start.images[0]  # all images of a state had the same number of tokens at layer 0
        second, state.spec = in_decoder(self.second, state.spec, stop - start)
        return second.decoder(state)


def composition(first: type[Reducer], second: type[Reducer]) -> type[Composed]:
    """The class of `first` before the decoder and `second` inside it.

    Raises:
        UserError: one of them acts elsewhere.
    """
    parts, name = (first, second), f"{first.name}+{second.name}"
    for part, (role, (where, stages)) in zip(parts, PLACES.items(), strict=True):
        if not part.acts_in or not part.acts_in <= stages:
            acts = f"acts {part.metadata.acts}" if part.acts_in else "reduces nothing"
            raise UserError(f"{name} is no method: the {role} one may act {where} only, and {part.name} {acts}.")
    options, deviations = [], {}
    for part in parts:
        leaves = {"retention_ratio"} | ({"tile_budget", "newlines"} if part is second else set())
        for key, known in options_of(part).items():
            if key not in leaves:
                own = field(default=known.default, metadata=known.metadata)
                options.append((_field_name(key, part, part is first), known.type, own))
        for excuse, reason in part.known_deviations.items():
            kind, condition, option_ = excuse.partition(" with ")
            if condition:
                kind += condition + _field_name(option_, part, part is first)
            elif kind.startswith("unused "):
                kind = f"unused {_field_name(kind.removeprefix('unused '), part, part is first)}"
            deviations[kind] = reason
    about: dict[str, Any] = {
        known.name: "; ".join(dict.fromkeys(filter(None, (getattr(part.metadata, known.name) for part in parts))))
        for known in fields(MethodMetadata)
        if known.name not in ("reads", "release")  # those of the parts, see `registry.describe`
    }
    about["reads"] = tuple(dict.fromkeys(word for part in parts for word in part.metadata.reads))
    made: type[Composed] = make_dataclass(
        f"{first.__name__}Then{second.__name__}",
        options,
        bases=(Composed,),
        frozen=True,
        kw_only=True,
        namespace={
            "__module__": __name__,
            "name": name,
            "parts": parts,
            "summary": f"{first.summary}; then {second.summary}",
            "metadata": MethodMetadata(**about),
            "rounding": max(part.rounding for part in parts),
            "needs_text_tower": any(part.needs_text_tower for part in parts),
            "adaptive": "; ".join(filter(None, (part.adaptive for part in parts))),
            "known_deviations": deviations,
        },
    )
    made.acts_in = first.acts_in | second.acts_in
    return made


def _field_name(option_: str, part: type[Reducer], is_first: bool) -> str:
    """The composition's field for an option of a part: fastv__layer for "layer", fastv__layer=3 for "layer=3"."""
    return option_ if is_first and option_.partition("=")[0] in OWN else f"{part.name}__{option_}"
