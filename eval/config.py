"""One run's configuration, and the sentences for flags that cannot be right."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = str(ROOT / "assets" / "tinyllava")
DEFAULT_DATA = ROOT / "assets" / "eval"


def embedded_model(name: str) -> str:
    """Folder of an embedded checkpoint."""
    return str(ROOT / "assets" / name)


# The method without reduction: its budget is all there is.
FULL = "full"


@dataclass(frozen=True)
class RunConfig:
    """What the user asked for.

    Attributes:
        budget: visual tokens per image; None only for the method "full".
        split: None for the benchmark's default.
        output: None for results/<benchmark>-<split>/<model>/<method>-<budget>.
        limit: ask the first `limit` questions only. Not part of what a store depends on.
        options: the method's own fields, as text; the registry parses them.
        restart: move an earlier run in the output folder aside.
        text_tower: folder or hub id of the CLIP that the vision tower comes from, where the checkpoint names none.
        picture: how pictures are read, where the model's family leaves a choice; llava.model.builder parses the texts.
        quantization: "8bit" or "4bit".
        max_new_tokens: None for what the benchmark's profile says.
        profile: how questions are asked and answers read, eval.dataset.PROFILES; None for the benchmark's default.
        source: which files the questions come from, eval.dataset.SOURCES.
        judge: who scores answers that a model has to judge; see eval/judging/choice.py. Answers do not depend on it.
    """

    method: str
    budget: int | None = None
    benchmark: str = "gqa"
    split: str | None = None
    model: str = DEFAULT_MODEL
    data: Path = DEFAULT_DATA
    output: Path | None = None
    batch_size: int = 8
    limit: int | None = None
    options: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "auto"
    max_new_tokens: int | None = None
    seed: int = 0
    wandb: str = "auto"
    restart: bool = False
    text_tower: str | None = None
    picture: dict[str, str] = field(default_factory=dict)
    quantization: str | None = None
    profile: str | None = None
    source: str = "auto"
    judge: str = "auto"

    def __post_init__(self) -> None:
        if self.budget is None and self.method != FULL and "share" not in self.options:
            raise UserError(f"Method {self.method} needs --budget, the number of visual tokens to keep.")


def whole_number(flag: str, text: str | None, minimum: int = 1, maximum: int | None = None) -> int | None:
    """A count from the command line; None stays None."""
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < minimum or (maximum is not None and number > maximum):
        span = f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"
        raise UserError(f"{flag} should be a whole number, {span}, got {text!r}.")
    return number


def count_or_share(flag: str, text: str | None) -> tuple[int | None, float | None]:
    """A number of tokens, or a share of each picture's tokens written as a fraction: "64" or "1/9"."""
    if text is None or "/" not in text:
        return whole_number(flag, text), None
    above, _, below = text.partition("/")
    if not (above.isdigit() and below.isdigit() and 0 < int(above) <= int(below)):
        raise UserError(f"{flag} should be a number of visual tokens or a share such as 1/9, got {text!r}.")
    return None, int(above) / int(below)


def pairs(flag: str, settings: Sequence[str]) -> dict[str, str]:
    """["merge=spatial"] -> {"merge": "spatial"}."""
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (equals and key and value):
            raise UserError(f"{flag} should look like merge=spatial, got {setting!r}.")
        if key in found:
            raise UserError(f"{flag} {key} is given twice.")
        found[key] = value
    return found


def method_options(method: str, settings: Sequence[str]) -> dict[str, str]:
    """["consensusdrop.alpha=0.5"] -> {"alpha": "0.5"}; the prefix guards against settings of another method."""
    options: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        prefix, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise UserError(f"--set should look like {method}.key=value, got {setting!r}.")
        if prefix != method:
            raise UserError(f"--set {setting} is for method {prefix!r}, but this run is of {method!r}.")
        if key in options:
            raise UserError(f"--set {method}.{key} is given twice.")
        options[key] = value
    return options
