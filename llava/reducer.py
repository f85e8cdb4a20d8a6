"""The base class of all methods: a frozen configuration and up to three functions, one per stage.

A method never touches the model. It states which tower signals it needs, is handed states, and returns reductions;
the pipeline computes, applies, counts and places them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.errors import UserError, unknown
from llava.flops import linear_flops
from llava.layout import Layout
from llava.reduction import Reduction
from llava.sequence import Sequence
from llava.signals import Signal, text_to_visual_attention


def option(default: Any, doc: str, choices: tuple[str, ...] | None = None) -> Any:
    """A configuration field with a sentence for `--list` and, for strings, the values it may take."""
    return field(default=default, metadata={"doc": doc, "choices": choices})


@dataclass(frozen=True)
class ModelFacts:
    """What a method may need to know before it agrees to run."""

    visual_tokens: int
    layers: int
    layout: Layout
    tower_blocks: int
    has_cls: bool = True


@dataclass
class EncoderState:
    """Before the projector. B images of one batch with the same number of tokens.

    Attributes:
        features: [B, N, D] tower features.
        signals: what `Reducer.signals` asked for, [B, N, ...] float32.
        layout: origin of the N tokens.
        ids: sample ids, for seeds.
        flops: operations that the method spent beside the main path; its own functions add to it.
    """

    features: Tensor
    signals: dict[Signal, Tensor]
    layout: Layout
    ids: tuple[str, ...]
    flops: int = 0


@dataclass
class PromptState(EncoderState):
    """Before decoder layer 0, with the text in sight.

    Attributes:
        tokens: [B, N, H] projected visual tokens.
        sequence: the B full prompts, visual tokens in place.
        llm: the decoder (layers, norm, rotary_emb).
        run_layers: runs the first k decoder layers on `sequence`; for probes that need context.
    """

    tokens: Tensor | None = None
    sequence: Sequence | None = None
    llm: nn.Module | None = None
    run_layers: Callable[[Sequence, int], Tensor] | None = None

    def text_attention(self, layer: int, rows: str, rotary: bool, contextual: bool) -> tuple[Tensor, Tensor]:
        """Attention of text rows to the visual tokens at one decoder layer.

        Args:
            layer: decoder layer whose norm and projections are used.
            rows: "question" (bare question), "instruction" (with suffix) or "last" (last prompt token).
            rotary: rotate queries and keys by their positions.
            contextual: take the layer's real inputs, running all earlier layers once; else input embeddings.

        Returns:
            weights [B, H, T, N] float32 and a mask [B, T] of the rows that exist.
        """
        sequence = self.sequence
        hidden = self.run_layers(sequence, layer) if contextual else sequence.hidden
        spans = {
            "question": sequence.question,
            "instruction": sequence.instruction,
            "last": tuple((length - 1, length) for length in sequence.lengths),
        }[rows]
        index, mask = _row_index(sequence, spans)
        text = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        samples = list(range(len(sequence.lengths)))
        visual = sequence.take(hidden, samples, list(sequence.visual))
        angles: tuple = (None, None)
        if rotary:
            cos, sin = self.llm.rotary_emb(hidden, sequence.position)
            pick = lambda t: t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))  # noqa: E731
            cut = lambda t: sequence.take(t, samples, list(sequence.visual))  # noqa: E731
            angles = ((pick(cos), pick(sin)), (cut(cos), cut(sin)))
        block = self.llm.layers[layer]
        weights = text_to_visual_attention(block, text, visual, *angles)
        self.flops += _attention_row_flops(block, *text.shape[:2], visual.shape[1])
        return weights, mask


def _row_index(sequence: Sequence, spans) -> tuple[Tensor, Tensor]:
    """Padded positions [B, T] of spans of different length, and which of them are real."""
    longest = max(1, max(stop - start for start, stop in spans))
    index, mask = [], []
    for sample, (start, stop) in enumerate(spans):
        first, count = sequence.padding(sample) + start, stop - start
        index.append([first + min(i, max(count - 1, 0)) for i in range(longest)])
        mask.append([i < count for i in range(longest)])
    device = sequence.hidden.device
    return torch.tensor(index).to(device, non_blocking=True), torch.tensor(mask).to(device, non_blocking=True)


def _attention_row_flops(layer: nn.Module, batch: int, rows: int, keys: int) -> int:
    attention = layer.self_attn
    scores = 2 * rows * keys * attention.q_proj.out_features
    return batch * (linear_flops(attention.q_proj, rows) + linear_flops(attention.k_proj, keys) + scores)


@dataclass
class DecoderState:
    """Between two decoder layers. B samples with the same number of visual tokens.

    Attributes:
        tokens: [B, N, H] hidden states of the visual tokens.
        sequence: the B sequences as they are now.
        layer: index of the layer that comes next.
    """

    tokens: Tensor
    sequence: Sequence
    llm: nn.Module
    layer: int
    ids: tuple[str, ...]
    flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Reducer:
    """A method. Subclasses register themselves, add fields with `option`, and override the stages they act in.

    Attributes:
        budget: visual tokens per image, merged ones included.
        positions: "renumber" gives the shortened sequence contiguous position ids, as LLaVA does; "original" lets
            every token keep the position id it had.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    keep_cls: ClassVar[bool] = False

    budget: int
    positions: str = option("renumber", "position ids after a reduction", ("renumber", "original"))

    def __post_init__(self) -> None:
        """Reject values outside the choices of a field."""
        for known in fields(self):
            choices, value = known.metadata.get("choices"), getattr(self, known.name)
            if choices and value not in choices:
                raise UserError(f"{self.name}.{known.name} must be one of {', '.join(choices)}, got {value!r}.")

    def check(self, facts: ModelFacts) -> None:
        """Raise UserError if this method cannot run on this model at this budget."""
        if not 1 <= self.budget <= facts.visual_tokens:
            raise UserError(
                f"The budget must be 1 to {facts.visual_tokens} (visual tokens of this model), got {self.budget}."
            )

    def signals(self) -> tuple[Signal, ...]:
        """Tower signals to compute."""
        return ()

    def input_grid(self, layout: Layout) -> tuple[int, int] | None:
        """Patch grid to shrink the image to before the tower, or None."""
        return None

    def encoder(self, state: EncoderState) -> Reduction | None:
        """Reduce tower features before the projector."""
        return None

    def prompt(self, state: PromptState) -> Reduction | None:
        """Reduce visual tokens before decoder layer 0."""
        return None

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        """Decoder layers in front of which `decoder` is called."""
        return ()

    def decoder(self, state: DecoderState) -> Reduction | None:
        """Reduce visual tokens in front of decoder layer `state.layer`."""
        return None

    def acts(self, stage: str) -> bool:
        """Whether the method overrides a stage at all."""
        return getattr(type(self), stage) is not getattr(Reducer, stage)


def seed_of(*parts: object) -> int:
    """A seed that depends on the parts alone, not on process, order or batch."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def options_of(cls: type[Reducer]) -> dict[str, Field]:
    """The configuration fields of a method by name, the budget apart."""
    return {known.name: known for known in fields(cls) if known.name != "budget"}


def parse_options(cls: type[Reducer], options: dict[str, str]) -> dict[str, Any]:
    """Turn `--set` texts into values of the fields' types; unknown keys are errors with a suggestion."""
    known = options_of(cls)
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise unknown(f"option of {cls.name}", key, known)
        values[key] = _parse(f"{cls.name}.{key}", text, type(known[key].default))
    return values


def _parse(name: str, text: Any, kind: type) -> Any:
    if not isinstance(text, str):
        return text
    if kind is bool:
        table = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in table:
            raise UserError(f"{name} must be true or false, got {text!r}.")
        return table[text.lower()]
    try:
        if kind is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        return kind(text)
    except ValueError:
        word = {int: "a whole number", float: "a number", tuple: "whole numbers separated by commas"}[kind]
        raise UserError(f"{name} must be {word}, got {text!r}.") from None
