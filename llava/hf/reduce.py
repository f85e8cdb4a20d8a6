"""`reduce`: run a Hugging Face vision-language model under a method.

    with reduce(model, "visiondrop", budget=64) as reduced:
        output = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    reduced.accounting[0].tokens_per_layer  # visual tokens that entered each decoder layer

LLaVA, LLaVA-NeXT, Video-LLaVA, Qwen2-VL and Qwen2.5-VL run the staged forward that answers benchmarks (patch.py), the
families of `llava.hf.families.FAMILIES` their own forward on shorter prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava.budget import RETENTION_RATIO
from llava.errors import UserError
from llava.hf.families import FAMILIES, Family, FamilyReduced, FamilyWrapper, declared, why_not
from llava.hf.models import HFWrapper, family_of, wrap_model
from llava.hf.patch import Reduced
from llava.model.checkpoint.config import QWEN
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer
from llava.reduction.registry import build, names
from llava.reduction.token_layout import ModelSpec, PatchGrid, spec_of, stitched


def reduce(
    model: PreTrainedModel,
    method: str,
    budget: int | float | str | None = None,
    *,
    questions: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_tower: str | Path | None = None,
    **options: Any,
) -> "Reduced":
    """A context in which a Hugging Face model runs under a method.

    Args:
        model: of one of the families above, in evaluation mode.
        method: a name of `llava.reduction.registry.names`.
        budget: visual tokens per image or video, mean over decoder layers, or the ratio of each image's tokens to keep
            ("1/9", 0.111). Only `full` and methods whose images decide how many tokens stay need none.
        questions: the question of each prompt of the calls inside, without template, for methods that read it. Without
            `questions`, all text after the last image is taken for the question, template included.
        tokenizer: the model's tokenizer or processor, needed with `questions`.
        text_tower: folder or hub id of the CLIP that the vision tower comes from, for methods that need its text half.
        options: of the method, as `official=True`.

    Raises:
        UserError: the model, the method, an option or the budget is not supported, or there is no budget.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if questions is not None and (isinstance(questions, str) or tokenizer is None):
        raise UserError("`questions` is a list with one string per prompt, and needs `tokenizer` (or the processor).")
    family = declared(model)
    runtime = FamilyWrapper(model, tokenizer) if family else wrap_model(model, tokenizer, text_tower)
    tokens = runtime.visual_tokens
    has_budget = budget is not None or options.get(RETENTION_RATIO)
    reducer = build(method, budget if has_budget else tokens, options, tokens)
    if family and (why := why_not(family, model.config, reducer)):
        raise UserError(why)
    if reducer.needs_text_tower and family_of(model) in QWEN:
        raise UserError(
            f"{method} needs a CLIP vision tower and its text half; the tower of {runtime.name} is no CLIP."
        )
    if reducer.needs_text_tower and (text_tower is None or questions is None):
        raise UserError(
            f"{method} compares questions with images in CLIP's space: give reduce() `questions`, `tokenizer`, and "
            "`text_tower`, the folder or hub id of the CLIP that the vision tower comes from."
        )
    _require(runtime, reducer)
    # Where images decide, no number of tokens is planned, and none is kept whole because of its size.
    if not (has_budget or method == "full") and (
        reducer.tokens_per_layer(runtime.spec) is not None or reducer.keeps_all(tokens)
    ):
        raise UserError(
            f"{method} needs a budget: the visual tokens to keep of each image (budget=64), or their ratio "
            '(budget="1/9"). "full" keeps all.'
        )
    return (FamilyReduced if family else Reduced)(model, runtime, reducer, questions)


def _require(runtime: HFWrapper, reducer: Reducer) -> None:
    """Raise UserError if no image or video that the model takes can be reduced to the budget."""
    errors = []
    for spec in runtime.candidates(reducer):
        try:
            return require(reducer, spec)
        except UserError as error:
            errors.append(error)
    raise errors[0]


# A 7B model of the families of the staged forward, with one image; the methods that need CLIP's text half have it.
LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), tower_blocks=24, has_text_tower=True)
STAGED = {"LLaVA": LLAVA, "LLaVA-NeXT": spec_of(LLAVA, stitched((2, 2), (24, 24))), "Video-LLaVA": LLAVA}


def support() -> dict[str, dict[str, str]]:
    """Family -> method -> why `reduce` refuses it, "" where it runs; for the models of default configurations."""
    table = {title: {name: _why_staged(name, spec) for name in names()} for title, spec in STAGED.items()}
    rows = {"Qwen2VLForConditionalGeneration": Family("Qwen2-VL", "")}
    rows |= {"Qwen2_5_VLForConditionalGeneration": Family("Qwen2.5-VL", ""), **FAMILIES}
    for container, family in rows.items():
        config = getattr(transformers, container).config_class()
        table[family.title] = {name: why_not(family, config, build(name, 64)) for name in names()}
    return table


def _why_staged(name: str, spec: ModelSpec) -> str:
    """Why no budget is taken of these."""
    why = ""
    for share in (2, 4, 1):
        try:
            require(build(name, spec.visual_tokens // share), spec)
            return ""
        except UserError as error:
            why = str(error)
    return why
