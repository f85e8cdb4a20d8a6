"""Run models of other evaluation harnesses, lmms-eval and VLMEvalKit, under a method.

A harness writes its own prompts and calls `generate` of a transformers model. `UnderMethod` runs these calls inside
`reduce`, passes on the question of each prompt, and counts what was kept.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from eval.benchmarks.llava_files import split_suffix
from eval.results.cost import accounting_record, off_budget, summarise_accounting
from eval.results.report import tokens_text
from llava.budget import RETENTION_RATIO, budget_text
from llava.errors import UserError
from llava.hf.interface import ScriptModel
from llava.hf.patch import Override
from llava.hf.reduce import reduce
from llava.reduction import registry
from llava.reduction.reducer import Reducer

P = ParamSpec("P")
T = TypeVar("T")
IMAGE_IDS = ("image_token_id", "image_token_index", "video_token_id")  # their names in model configurations
# Marks the place of an image in the text of a task; a prompt has the model's own image tokens there.
PLACEHOLDER = re.compile(r"<image(?: \d+)?>")


def ends_the_process(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that a UserError ends the process with one sentence and exit code 2.

    Both harnesses would catch the exception, go on to the next task and exit with 0.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            raise SystemExit(2) from error

    return guarded


def refuse_ranks(name: str, instead: str) -> None:
    """Raise UserError if this is one of several processes, because that was never tried."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} runs in one process; {instead}.")


@dataclass(frozen=True)
class Choice:
    """A method and its budget, checked as far as possible before the model is loaded.

    Attributes:
        options: of the method, as text.
        text_tower: folder or hub id of the CLIP whose text half some methods need.
    """

    method: str
    budget: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    text_tower: str | None = None

    def __post_init__(self) -> None:
        known = self.budget is not None or RETENTION_RATIO in self.options
        registry.build(self.method, self.budget if known else 1, dict(self.options))


class UnderMethod:
    """A harness's model whose `generate` runs under a method inside `asking`.

    Args:
        model: a transformers model of a family that `reduce` takes, or one from `load_pretrained_model`.
        tokenizer: its tokenizer or processor; None if it has none, which is an error for methods that read the
            question.

    Attributes:
        accounts: one record per prompt so far, see `accounting_record`.

    Raises:
        UserError: `reduce` does not take the model, or not with this method.
    """

    def __init__(self, model: Any, choice: Choice, tokenizer: Any = None) -> None:
        # A ScriptModel enters its own `reduced` in each call and passes it the questions.
        runtime = model.runtime if isinstance(model, ScriptModel) else model
        self.model, self.scripted = model, runtime is not model
        self.tokenizer = runtime.tokenizer if self.scripted else getattr(tokenizer, "tokenizer", tokenizer)
        reads = "question" in registry.method(choice.method).metadata.reads
        if reads and self.tokenizer is None:
            raise UserError(f"{choice.method} reads the question, and this model class has no `tokenizer` to find it.")
        self.reduced = reduce(
            runtime,
            choice.method,
            choice.budget,
            questions=[] if reads else None,
            tokenizer=self.tokenizer,
            text_tower=choice.text_tower,
            **choice.options,
        )
        self.accounts: list[dict[str, Any]] = []
        self._matches = reads and not self.scripted
        self._asked: dict[str, str] = {}
        self._end: str | None = None  # what the model's template adds after each text
        self._failure: Exception | None = None

    @contextmanager
    def asking(self, texts: Iterable[str]) -> Iterator[None]:
        """Run `model.generate` under the method inside this context; afterwards the model is restored in any case.

        Args:
            texts: the texts of the tasks that are asked inside, in any order. An answer-format instruction of LLaVA's
                benchmark files at the end of a text is not part of the question.

        Raises:
            UserError: a prompt contains none of the texts, or `reduce` refuses something. The error ends the harness's
                loop, even if that would turn errors into empty answers.
        """
        self._failure = None
        if self._matches:
            self._asked = {}
            for text in texts:
                text = PLACEHOLDER.sub("", text)
                # Decoded like the prompts, so that unknown words look the same in both.
                spelled = self._decoded(self.tokenizer(text, add_special_tokens=False).input_ids)
                self._asked[spelled] = split_suffix(text)[0]
        with ExitStack() as stack:
            if self.scripted:
                stack.callback(setattr, self.model, "reduced", self.model.reduced)
                self.model.reduced = self.reduced
            else:
                stack.enter_context(self.reduced)
            stack.callback(Override(self.model, "generate", self._generate).restore)
            with suppress(_Stopped):
                yield
            if self._failure is not None:
                raise self._failure

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            if self._matches:
                ids: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
                mask = torch.ones_like(ids) if kwargs.get("attention_mask") is None else kwargs["attention_mask"]
                self.reduced.questions = [self._question(row[real.bool()]) for row, real in zip(ids, mask, strict=True)]
            output = original(*args, **kwargs)
            self.accounts += map(accounting_record, self.reduced.accounting)
            return output
        except Exception as error:
            self._failure = error
            raise _Stopped from error

    def _question(self, prompt: Tensor) -> str:
        """The question of a prompt [L]: the longest of the texts that stands right before the end of the template."""
        images = {getattr(self.model.config, name, None) for name in IMAGE_IDS}
        written, end = self._decoded([token for token in prompt.tolist() if token not in images]), self._end
        found = [text for text in self._asked if (text in written if end is None else written.endswith(text + end))]
        if not any(found):
            raise UserError(
                f"The prompt that ends with {written[-60:]!r} holds none of the {len(self._asked):,} texts that the "
                "tasks ask as a whole, so the method cannot be told its question; take a method that does not read it, "
                "or a model class that writes the text of a task in one piece (docs/harnesses.md)."
            )
        longest = max(found, key=len)
        self._end = written.rpartition(longest)[2]
        return self._asked[longest]

    def _decoded(self, ids: list[int]) -> str:
        """The text of token ids without any white space."""
        return "".join(str(self.tokenizer.decode(ids)).split())

    def close(self) -> None:
        """Print the visual tokens per layer; UserError if no image of any prompt was reduced."""
        reducer = self.reduced.reducer
        if not any(record["visual_tokens"] for record in self.accounts):
            raise UserError(
                f"0 prompts were reduced by {reducer.name}: `generate` of this {type(self.model).__name__} was called "
                f"with {len(self.accounts):,} prompts and no image, so the answers say nothing of the method."
            )
        conclude(self.accounts, reducer)


class _Stopped(BaseException):
    """An error inside `generate`; no Exception, because many model classes of lmms-eval catch these and answer ""."""


def conclude(accounts: Sequence[Mapping[str, Any]], reducer: Reducer) -> None:
    """Print the mean number of visual tokens per layer, with a warning if it misses the budget."""
    if off := off_budget(accounts, reducer):
        print(f"Warning: {off['remark']}", file=sys.stderr)
    mean, budget = summarise_accounting(accounts), budget_text(reducer.budget, reducer.retention_ratio)
    at = "" if reducer.name == "full" else f" at {budget}"
    print(
        f"{reducer.name}{at}: {tokens_text(mean)} visual tokens per layer, mean of "
        f"{mean['samples'] - mean['without_image']:,} prompts with images.",
        flush=True,
    )
