"""One run's configuration: what the user asked for, its method, what its answers depend on, and where they go.

Needs no torch.
"""

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.answers.source_hash import answer_sources, flatten
from eval.benchmarks.base import Dataset
from llava.budget import BLIND, RETENTION_RATIO, WITHOUT_BUDGET
from llava.errors import UserError, unknown
from llava.places import ASSETS, PACKAGES

ROOT = PACKAGES  # as the tests call the checkout that they run in
DEFAULT_DATA = ASSETS / "eval"
# The method without reduction: its budget is all there is.
FULL = "full"
# Said first by every table, page and figure whose numbers a toy model gave.
TOY_BANNER = (
    "TOY MODEL: the numbers are of a small LLaVA that this repository trains on drawn scenes. They are not results of "
    "any published model."
)


def embedded_model(name: str) -> str:
    """Folder of a bundled toy model, whether it is there or not."""
    return str(ASSETS / name)


ENGINES = ("own", "vllm")
# Precisions whose rounding can decide an answer.
HALF = ("float16", "bfloat16")
FILLING = 64  # questions at once that keep an engine busy
DEFAULT_MODEL = embedded_model("tinyllava")


def is_toy(model: str) -> bool:
    """Whether a folder or the stored name of a model is one of the bundled toys, which are all called tinyllava."""
    return Path(model).resolve().name.startswith("tinyllava")


@dataclass(frozen=True)
class RunConfig:
    """What the user asked for. Flags of `python -m eval` take their help from here.

    Attributes:
        budget: visual tokens per image; None for the methods "full" and "none", and where `options` hold a ratio.
        split: None for the benchmark's default.
        output: None for results/<benchmark>-<split>/<model>/<method>-<budget>.
        batch_size: questions answered at once; default: 8, with --engine vllm 64
        limit: ask the first LIMIT questions only; its result goes to OUTPUT/limitLIMIT
        options: the method's own fields, as text; the registry parses them.
        dtype: of the weights
        device: torch device
        max_new_tokens: longest answer; default: what the benchmark's profile says
        seed: for methods that draw random numbers, and for the intervals
        wandb: W&B logging
        restart: move an earlier run in the output folder aside; with --limit only if it asks every question again that
            has an answer there
        text_tower: the CLIP that the vision tower comes from, for methods that read its text half
        image: how images are read, where the model's family leaves a choice; llava.model.builder parses the texts.
        quantization: hold the decoder in 8 or 4 bits (bitsandbytes)
        profile: how questions are asked and answers read, eval.benchmarks.base.PROFILES; None for the default one.
        source: which files the questions come from, eval.benchmarks.base.SOURCES.
        judge: who scores answers that a model has to judge; see eval/judging/choice.py. Answers do not depend on it.
        failed: questions that failed before: "skip", "again" (ask them with the others) or "only" (ask no others).
        tensor_parallel: split one model over N ranks; GPUS, RANKS or HOSTFILE in the environment say how many there are
        zero: ZeRO-Inference: keep the decoder in 'cpu' memory and fetch it layer by layer; 'none' divides it over the
            accelerators of --zero-ranks
        zero_ranks: with --zero: ranks that share one model's weights
        table: paper table that the run belongs to: its group in W&B
        engine: what decodes: this package, or vLLM in one process (docs/models/serving.md)
        quiet: print warnings and the result's sentence only: no progress bars, single numbers or costs
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
    image_options: dict[str, str] = field(default_factory=dict)
    quantization: str | None = None
    profile: str | None = None
    source: str = "auto"
    judge: str = "auto"
    failed: str = "skip"
    tensor_parallel: int = 1
    zero: str | None = None
    zero_ranks: int = 1
    table: str | None = None
    engine: str = "own"
    quiet: bool = False

    def __post_init__(self) -> None:
        ratio = self.retention_ratio
        if self.restart and self.failed == "only":
            raise UserError("--restart asks every question anew, also those that failed; leave out --retry-failed.")
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        alone = ("tensor_parallel", "zero", "quantization")
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        changed = [f"--{name.replace('_', '-')}" for name in alone if getattr(self, name) != usual[name]]
        if self.engine != "own" and changed:
            raise UserError(f"{' and '.join(changed)} cannot be used with --engine {self.engine}; leave one out.")
        if self.zero_ranks > 1 and self.zero is None:
            raise UserError(f"--zero-ranks {self.zero_ranks} needs --zero, which says where the weights are kept.")
        if self.engine != "own" and self.method == BLIND:
            raise UserError(
                f"{BLIND} cannot be used with --engine {self.engine}, which keeps at least one visual token of each "
                "image; leave --engine out."
            )
        if ratio is None and self.budget is None and self.method not in WITHOUT_BUDGET:
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


def setting_help() -> dict[str, str]:
    """Attribute of RunConfig -> what its documentation says of it."""
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.cleandoc(RunConfig.__doc__ or ""), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


# -- values of the command line -------------------------------------------------------------------------------------


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


def whole_number(name: str, text: str, minimum: int = 1, maximum: int | None = None) -> int:
    """A count from the environment or from another program's arguments; UserError for other texts."""
    try:
        return count(text, minimum, maximum)
    except ValueError as error:
        raise UserError(f"{name} {error}.") from None


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


def shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def pairs(flag: str, settings: Sequence[str]) -> dict[str, str]:
    """["merge=spatial"] -> {"merge": "spatial"}."""
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (equals and key and value):
            raise UserError(f"{flag} should look like merge=spatial, got {setting!r}.")
        if key in values:
            raise UserError(f"{flag} {key} is given twice.")
        values[key] = value
    return values


def options_by_method(methods: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Options from --set: METHOD.KEY=VALUE for one method, KEY=VALUE for all of `methods`.

    METHOD may be a part of a composition: fastv.layer=3 is for fastv, and for divprune+fastv.

    Returns:
        Method -> option -> text; every method is there.

    Raises:
        UserError: a setting is of another form, for a method that does not run, or given twice.
    """
    options: dict[str, dict[str, str]] = {method: {} for method in methods}
    for setting in settings:
        name, equals, value = setting.partition("=")
        prefix, dot, key = name.partition(".") if "." in name else ("", "", name)
        if not (equals and key) or (dot and not prefix):
            example = " or ".join(f"{form}=value" for form in (f"{methods[0]}.key", "key"))
            raise UserError(f"--set should look like {example}, got {setting!r}.")
        meant = [(method, key if not dot or method == prefix else name) for method in methods]
        meant = [one for one in meant if not dot or prefix in (one[0], *one[0].split("+"))]
        if not meant:
            raise UserError(f"--set {setting} is for method {prefix!r}, but this run is of {', '.join(methods)!r}.")
        for method, key in meant:
            if key in options[method]:
                raise UserError(f"--set {method}.{key} is given twice.")
            options[method][key] = value
    return options


if TYPE_CHECKING:
    from llava.reduction.reducer import Reducer


# -- the method, what answers depend on, and their folder -----------------------------------------------------------


def build_reducer(config: RunConfig, visual_tokens: int | None) -> "Reducer":
    """The method of this run, with --seed as its seed if it has one and was not given another.

    Args:
        visual_tokens: of the model; None before it is loaded, to find wrong names and options in time.
    """
    from llava.reduction import registry

    method = registry.method(config.method)  # refuses an unknown name
    options = config.options
    if config.seed != 0:  # for methods that draw random numbers
        seeds = [field.name for field in dataclasses.fields(method) if field.name.split("__")[-1] == "seed"]
        options = {name: str(config.seed) for name in seeds if name.replace("__", ".") not in options} | options
    budget = config.budget
    if config.retention_ratio is not None or method.blind:
        return registry.build(config.method, budget, options, visual_tokens)
    if visual_tokens is not None and config.method == FULL:
        if budget not in (None, visual_tokens):
            raise UserError(f"full keeps all {visual_tokens} visual tokens; leave the budget {budget} out.")
        budget = visual_tokens
    if visual_tokens is not None and (budget is None or budget > visual_tokens):
        raise UserError(f"--budget should be 1 to {visual_tokens} (this model's visual tokens), got {budget}.")
    return registry.build(config.method, budget or 1, options)


def plain(reducer: "Reducer") -> dict[str, Any]:
    """The method's full configuration in JSON types."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(reducer), default=str))
    return values


def store_settings(config: RunConfig, split: str, data: Dataset, model: Any, reducer: "Reducer") -> dict[str, Any]:
    """Settings an answer depends on, except image hashes, which are stored beside them.

    The limit is not here: answers do not depend on it. Nor are labels: they are what scores depend on. Nor is the batch
    size, although answers in half precision depend on it a little: no setting fixes it, because a batch that does not
    fit into memory is divided, failed questions are asked alone and the last batch takes what is left. A store that
    holds several says so in its result (eval.results.cost.mixed_batches).
    """
    engine = getattr(model, "engine", None)
    code, whole = answer_sources(model, engine), answer_sources(model, engine, reducer)
    text_tower = {"text_tower": model.text_tower_fingerprint} if getattr(reducer, "needs_text_tower", False) else {}
    return {
        **text_tower,
        "benchmark": config.benchmark,
        "split": split,
        # The first profile is the one that the folder's name means when it says none.
        **({"profile": config.profile} if config.profile not in (None, "llava") else {}),
        "questions": data.questions_digest,
        "model": model.name,
        "model_files": model.fingerprint,
        "conversation": str(model.conversation),
        "dtype": config.dtype,
        **({"image_options": model.conventions} if getattr(model, "conventions", None) else {}),
        **({"quantization": config.quantization} if config.quantization else {}),
        **({"engine": engine.settings} if engine else {}),
        # Other kernels round otherwise; the index of the device does not matter.
        "device": device_name(model).split(":")[0],
        "max_new_tokens": config.max_new_tokens or data.max_new_tokens,
        "seed": config.seed,
        "method": reducer.name,
        "config": plain(reducer),
        "code": code,
        "method_code": {name: digest for name, digest in whole.items() if name not in code},
    }


def flat_config(config: RunConfig, settings: dict[str, Any], data: Dataset, reducer: "Reducer") -> dict[str, Any]:
    """What a run was asked to do, under names that stay the same: `config` of result.json and of W&B.

    Everything is resolved: `profile` and `source` are those that were used, not "auto".
    """
    return {
        "benchmark": config.benchmark,
        "split": settings["split"],
        "profile": data.facts.get("profile") or config.profile or "llava",
        "source": data.facts.get("source") or config.source,
        "limit": config.limit,
        "model": settings["model"],
        "method": reducer.name,
        "budget": reducer.budget,
        "retention_ratio": getattr(reducer, "retention_ratio", 0.0) or None,
        "options": {key: value for key, value in settings["config"].items() if key != "budget"},
        "seed": config.seed,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "max_new_tokens": settings["max_new_tokens"],
        "judge": config.judge,
    }


def device_name(model: Any) -> str:
    return str(getattr(model, "device", "unknown"))


def default_output(config: RunConfig, split: str, model: Any, reducer: "Reducer", standard: "Reducer") -> Path:
    """results/gqa-testdev/<model>/<method>-<budget>[-<hash of what differs from the defaults>].

    Args:
        standard: the method at the same budget without options.
    """
    here, usual = flatten(plain(reducer)), flatten(plain(standard))
    changed: dict[str, Any] = {key: value for key, value in here.items() if usual.get(key) != value}
    text = json.dumps(changed | changed_fields(config), sort_keys=True)
    tail = "-" + hashlib.sha256(text.encode()).hexdigest()[:8] if text != "{}" else ""
    asked, name = f"{folder_name(config.benchmark)}-{split}", folder_name(model.name)
    return Path("results") / asked / name / f"{reducer.name}-{reducer.budget}{tail}"


@cache
def default_options(method: str) -> dict[str, Any]:
    """Option -> default in JSON types; {} for a method that is not registered."""
    from llava.reduction import options_of, registry

    try:
        known = options_of(registry.method(method))
    except UserError:
        return {}
    return {name: json.loads(json.dumps(option.default)) for name, option in known.items()}


def changed_options(method: str, options: Mapping[str, Any]) -> list[str]:
    """["alpha=1.0", "merge=none"]: options that differ from their defaults; all of a method that is not registered.

    Args:
        options: as a result holds them; the budget, a number or a ratio, is none of them.
    """
    own = {key: value for key, value in options.items() if key not in ("budget", RETENTION_RATIO)}
    plain = default_options(method)
    return [f"{k}={v}" for k, v in own.items() if k not in plain or plain[k] != v]


def changed_fields(config: RunConfig) -> dict[str, Any]:
    """Settings beside the method's options that answers depend on and that differ from their defaults."""
    names = ("dtype", "max_new_tokens", "seed", "image_options", "quantization", "profile", "engine")
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name in names if (value := getattr(config, name)) not in (usual[name], {})}


def folder_name(model: str) -> str:
    """A model's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
