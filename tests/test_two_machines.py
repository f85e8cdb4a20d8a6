"""Two machines for real, on one: pdsh and sshd on two loopback addresses. Runs as root where both programs are."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.rank_starts import start

HOSTS = ("127.0.0.1", "127.0.0.2")
ASKED = (
    "eval",
    "--benchmark",
    "gqa",
    "--method",
    "uniform",
    "--budget",
    "64",
    "--device",
    "cpu",
    "--wandb",
    "disabled",
)

pytestmark = pytest.mark.process


def free(host: str) -> bool:
    """Whether nobody listens on the port that pdsh's ssh goes to."""
    with contextlib.suppress(OSError), socket.create_server((host, 22)):
        return True
    return False


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> dict[str, str]:
    """The environment in which a command runs on both addresses, each with an sshd that takes a key made here."""
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    if None in (sshd, shutil.which("pdsh"), shutil.which("ssh-keygen")) or os.getuid() != 0:
        pytest.skip("pdsh and sshd are not here, or this is not root")
    if not all(map(free, HOSTS)):
        pytest.skip("somebody listens on port 22")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        "Port 22\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPidFile none\n"
        f"HostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'key.pub'}\n"
        + "".join(f"ListenAddress {host}\n" for host in HOSTS)
    )
    (folder / "hosts.txt").write_text("".join(f"{host} slots=1 max_slots=1\n" for host in HOSTS))
    server = subprocess.Popen([str(sshd), "-D", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    while any(map(free, HOSTS)):
        assert server.poll() is None, "sshd has ended"
        time.sleep(0.1)
    yield {
        "HOSTFILE": str(folder / "hosts.txt"),
        "OMP_NUM_THREADS": "1",
        "PDSH_SSH_ARGS_APPEND": f"-i {folder / 'key'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q",
    }
    server.terminate()
    server.wait()


def texts(folder: Path) -> list[str]:
    return sorted((folder / "answers.jsonl").read_text().splitlines())


def test_two_machines_answer_as_one_process_and_a_killed_rank_is_named(machines, tmp_path):
    words = [*ASKED, "--limit", "400"]
    alone = start(tmp_path / "alone", *words, "--output", str(tmp_path / "alone"))
    assert alone.process.wait(240) == 0
    both = start(tmp_path / "both", *words, "--output", str(tmp_path / "both"), environment=machines)
    ended = both.process.wait(240), Path(f"{both.folder}.err").read_text()
    assert ended[0] == 0, ended[1]
    assert texts(tmp_path / "both") == texts(tmp_path / "alone")

    killed = start(tmp_path / "killed", *words, "--output", str(tmp_path / "killed"), environment=machines)
    limit = time.monotonic() + 240
    shard = None
    while shard is None and time.monotonic() < limit:  # until the second machine's rank has answered something
        shard = next((p for p in (tmp_path / "killed").glob("shards/*-rank1/answers.jsonl") if p.stat().st_size), None)
        time.sleep(0.05)
    (rank,) = [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "eval.parallel.worker" in (process.info["cmdline"] or [])
        and (process.info["environ"] or {}).get("RANK") == "1"
    ]
    rank.send_signal(signal.SIGKILL)
    code, said = killed.process.wait(240), Path(f"{killed.folder}.err").read_text()
    assert code == 1 and "Rank 1" in said and "run the same command again to go on" in said, said
    again = start(tmp_path / "killed", *words, "--output", str(tmp_path / "killed"), environment=machines)
    assert again.process.wait(240) == 0
    assert texts(tmp_path / "killed") == texts(tmp_path / "alone")


def test_a_machine_that_lets_nobody_in_is_a_sentence(machines, tmp_path):
    """It said that no rank has started, and not what to try."""
    barred = machines | {"PDSH_SSH_ARGS_APPEND": "-o BatchMode=yes -o UserKnownHostsFile=/dev/null -i /nowhere -q"}
    own = start(tmp_path / "run", *ASKED, "--output", str(tmp_path / "run"), environment=barred)
    assert own.process.wait(120) == 1
    said = Path(f"{own.folder}.err").read_text()
    assert "None of the 2 ranks has started; see that `ssh HOST true` works without a password" in said, said
