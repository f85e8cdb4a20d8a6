"""Read from the environment which machines and accelerators a command uses. Needs no torch.

RANKS=2              two processes on this machine, also without accelerators
GPUS=4               four accelerators of this machine
GPUS=0,2  GPUS=3,    the accelerators with these indices; the comma tells an index from a number
HOSTFILE=hosts.txt   lines "HOST slots=8", as DeepSpeed and MPI read them; HOST may be an address such as [fd00::2]
(Slurm)              an allocation of several nodes
(none of these)      all accelerators of this machine
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from eval.config import whole_number
from eval.parallel import ranks
from llava.errors import UserError

VARIABLES = ("RANKS", "GPUS", "HOSTFILE")
VISIBLE = "CUDA_VISIBLE_DEVICES"
MOST_RANKS = 1024  # of one machine
Device = int | str  # an index, or the name of a GPU or of a part of one
HOST_LINE = re.compile(r"(\[)?(?P<host>[\w:][\w.:-]*)(?(1)\])\s+slots\s*=\s*(?P<slots>\d+)(\s+max_slots\s*=\s*\d+)?")


@dataclass(frozen=True)
class Placement:
    """The ranks of a command.

    Attributes:
        hosts: (name, accelerators) of each machine; every accelerator gets one rank.
        size: ranks per replica, which are all on one machine.
        launcher: "local", or how DeepSpeed's launcher is started on every machine: "slurm" (by srun) or "hostfile" (by
            pdsh).
        processor: whether the ranks do not use accelerators (--device cpu).
    """

    hosts: tuple[tuple[str, tuple[Device, ...]], ...]
    size: int = 1
    launcher: str = "local"
    processor: bool = False

    def __post_init__(self) -> None:
        for host, devices in self.hosts:
            if len(devices) % self.size:
                raise UserError(
                    f"{len(devices)} ranks on {host} cannot be divided into models of {self.size} ranks each; change "
                    "TP or the number of ranks."
                )

    @property
    def ranks(self) -> int:
        return sum(len(devices) for _, devices in self.hosts)

    @property
    def replicas(self) -> int:
        return self.ranks // self.size

    def at_most(self, replicas: int) -> "Placement":
        """The placement with at most so many replicas on this machine; with several machines it is unchanged."""
        if self.launcher != "local" or self.replicas <= max(1, replicas):
            return self
        host, devices = self.hosts[0]
        return replace(self, hosts=((host, devices[: max(1, replicas) * self.size]),))

    def describe(self) -> str:
        """The placement in words: "2 ranks", "16 ranks on 2 machines, 2 for each model"."""
        places = f" on {len(self.hosts)} machines" if len(self.hosts) > 1 else ""
        return f"{self.ranks} ranks{places}" + (f", {self.size} for each model" if self.size > 1 else "")


def detect(
    environment: Mapping[str, str],
    accelerators: Callable[[], int],
    size: int = 1,
    device: str = "auto",
    nodes: Callable[[str], list[str]] | None = None,
) -> Placement | None:
    """The placement that the environment asks for; None for one process.

    Args:
        accelerators: counts the accelerators of this machine; called only if needed.
        size: ranks per replica.
        device: of the command; any but "auto" and "cpu" keeps the command in one process.
        nodes: expands a Slurm node list into names; by default scontrol does.

    Raises:
        UserError: variables contradict each other, hold nonsense, or the command was started by a launcher.
    """
    refuse_launchers(environment)
    count_of_nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES")
    given = [name for name in VARIABLES if environment.get(name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both set; leave one out.")
    named = given[0] if given else None
    if device not in ("auto", "cpu") and named:
        raise UserError(f"{named} starts one rank per accelerator, so --device {device} has no meaning; leave one out.")
    if named == "GPUS" and device == "cpu":
        raise UserError("GPUS starts one rank per accelerator, but --device cpu uses none; set RANKS in place of GPUS.")
    if named == "HOSTFILE":
        return replace(read_hostfile(Path(environment["HOSTFILE"]), size), processor=device == "cpu")
    if named == "RANKS":
        there = 0 if device == "cpu" else accelerators()
        count = whole_number("RANKS", environment["RANKS"], maximum=MOST_RANKS)
        if there and count > there:
            raise UserError(
                f"RANKS={count}, but this machine has {there} accelerators, one for each rank; set RANKS to at most "
                f"{there}, or add --device cpu."
            )
        devices = visible(environment, there)[:count] if there else tuple(range(count))
    elif named == "GPUS":
        devices = chosen_gpus(environment, accelerators())
    elif device == "auto" and whole_or(count_of_nodes, 1) > 1:
        # Each node gets as many ranks as this node has accelerators; without accelerators one replica.
        devices = visible(environment, accelerators()) or tuple(range(max(1, size)))
        node_list = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST", "")
        names = (nodes or expand_node_list)(node_list)
        return Placement(tuple((name, devices) for name in names), size, "slurm")
    else:
        devices = visible(environment, accelerators()) if device == "auto" else ()
    if size > max(1, len(devices)):
        raise UserError(
            f"A model over {size} ranks was asked for, but this machine has {len(devices)} accelerators; set "
            f"RANKS={size} to use its processor, or lower TP."
        )
    if len(devices) <= 1 and size == 1 and "," not in environment.get("GPUS", ""):  # "GPUS=3," is the fourth one
        return None
    return Placement((("localhost", devices),), size, processor=device == "cpu")


def refuse_launchers(environment: Mapping[str, str]) -> None:
    """Raise UserError if torchrun, deepspeed or srun has started this command several times."""
    if whole_or(environment.get("WORLD_SIZE"), 1) > 1:
        raise UserError(
            "This command was started by a launcher (WORLD_SIZE is set). Start it once, without deepspeed or torchrun: "
            "it starts one rank per accelerator itself; GPUS, HOSTFILE or RANKS choose which."
        )
    if "SLURM_STEP_ID" in environment and whole_or(environment.get("SLURM_STEP_NUM_TASKS"), 1) > 1:
        raise UserError(
            "This command was started several times by srun. Start it once in the job, without srun: it starts the "
            "ranks on all nodes of the allocation itself; see scripts/slurm/eval.sbatch."
        )


def chosen_gpus(environment: Mapping[str, str], there: int) -> tuple[Device, ...]:
    """The accelerators that GPUS asks for, by number or by indices."""
    text, known = environment["GPUS"], visible(environment, there)
    if "," not in text:
        if text.strip() == "0":
            raise UserError(
                "GPUS=0 asks for no accelerator: GPUS=0, with a comma names the first, --device cpu takes none."
            )
        count = whole_number("GPUS", text)
        if count > there:
            raise UserError(
                f"GPUS={text}, but this machine has {there} accelerators; RANKS={count} uses its processor."
            )
        return known[:count]
    places = [whole_number("GPUS", part.strip(), minimum=0) for part in text.split(",") if part.strip()]
    if not places:
        raise UserError(f"GPUS={text} names no accelerator.")
    if wrong := [place for place in places if place >= there]:
        raise UserError(f"GPUS={text} names accelerator {wrong[0]}, but this machine has {there}, from 0.")
    if len(set(places)) < len(places):
        raise UserError(f"GPUS={text} names an accelerator twice.")
    return tuple(known[place] for place in places)


def visible(environment: Mapping[str, str], there: int) -> tuple[Device, ...]:
    """The accelerators as the launcher takes them, after the choice in CUDA_VISIBLE_DEVICES.

    That variable holds indices, or names of GPUs (GPU-8932f937) and of parts of them (MIG-c6d4f1ef).
    """
    text = environment.get(VISIBLE, "").strip()
    if not text or not there:
        return tuple(range(there))
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(int(part) if part.isdigit() else part for part in parts)[:there]


def read_hostfile(path: Path, size: int = 1) -> Placement:
    """The placement that a hostfile describes; it may name a single machine."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot read HOSTFILE={path}: {reason}.") from error
    hosts: dict[str, tuple[Device, ...]] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = HOST_LINE.fullmatch(text)
        if found is None or found["slots"] == "0":
            raise UserError(f"{path} line {number} should look like 'node1 slots=8', got {text!r}.")
        slots = whole_number(f"{path} line {number}: slots", found["slots"], maximum=MOST_RANKS)
        if found["host"] in hosts:
            raise UserError(f"{path} line {number} names {found['host']} a second time.")
        hosts[found["host"]] = tuple(range(slots))
    if not hosts:
        raise UserError(f"{path} names no machine; lines look like 'node1 slots=8'.")
    return Placement(tuple(hosts.items()), size, "hostfile")


def expand_node_list(text: str) -> list[str]:
    """Expand a node list with Slurm's scontrol: "node[1-2]" -> ["node1", "node2"]."""
    command = ["scontrol", "show", "hostnames", text]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"This job has several nodes, but '{' '.join(command)}' fails ({error}); give a HOSTFILE, or set GPUS to "
            "use this node alone."
        ) from error


def accelerators() -> int:
    """The number of accelerators that this machine has for ranks."""
    import torch

    return torch.cuda.device_count()


def here(size: int = 1, device: str = "auto") -> Placement | None:
    """The placement that this process's environment asks for; None inside a rank and for one process."""
    return None if not ranks.current().alone else detect(os.environ, accelerators, size, device)


def whole_or(text: str | None, otherwise: int) -> int:
    """The whole number that a variable holds; `otherwise` if it holds none."""
    return int(text) if text and text.isdigit() else otherwise
