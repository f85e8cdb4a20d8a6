"""Methods by name. The registry holds classes; `build` makes a frozen instance."""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

from llava.budget import RETENTION_RATIO, count_or_ratio, tokens_of
from llava.errors import UserError, unknown
from llava.reduction.compose import Composed, composition
from llava.reduction.reducer import Reducer, options_of
from llava.reduction.scores import WITHOUT_CLS_RULE

METHODS: dict[str, type[Reducer]] = {}
BROKEN: dict[str, str] = {}  # modules that cannot be imported, and a sentence why

# One package per paper, and one package with a file per baseline. `load_all` skips a package that is not installed.
PACKAGES = ("baselines", "consensusdrop", "visiondrop", "attnmix")


def register(name: str) -> Callable[[type[Reducer]], type[Reducer]]:
    """Class decorator: register a method under `name`."""
    if not isinstance(name, str):
        raise UserError(f'register takes the method\'s name; write @register("{name.__name__.lower()}") above it.')

    def add(cls: type[Reducer]) -> type[Reducer]:
        if "__dataclass_fields__" not in cls.__dict__:
            raise UserError(
                f"Method {name}: {cls.__name__} must be a frozen dataclass; write "
                f"@dataclass(frozen=True, kw_only=True) below @register({name!r})."
            )
        if name in METHODS and METHODS[name].__module__ != cls.__module__:
            raise ValueError(f"method {name!r} is registered twice: {METHODS[name].__module__} and {cls.__module__}")
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def load_all() -> None:
    """Import every module of the method packages, so that they register themselves.

    A module that cannot be imported is named on stderr and left out; the other methods work without it.
    """
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None:
            continue
        files = pkgutil.iter_modules(found.submodule_search_locations)
        for module in [package, *(f"{package}.{file.name}" for file in files)]:
            try:
                if module not in BROKEN:
                    importlib.import_module(module)
            except Exception as error:
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                BROKEN[module] = f"{module} cannot be imported: {kind}{' '.join(str(error).split()).rstrip('.')}."
                print(f"Warning: {BROKEN[module]} Its methods are left out.", file=sys.stderr)


def names() -> list[str]:
    load_all()
    return sorted(METHODS)


@cache
def compose(first: str, second: str) -> type[Reducer]:
    """The class of `first` with `second` on top of it, by their names; UserError if they do not go together."""
    return composition(method(first), method(second))


def method(name: str) -> type[Reducer]:
    """The class of a method; "divprune+fastv" is a composition. UserError with a suggestion for an unknown name."""
    if name not in METHODS:
        load_all()
    if name not in METHODS:
        if "+" in name:
            first, _, second = name.partition("+")
            if not first or not second or "+" in second:
                raise UserError(f"A composition names two methods, as divprune+fastv; got {name!r}.")
            return compose(first, second)
        # A method's file has its name, or its package has.
        broken = [why for module, why in BROKEN.items() if name in module.split(".")]
        silent = [
            f'{package}/{name}.py registers no method {name}; write @register("{name}") above its class.'
            for package in PACKAGES
            if f"{package}.{name}" in sys.modules
        ]
        raise UserError((broken + silent)[0]) if broken + silent else unknown("method", name, METHODS)
    return METHODS[name]


def _parse(name: str, text: Any, kind: type[Any]) -> Any:
    """Convert a text of `--set` to a field's type."""
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


def build(
    name: str, budget: int | float | str | None, options: dict[str, Any] | None = None, visual_tokens: int | None = None
) -> Reducer:
    """A configured method.

    Args:
        budget: visual tokens per image, or the ratio of each image's tokens to keep ("1/9", 0.111); None if `options`
            hold that ratio, and for the control `none`.
        options: field -> value; texts are parsed by the field's type.
        visual_tokens: visual tokens of the model's largest image, to turn a retention ratio into a budget; None if not
            known yet.

    Raises:
        UserError: an unknown name or option, a wrong value, or none or both of a budget and a retention ratio.
    """
    cls = method(name)
    known, values = options_of(cls), dict[str, Any]()
    for asked, text in (options or {}).items():
        key = option_key(cls, asked)
        if key in values:
            raise UserError(f"The option {_spelled(key)} of {cls.name} is given twice.")
        values[key] = _parse(f"{cls.name}.{_spelled(key)}", text, type(known[key].default))
    ratio = values.get(RETENTION_RATIO, 0.0)
    if ratio and budget is not None:
        raise UserError(
            f"A budget ({budget}) and a {RETENTION_RATIO} ({ratio:g}) are both given for {name}; leave one out."
        )
    if cls.blind:
        if given := ratio or budget:
            raise UserError(f"{name} keeps no visual token and takes no budget, got {given}; leave it out.")
        return cls(budget=0, **values)
    try:
        budget = ratio or count_or_ratio(budget)
    except ValueError as error:
        raise UserError(f"The budget {error}.") from None
    if isinstance(budget, float):
        if name == "full":
            raise UserError(f"full keeps all visual tokens; leave the ratio {budget:g} out.")
        values[RETENTION_RATIO] = budget
        budget = tokens_of(budget, visual_tokens or 0)
    return cls(budget=budget, **values)


def option_key(cls: type[Reducer], asked: str) -> str:
    """The field of a method that an option means.

    Raises:
        UserError: there is none.
    """
    key, known = asked.replace(".", "__"), options_of(cls)
    if issubclass(cls, Composed) and key in cls.plain:
        key = key.partition("__")[2]
    if key not in known:
        raise unknown(f"option of {cls.name}", asked, map(_spelled, known))
    return key


def _spelled(key: str) -> str:
    """The name of an option on a command line: "fastv.layer" of a composition's field "fastv__layer"."""
    return key.replace("__", ".")


def describe(*chosen: str) -> list[dict[str, Any]]:
    """Name, summary, sources and options of methods, by default of all, for `vtr show methods`."""
    rows = []
    for name in chosen or names():
        cls = method(name)
        parts = cls.parts or (cls,)
        sources = [part.metadata for part in parts]
        differences = []
        for part in parts:
            if part.metadata.code:
                _, _, rest = (sys.modules[part.__module__].__doc__ or "").partition("Differs from it:")
                differences += [f"{part.name}:"] * bool(cls.parts) + rest.partition("\n\n")[0].split()
        options = [
            {
                "name": _spelled(key),
                "type": type(known.default).__name__,
                "default": known.default,
                "choices": known.metadata.get("choices"),
                "doc": known.metadata.get("doc", ""),
            }
            for key, known in options_of(cls).items()
        ]
        stated = {
            f"{part.name} {name}" if cls.parts else name: clause
            for part in parts
            if part.metadata.release
            for name, clause in asdict(part.metadata.release).items()
            if clause
        }
        known_sources = {
            "paper": "; ".join(f"{about.paper} {about.url}" for about in sources if about.paper),
            "reads": ", ".join(cls.metadata.reads),
            "without a CLS token": WITHOUT_CLS_RULE if any("CLS" in about.needs for about in sources) else "",
            "the image decides how many tokens are kept": cls.image_decides,
            "official code read": cls.metadata.code,
            "differs from the release": " ".join(differences),
            "determinism of the release": stated,
        }
        about = {"name": name, "summary": cls.summary}
        rows.append(about | {key: text for key, text in known_sources.items() if text} | {"options": options})
    return rows
