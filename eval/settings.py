"""From a configuration to the reducer, to what the answers depend on, and to the folder they go to."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.answers import flatten
from eval.answers.source_hash import answer_sources
from eval.benchmarks.base import Dataset
from eval.config import FULL, RunConfig
from llava.errors import UserError

if TYPE_CHECKING:
    from llava.reduction.reducer import Reducer


def build_reducer(config: RunConfig, visual_tokens: int | None) -> "Reducer":
    """The method of this run.

    Args:
        visual_tokens: of the model; None before it is loaded, to find wrong names and options in time.
    """
    from llava.reduction import registry

    registry.method(config.method)  # refuses an unknown name
    options = with_seed(config, registry.describe())
    if config.retention_ratio is not None:
        return registry.build(config.method, None, options, visual_tokens)
    budget = config.budget if visual_tokens is None else check_budget(config, visual_tokens)
    return registry.build(config.method, budget or 1, options)


def with_seed(config: RunConfig, methods: list[dict[str, Any]]) -> dict[str, str]:
    """The options, with --seed for methods that draw random numbers and were not given a seed of their own."""
    if config.seed == 0 or "seed" in config.options:
        return config.options
    options: list[dict[str, Any]] = next(
        (method["options"] for method in methods if method["name"] == config.method), []
    )
    takes_seed = any(option["name"] == "seed" for option in options)
    return {**config.options, "seed": str(config.seed)} if takes_seed else config.options


def check_budget(config: RunConfig, visual_tokens: int) -> int:
    """The budget in tokens, within what the model has."""
    if config.method == FULL:
        if config.budget not in (None, visual_tokens):
            raise UserError(f"full keeps all {visual_tokens} visual tokens; leave the budget {config.budget} out.")
        return visual_tokens
    if config.budget is None or config.budget > visual_tokens:
        raise UserError(f"--budget should be 1 to {visual_tokens} (this model's visual tokens), got {config.budget}.")
    return config.budget


def plain(reducer: "Reducer") -> dict[str, Any]:
    """The method's full configuration in JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(reducer), default=str))


def store_settings(config: RunConfig, split: str, data: Dataset, model: Any, reducer: "Reducer") -> dict[str, Any]:
    """Everything an answer depends on but its images, whose hashes stand beside it.

    Batch size and limit are not here: answers do not depend on them. Nor are labels: they are what scores depend on.
    """
    code, whole = answer_sources(model), answer_sources(model, reducer)
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
        **({"picture": model.conventions} if getattr(model, "conventions", None) else {}),
        **({"quantization": config.quantization} if config.quantization else {}),
        **({"compile": True} if config.compile else {}),
        # Other kernels round otherwise; the index of the device does not matter.
        "device": device_name(model).split(":")[0],
        "max_new_tokens": config.max_new_tokens or data.max_new_tokens,
        "seed": config.seed,
        "method": reducer.name,
        "version": str(reducer.version),
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
    name = folder_name(model.name)
    return Path("results") / f"{config.benchmark}-{split}" / name / f"{reducer.name}-{reducer.budget}{tail}"


def default_options() -> dict[str, dict[str, Any]]:
    """Method -> option -> default, of the registered methods."""
    from llava.reduction import registry

    methods = registry.describe()
    return {method["name"]: {option["name"]: option["default"] for option in method["options"]} for method in methods}


def changed_options(method: str, options: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """["alpha=1.0", "merge=none"]: options that differ from their defaults; all of a method that is not registered.

    Args:
        options: as a result holds them.
        defaults: see `default_options`.
    """
    plain = {name: json.loads(json.dumps(value)) for name, value in defaults.get(method, {}).items()}
    return [f"{k}={v}" for k, v in options.items() if k != "budget" and (k not in plain or plain[k] != v)]


def changed_fields(config: RunConfig) -> dict[str, Any]:
    """Settings beside the method's options that answers depend on and that differ from their defaults."""
    names = ("dtype", "max_new_tokens", "seed", "picture", "quantization", "profile", "compile")
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name in names if (value := getattr(config, name)) not in (usual[name], {})}


def folder_name(model: str) -> str:
    """A model's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
