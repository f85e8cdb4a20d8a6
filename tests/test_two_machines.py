"""Two machines for real, on one: sshd on two loopback addresses with pdsh, and two nodes of a Slurm of one's own.

Runs as root where the programs are: pdsh and openssh-server; slurm-wlm and munge.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.rank_starts import Start, start

HOSTS = ("127.0.0.1", "::1" if socket.has_dualstack_ipv6() else "127.0.0.2")
ASKED = ("eval", "--benchmark", "gqa", "--method", "uniform", "--budget", "64", "--limit", "400", "--wandb", "disabled")
SLURM = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""

pytestmark = pytest.mark.process


@dataclass(frozen=True)
class Machines:
    """How a command is started on both: behind some words, with some variables."""

    before: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def ask(self, folder: Path, *more: str) -> Start:
        words = (*ASKED, *more, "--output", str(folder))
        return start(folder, *words, environment=self.environment, before=self.before)


def programs(*names: str) -> list[str]:
    """The programs; without one of them, or without root, the test is skipped."""
    found = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in names]
    if None in found or os.getuid() != 0:
        pytest.skip(f"{', '.join(names)} are not all here, or this is not root")
    return [str(one) for one in found]


@contextlib.contextmanager
def running(*commands: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[None]:
    """Daemons in the foreground, which end with the test."""
    own, quiet = {**os.environ, **(environment or {})}, subprocess.DEVNULL
    daemons = [subprocess.Popen(command, env=own, stdout=quiet, stderr=quiet) for command in commands]
    try:
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def until(ready) -> None:
    limit = time.monotonic() + 240
    while not ready():
        assert time.monotonic() < limit, "four minutes have passed"
        time.sleep(0.1)


def free(host: str) -> bool:
    """Whether nobody listens on the port that pdsh's ssh goes to."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.create_server((host, 22), family=family):
        return True
    return False


@pytest.fixture(scope="module")
def by_ssh(tmp_path_factory) -> Iterator[Machines]:
    sshd, _, keygen = programs("sshd", "pdsh", "ssh-keygen")
    if not all(map(free, HOSTS)):
        pytest.skip("somebody listens on port 22")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("key", "host"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        "Port 22\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPidFile none\n"
        f"HostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'key.pub'}\n"
        + "".join(f"ListenAddress {host}\n" for host in HOSTS)
    )
    (folder / "hosts.txt").write_text("".join(f"{host} slots=1 max_slots=1\n" for host in HOSTS))
    login = f"-i {folder / 'key'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q"
    with running([sshd, "-D", "-f", str(folder / "sshd_config")]):
        until(lambda: not any(map(free, HOSTS)))
        yield Machines((), {"HOSTFILE": str(folder / "hosts.txt"), "PDSH_SSH_ARGS_APPEND": login})


@pytest.fixture(scope="module")
def by_slurm(tmp_path_factory) -> Iterator[Machines]:
    munged, slurmctld, slurmd, salloc, sinfo = programs("munged", "slurmctld", "slurmd", "salloc", "sinfo")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o600)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(SLURM.format(host=socket.gethostname(), folder=folder))
    conf = {"SLURM_CONF": str(folder / "slurm.conf")}
    files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
    options = [f"--{name}={folder / file}" for name, file in files.items()]

    def idle() -> bool:
        states = subprocess.run(
            [sinfo, "-h", "-o", "%D %t"], env={**os.environ, **conf}, capture_output=True, text=True
        )
        return states.stdout.split() == ["2", "idle"]

    with running([munged, "--foreground", "--force", f"--key-file={folder / 'key'}", *options]):
        until((folder / "munge.socket").exists)
        with running([slurmctld, "-D"], [slurmd, "-D", "-N", "n1"], [slurmd, "-D", "-N", "n2"], environment=conf):
            until(idle)
            yield Machines((salloc, "--nodes=2", "--quiet"), conf)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[str]:
    """The answers of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert Machines().ask(folder).process.wait(240) == 0
    return texts(folder)


def texts(folder: Path) -> list[str]:
    return sorted((folder / "answers.jsonl").read_text().splitlines())


def said(own: Start) -> str:
    return Path(f"{own.folder}.err").read_text()


def is_rank_one(process: psutil.Process) -> bool:
    words, variables = process.info["cmdline"] or [], process.info["environ"] or {}
    return "eval.parallel.worker" in words and variables.get("RANK") == "1" and "deepspeed.launcher.launch" not in words


@pytest.mark.parametrize("kind", ["by_ssh", "by_slurm"])
def test_two_machines_answer_as_one_process_and_a_killed_rank_is_named(kind, alone, tmp_path, request):
    machines = request.getfixturevalue(kind)
    both = machines.ask(tmp_path / "both")
    assert both.process.wait(240) == 0, said(both)
    assert texts(tmp_path / "both") == alone
    killed = machines.ask(tmp_path / "killed")
    until(lambda: any(p.stat().st_size for p in (tmp_path / "killed").glob("shards/*-rank1/answers.jsonl")))
    (rank,) = filter(is_rank_one, psutil.process_iter(["cmdline", "environ"]))
    rank.send_signal(signal.SIGKILL)
    assert killed.process.wait(240) == 1
    assert "Rank 1" in said(killed) and "same command again" in said(killed), said(killed)
    again = machines.ask(tmp_path / "killed")
    assert again.process.wait(240) == 0, said(again)
    assert texts(tmp_path / "killed") == alone


def test_a_machine_that_lets_nobody_in_is_a_sentence(by_ssh, tmp_path):
    """It said that no rank has started, and not what to try."""
    barred = {"PDSH_SSH_ARGS_APPEND": "-o BatchMode=yes -o UserKnownHostsFile=/dev/null -i /nowhere -q"}
    own = Machines((), by_ssh.environment | barred).ask(tmp_path / "run")
    assert own.process.wait(120) == 1
    assert "None of the 2 ranks has started; see that `ssh HOST true` works without a password" in said(own), said(own)
