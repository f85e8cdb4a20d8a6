"""Open a W&B run: its mode, name, group, job type, tags and configuration.

A folder's W&B run has a fixed id, kept in its file `wandb_id`: continuing the folder continues the W&B run.
"""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers import flatten
from eval.config import RunConfig, changed_fields, changed_options, default_options
from eval.tracking.access import has_key, keep_below, one_line, resolve_mode
from eval.tracking.summary import flat
from eval.tracking.tracker import Tracker, WandbTracker

PROJECT = "visual-token-reduction"
ID_FILE = "wandb_id"
TAG_LENGTH = 64  # W&B refuses longer ones
GROUP_LENGTH = NAME_LENGTH = 128


def start_evaluation(
    config: RunConfig, output: Path, settings: Mapping[str, Any], resolved: Mapping[str, Any]
) -> Tracker:
    """Begin logging an evaluation.

    Args:
        config: its `table` names the paper table that the run is a cell of: the group, a tag and a setting.
        settings: what its answers depend on.
        resolved: what the run was asked to do, under the names of result.json's `config`.
    """
    about = flat(settings) | {name: value for name, value in resolved.items() if name != "options"}
    about |= {"checkpoint": str(config.model), "table": config.table}
    tags = [about.get(key) for key in ("benchmark", "split", "model", "method", "profile")]
    tags += [f"budget {about.get('budget')}", config.table]
    differing = changed_options(settings["method"], settings["config"], default_options())
    differing += [f"{name}={value}" for name, value in flatten(changed_fields(config)).items()]
    return start(
        config.wandb, output, about, job_type="evaluation", tags=[*tags, *differing], group=config.table, note=differing
    )


def start(
    mode: str,
    output: Path,
    settings: Mapping[str, Any],
    job_type: str = "training",
    tags: Sequence[Any] = (),
    id_file: str = ID_FILE,
    group: str | None = None,
    note: Sequence[str] = (),
) -> Tracker:
    """Begin logging.

    Args:
        mode: "auto" lets WANDB_MODE decide, else online if there is a key and offline if not; or "online",
            "offline", "disabled".
        output: the run's folder; the W&B files go below it unless WANDB_DIR says otherwise.
        settings: become the run's configuration.
        tags: those that are None are left out; those of WANDB_TAGS are added.
        id_file: file in `output` that holds the id of the W&B run.
        group: None groups runs of the same benchmark and split.
        note: what the name says besides the last three folders of `output`.

    WANDB_RUN_GROUP, WANDB_JOB_TYPE and WANDB_NAME replace the group, the job type and the name.
    """
    mode = resolve_mode(mode)
    if mode == "disabled":
        return Tracker()
    try:
        keep_below(output)
        import wandb
    except Exception as error:
        print(f"W&B is not available ({one_line(error)}); the run goes on without it.", file=sys.stderr)
        return Tracker()
    if mode == "online" and not has_key():
        print("W&B has no API key (WANDB_API_KEY or netrc); logging offline.", file=sys.stderr)
        mode = "offline"
    tags = [*tags, *filter(None, os.environ.get("WANDB_TAGS", "").split(","))]
    about = {
        # W&B prefers arguments to variables; whoever sets a variable wants it to hold.
        "name": os.environ.get("WANDB_NAME") or " ".join(["/".join(output.parts[-3:]), *note])[:NAME_LENGTH],
        "group": (os.environ.get("WANDB_RUN_GROUP") or group or usual_group(settings))[:GROUP_LENGTH],
        "job_type": os.environ.get("WANDB_JOB_TYPE") or job_type,
        "tags": list(dict.fromkeys(str(tag)[:TAG_LENGTH] for tag in tags if tag is not None)),
        "config": dict(settings),
    }
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            identity, resumed = run_id(output / id_file)
            run = open_run(wandb, attempt, output, identity, **about)
            (output / id_file).write_text(f"{identity}\n")
            return WandbTracker(wandb, run, output, resumed)
        except Exception as error:
            print(f"W&B {attempt} failed ({one_line(error)}).", file=sys.stderr)
    return Tracker()


def usual_group(settings: Mapping[str, Any]) -> str:
    """The group of runs that belong to no table."""
    return f"{settings.get('benchmark')}-{settings.get('split')}"


def run_id(file: Path) -> tuple[str, bool]:
    """The id of a folder's W&B run, and whether an earlier process has used it."""
    known = file.read_text().strip() if file.is_file() else ""
    return known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(6), bool(known)


def open_run(wandb: Any, mode: str, output: Path, identity: str, **about: Any) -> Any:
    """wandb.init that neither asks nor captures the terminal.

    Args:
        identity: the id of the run, new or of an earlier process.
    """
    # Offline parts of a run are joined by their id when they are uploaded; `resume` is for the server.
    resume = {"resume": "allow"} if mode == "online" else {}
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=identity,
        dir=os.environ.get("WANDB_DIR", str(output)),
        mode=mode,
        settings=wandb.Settings(
            init_timeout=15,
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=mode == "offline",
            finish_timeout=120,  # seconds for the upload when the network went away during the run
            finish_timeout_raises=True,
        ),
        **resume,
        **about,
    )
