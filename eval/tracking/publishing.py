"""What `vtr wandb workspace` and `vtr wandb report` share: flags, checks, and saving with errors in one sentence."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from eval.command import Parser, make_parser, value
from eval.tracking.access import has_key, one_line
from llava.errors import UserError

PLACE = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def project_path(text: str) -> str:
    """ENTITY/PROJECT; ValueError for anything else."""
    if not PLACE.fullmatch(text):
        raise ValueError(f"should look like my-team/visual-token-reduction, got {text!r}")
    return text


def make_flags(module: str, documentation: str | None, thing: str, title: str) -> Parser:
    """Flags of a command that saves a `thing` in a W&B project."""
    p = make_parser(module, documentation)
    p.add_argument(
        "project",
        type=value(project_path),
        metavar="ENTITY/PROJECT",
        help="user or team, and project, as in the address of the project's page",
    )
    p.add_argument("--name", default=title, help=f"name of the {thing}")
    p.add_argument("--table", metavar="NAME", help="only runs of this paper table")
    p.add_argument("--update", metavar="URL", help=f"replace this {thing} instead of making a new one")
    p.add_argument(
        "--dry-run", action="store_true", help="print what would be sent as JSON; needs no network and no key"
    )
    return p


def publish(args: argparse.Namespace, build: Callable[..., Any], load: Callable[[str], Any], thing: str) -> int:
    """Build and save, or print with --dry-run; returns the exit code.

    Args:
        build: (entity, project, name, table) -> an object of wandb-workspaces.
        load: URL -> such an object as it was saved.

    Raises:
        UserError: no key, or W&B refuses or cannot be reached.
    """
    entity, project = args.project.split("/")
    found = build(entity, project, args.name, args.table)
    if args.dry_run:
        print(json.dumps(spec_of(found), indent=1))
        return 0
    if not has_key():
        raise UserError(
            f"W&B has no API key, so the {thing} cannot be saved; run `wandb login`, set WANDB_API_KEY, or look at it "
            "with --dry-run."
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        with redirect_stdout(sys.stderr):
            if args.update:
                found = updated(load(args.update), found)
            found.save()
            address = found.url
    except Exception as error:  # of the network, of the server's answer, of the login
        raise UserError(f"W&B did not save the {thing} ({one_line(error)}).") from error
    print(f"{thing}: {address}")
    return 0


def spec_of(thing: Any) -> dict[str, Any]:
    """What the server would be sent."""
    return json.loads(thing._to_model().model_dump_json(by_alias=True, exclude_none=True))


def updated(old: Any, new: Any) -> Any:
    """The saved object with the content of the new one."""
    for field in ("name", "title", "description", "sections", "runset_settings", "blocks", "width"):
        if hasattr(new, field):
            setattr(old, field, getattr(new, field))
    return old
