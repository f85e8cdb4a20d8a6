"""Upload the offline W&B runs below a folder that are not uploaded yet.

vtr wandb sync
vtr wandb sync results/gqa-testdev --dry-run
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.command import exit_on_user_error, make_parser, value
from eval.config import path_name
from eval.tracking import has_key, known_id
from llava.errors import UserError, how_to_install

REPLACED = re.compile(r"replaced-\d+")
REASONS = UPLOADED, RUNNING, RESTARTED = "uploaded before", "still running", "replaced by --restart"


@dataclass(frozen=True)
class OfflineRun:
    """One offline W&B run on the disk.

    Attributes:
        name: its id.
        parts: the folders `offline-run-...` of all its starts, oldest first.
    """

    name: str
    parts: tuple[Path, ...]

    @property
    def uploaded(self) -> bool:
        """Whether every part is uploaded; W&B then leaves a .synced file in its folder."""
        return all(any(part.glob("*.wandb.synced")) for part in self.parts)

    @property
    def left_out(self) -> str | None:
        """Why the run is left out, one of REASONS; None if it is to be uploaded."""
        output = self.parts[-1].parent.parent
        if self.uploaded:
            return UPLOADED
        if any(is_locked(folder / "lock") for folder in (output, output.parent)):
            return RUNNING
        aside = any(REPLACED.fullmatch(name) for part in self.parts for name in part.parts)
        aside |= any(known_id(file) == self.name for file in output.glob("replaced-*/wandb_id*"))
        return RESTARTED if aside else None


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if some runs are not uploaded."""
    p = make_parser("eval.tracking.sync", __doc__)
    p.add_argument("folder", nargs="?", default="results", type=value(path_name), help="folder that holds the runs")
    p.add_argument("--dry-run", action="store_true", help="list the runs that would be uploaded")
    args = p.parse_args(arguments)
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; name the one that holds the results.")
    runs = find_runs(folder)
    reasons = [run.left_out for run in runs]
    chosen = [run for run, reason in zip(runs, reasons, strict=True) if reason is None]
    left_out = [f"{reasons.count(reason):,} {reason}" for reason in REASONS if reason in reasons]
    noun = "run" if len(runs) == 1 else "runs"
    text = ", ".join([f"{len(runs):,} offline {noun} below {folder}: {len(chosen):,} to upload", *left_out])
    print(f"{text}.")
    if args.dry_run:
        print("".join(f"{part}\n" for run in chosen for part in run.parts), end="")
        return 0
    if not chosen:
        return 0
    try:
        upload(chosen)
    except KeyboardInterrupt:  # the user's way out if W&B keeps trying without a network
        print("\nStopped; run this command again for what is not uploaded.", file=sys.stderr)
    left = [run for run in chosen if not run.uploaded]
    print(f"{len(chosen) - len(left):,} of {len(chosen):,} runs are uploaded.")
    for run in left:
        print(f"not uploaded: {run.parts[-1]}", file=sys.stderr)
    return 1 if left else 0


def find_runs(folder: Path) -> list[OfflineRun]:
    """The offline runs at any depth below a folder; parts with the same id in the same place are one run."""
    found: dict[tuple[Path, str], list[Path]] = {}
    for file in sorted(folder.rglob("offline-run-*/run-*.wandb")):
        key = (file.parent.parent, file.stem.removeprefix("run-"))
        found.setdefault(key, []).append(file.parent)
    return [OfflineRun(name, tuple(parts)) for (_, name), parts in found.items()]


def upload(runs: Sequence[OfflineRun]) -> None:
    """Upload runs with `wandb sync`.

    Raises:
        UserError: there is no key or no `wandb`, or it fails.
    """
    program = shutil.which("wandb")
    if program is None:
        raise UserError(f"The command wandb is not installed here; {how_to_install('cluster')} brings it.")
    if not has_key():
        raise UserError("W&B has no API key; run `wandb login` or set WANDB_API_KEY, then run this command again.")
    with tempfile.TemporaryDirectory() as logs:  # otherwise W&B writes its logs to a folder in the current one
        # All parts of a run in one call, even those uploaded before: W&B joins them only then.
        command = [program, "sync", "--include-synced", *(str(part) for run in runs for part in run.parts)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, env={"WANDB_DIR": logs} | os.environ)
    if done.returncode:
        raise UserError(
            f"wandb sync ended with code {done.returncode}; run this command again for what is not uploaded."
        )


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file of eval.answers.store; the file is not changed."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False


if __name__ == "__main__":
    sys.exit(main())
