"""A model class of lmms-eval's own under a reduction method: `--model reduced --model_args base=llava_hf,...`.

Checked against lmms-eval 0.7.3. The class itself loads the model, writes the prompts and decodes the answers; its
`generate_until` runs inside `reduce`.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from eval.harnesses import Choice, UnderMethod, ends_the_process, refuse_ranks
from eval.lmms_plugin import written
from llava.errors import UserError, unknown

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models import get_model, list_available_models
except ModuleNotFoundError as error:
    raise UserError(
        f"The plug-in needs lmms-eval, and {error.name} is not installed; see docs/harnesses.md, or run vtr eval."
    ) from error

NOT_WRAPPED = {"llava_reduced", "reduced"}
OWN = ("base", "method", "budget", "text_tower", "force_simple")
EXAMPLE = "as base=llava_hf,method=consensusdrop,budget=64,pretrained=llava-hf/llava-1.5-7b-hf"


class Reduced(lmms):
    """Builds the model of another class, `base`, under a method; see eval.lmms_plugin for its own arguments.

    Args:
        arguments: its own, and all that `base` takes.
    """

    is_simple = True

    @ends_the_process
    def __new__(cls, **arguments: Any) -> Any:
        refuse_ranks("reduced", "start lmms-eval without accelerate or torchrun, or set device_map=auto")
        own, of_method, rest = divided(arguments)
        if missing := {"base", "method"} - own.keys():
            raise UserError(f"--model reduced needs {' and '.join(sorted(missing))} in --model_args; {EXAMPLE}.")
        choice = Choice(own["method"], own.get("budget"), of_method, own.get("text_tower"))
        kind = class_of(own["base"], own.get("force_simple") == "true")
        refuse_unknown(rest, kind, own["base"])
        print(f"{choice.method} inside {kind.__module__}.{kind.__name__}", flush=True)
        # Of another class than this one, so that Python does not call __init__ again.
        mixed: Any = type(f"Reduced{kind.__name__}", (_Inside, kind), {})
        return mixed(choice, **rest)

    def refuse(self, requests: Sequence[Any]) -> NoReturn:
        raise AssertionError("__new__ gives objects of another class")

    loglikelihood = generate_until = generate_until_multi_round = refuse


class _Inside:
    """What stands before the base class."""

    def __init__(self, choice: Choice, **arguments: Any) -> None:
        super().__init__(**arguments)
        inside: Any = self
        self.under = UnderMethod(inside.model, choice, getattr(self, "tokenizer", None))

    @ends_the_process
    def generate_until(self, requests: Sequence[Any]) -> Any:
        if not requests:
            return []
        inside: Any = super()
        with self.under.asking(request.args[0] for request in requests):
            answers = inside.generate_until(requests)
        self.under.close()
        return answers

    @ends_the_process
    def refuse(self, requests: Sequence[Any]) -> NoReturn:
        """For the requests that are not answered: a reduced prompt has the logits of its last token alone."""
        raise UserError(
            "reduced generates one answer per question, no likelihoods and no dialogues; choose a task whose "
            "output_type is generate_until."
        )

    loglikelihood = generate_until_multi_round = generate_visual_cot = refuse


def divided(arguments: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """The model arguments as written: our own, options of the method (`set.KEY`), and those of the base as they are."""
    options = {name.removeprefix("set."): written(value) for name, value in arguments.items() if name[:4] == "set."}
    own = {name: written(arguments[name]) for name in OWN if name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in own and name[:4] != "set."}
    return own, options, rest


def class_of(base: str, simple: bool) -> Any:
    """lmms-eval's model class of this name; UserError if there is none or it cannot be imported."""
    known = set(list_available_models(include_aliases=True)) - NOT_WRAPPED
    if base not in known:
        raise unknown("base model of lmms-eval", base, known)
    try:
        return get_model(base, force_simple=simple)
    except ImportError as error:
        raise UserError(f"lmms-eval's {base} cannot be imported ({error}); install what it needs.") from error


def refuse_unknown(arguments: Mapping[str, Any], kind: type, base: str) -> None:
    """Raise UserError for an argument that no constructor of the class names: many take any, and forget it."""
    constructors: list[Any] = [one.__dict__["__init__"] for one in kind.__mro__ if "__init__" in one.__dict__]
    known = {
        name
        for constructor in constructors
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
    }
    for name in arguments:
        if name not in known:
            raise unknown(f"model argument of {base}", name, (*known, *OWN, "set.KEY"))
