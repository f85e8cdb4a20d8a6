"""One run's configuration, and the readers of values from the command line. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava.budget import RETENTION_RATIO
from llava.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = str(ROOT / "assets" / "tinyllava")
DEFAULT_DATA = ROOT / "assets" / "eval"


def embedded_model(name: str) -> str:
    """Folder of a bundled toy model."""
    return str(ROOT / "assets" / name)


# Said first by every table, page and figure whose numbers a toy model gave.
TOY_BANNER = (
    "TOY MODEL: the numbers are of a small LLaVA that this repository trains on drawn scenes. They are not results of "
    "any published model."
)


def is_toy(model: str) -> bool:
    """Whether a folder or the stored name of a model is one of the bundled toys, which are all called tinyllava."""
    return Path(model).resolve().name.startswith("tinyllava")


# The method without reduction: its budget is all there is.
FULL = "full"


@dataclass(frozen=True)
class RunConfig:
    """What the user asked for.

    Attributes:
        budget: visual tokens per image; None for the method "full", and where `options` hold a retention ratio.
        split: None for the benchmark's default.
        output: None for results/<benchmark>-<split>/<model>/<method>-<budget>.
        limit: ask the first `limit` questions only. Not part of what a store depends on.
        options: the method's own fields, as text; the registry parses them.
        restart: move an earlier run in the output folder aside.
        text_tower: folder or hub id of the CLIP that the vision tower comes from, where the checkpoint names none.
        picture: how images are read, where the model's family leaves a choice; llava.model.builder parses the texts.
        quantization: "8bit" or "4bit".
        max_new_tokens: None for what the benchmark's profile says.
        profile: how questions are asked and answers read, eval.benchmarks.base.PROFILES; None for the default one.
        source: which files the questions come from, eval.benchmarks.base.SOURCES.
        failed: questions that failed before: "skip", "again" (ask them with the others) or "only" (ask no others).
        tensor_parallel: ranks that hold one model together.
        zero: hold the decoder's weights by ZeRO-Inference, see llava.model.builder.load; `zero_ranks` ranks share them.
        judge: who scores answers that a model has to judge; see eval/judging/choice.py. Answers do not depend on it.
        table: the paper table that the run belongs to, for W&B only.
        share_prefix: run what the prompts of a batch have in common once, see llava/pipeline/faster/shared_prefix.py.
            Answers do not depend on it, as they do not depend on the batch.
        compile: run tower, prefill and decoding as compiled graphs, see llava/pipeline/faster/compiled_model.py.
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
    failed: str = "skip"
    tensor_parallel: int = 1
    zero: str | None = None
    zero_ranks: int = 1
    table: str | None = None
    compile: bool = False
    share_prefix: bool = False

    def __post_init__(self) -> None:
        ratio = self.retention_ratio
        if ratio is not None and self.method == FULL:
            raise UserError(f"full keeps all visual tokens; leave the retention ratio {ratio:g} out.")
        if ratio is not None and self.budget is not None:
            raise UserError(
                f"A budget ({self.budget}) and a retention ratio ({ratio:g}) are both given for {self.method}; "
                "leave one out."
            )
        if self.restart and self.failed == "only":
            raise UserError("--restart asks every question anew, also those that failed; leave out --retry-failed.")
        if self.zero_ranks > 1 and self.zero is None:
            raise UserError(f"--zero-ranks {self.zero_ranks} needs --zero, which says where the weights are kept.")
        if ratio is None and self.budget is None and self.method != FULL:
            raise UserError(
                f"Method {self.method} needs --budget: the number of visual tokens to keep (64), or the ratio of each "
                "image's (1/9)."
            )

    @property
    def ranks_per_model(self) -> int:
        """Ranks of a replica."""
        return max(self.tensor_parallel, self.zero_ranks)

    @property
    def retention_ratio(self) -> float | None:
        """Ratio of each image's visual tokens to keep; None where a budget says how many."""
        text = self.options.get(RETENTION_RATIO, "0")
        try:
            return float(text) or None
        except ValueError:
            raise UserError(f"{self.method}.{RETENTION_RATIO} must be a number, got {text!r}.") from None


def count(text: str, minimum: int = 1, maximum: int | None = None) -> int:
    """A whole number; ValueError with what was expected."""
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < minimum or (maximum is not None and number > maximum):
        span = f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"
        raise ValueError(f"should be a whole number, {span}, got {shortened(text)!r}")
    return number


def whole_number(flag: str, text: str | None, minimum: int = 1, maximum: int | None = None) -> int | None:
    """A count from the environment or from another program's arguments; None stays None."""
    try:
        return None if text is None else count(text, minimum, maximum)
    except ValueError as error:
        raise UserError(f"{flag} {error}.") from None


def budget_of(value: int | float | None) -> tuple[int | None, dict[str, str]]:
    """A budget flag as (budget, method options)."""
    return (None, {RETENTION_RATIO: repr(value)}) if isinstance(value, float) else (value, {})


def path_name(text: str) -> str:
    """The name of a file or folder that a file system can hold; ValueError for others."""
    if "\0" in text or len(text.encode("utf-8", "replace")) > 4095:
        raise ValueError(f"should be a path of at most 4,095 bytes without NUL, got {shortened(text)!r}")
    if any(len(part.encode("utf-8", "replace")) > 255 for part in Path(text).parts):
        raise ValueError(f"should be a path whose names have at most 255 bytes each, got {shortened(text)!r}")
    return text


def table_name(text: str) -> str:
    """The name of a paper table, short enough for a tag of W&B; ValueError for others."""
    if not text.strip() or not text.isprintable() or len(text) > 64:
        raise ValueError(f"should be a name of 1 to 64 printable characters, got {shortened(text)!r}")
    return text


def shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


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
    """["consensusdrop.alpha=0.5"] or ["alpha=0.5"] -> {"alpha": "0.5"}, for one method."""
    return options_by_method([method], settings)[method]


def options_by_method(methods: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Options from --set: METHOD.KEY=VALUE for one method, KEY=VALUE for all of `methods`.

    Returns:
        Method -> option -> text; every method is there.

    Raises:
        UserError: a setting is of another form, for a method that does not run, or given twice.
    """
    options: dict[str, dict[str, str]] = {method: {} for method in methods}
    for setting in settings:
        name, equals, value = setting.partition("=")
        prefix, dot, key = name.rpartition(".")
        if not (equals and key) or (dot and not prefix):
            example = " or ".join(f"{form}=value" for form in (f"{methods[0]}.key", "key"))
            raise UserError(f"--set should look like {example}, got {setting!r}.")
        if dot and prefix not in options:
            raise UserError(f"--set {setting} is for method {prefix!r}, but this run is of {', '.join(methods)!r}.")
        for method in [prefix] if dot else methods:
            if key in options[method]:
                raise UserError(f"--set {method}.{key} is given twice.")
            options[method][key] = value
    return options
