"""Which ranks a command starts where, from the environment alone; no process is started here."""

import base64
import json
import os
import sys
from dataclasses import replace

import pytest

from eval.parallel import launch, placement
from eval.parallel.placement import Placement, detect
from eval.parallel.worker import take_device
from llava.errors import UserError


def found(there: int = 0, size: int = 1, device: str = "auto", nodes=None, **environment: str) -> Placement | None:
    """The placement on a machine with `there` accelerators."""
    return detect(environment, lambda: there, size, device, nodes)


def local(*devices: int | str, size: int = 1) -> Placement:
    return Placement((("localhost", devices),), size)


def refused(message: str, there: int = 0, **more) -> None:
    with pytest.raises(UserError, match=message):
        found(there, **more)


ALLOCATION = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
CPU = {"device": "cpu"}


def nodes(text: str) -> list[str]:
    assert text == "node[1-2]"
    return ["node1", "node2"]


def slurm(*devices: int, size: int = 1) -> Placement:
    return Placement((("node1", devices), ("node2", devices)), size, "slurm")


# -- one machine, and the nodes of a job -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "given", "expected"),
    [
        (0, {}, None),
        (4, {}, local(0, 1, 2, 3)),
        (4, {"device": "cuda:1"}, None),
        (4, CPU, None),
        (2, {"CUDA_VISIBLE_DEVICES": "5,3"}, local(5, 3)),
        (3, {"CUDA_VISIBLE_DEVICES": "7,5,3", "GPUS": "2,0"}, local(3, 7)),
        (0, {"CUDA_VISIBLE_DEVICES": "", "RANKS": "2"}, local(0, 1)),
        # Names of GPUs and of parts of them were refused, also where there is one.
        (2, {"CUDA_VISIBLE_DEVICES": "GPU-7a,GPU-8b"}, local("GPU-7a", "GPU-8b")),
        (1, {"CUDA_VISIBLE_DEVICES": "MIG-c6d4"}, None),
        # The ranks were started on 0 and 1, which belonged to another job.
        (2, ALLOCATION | {"CUDA_VISIBLE_DEVICES": "4,5"}, slurm(4, 5)),
        (8, {"GPUS": "3"}, local(0, 1, 2)),
        (8, {"GPUS": "6,2"}, local(6, 2)),
        (8, {"GPUS": "1"}, None),
        (8, {"GPUS": "3,"}, local(3)),  # one accelerator that is not the first one needs a rank of its own
        (0, {"RANKS": "2"}, local(0, 1)),
        (4, {"RANKS": "2"}, local(0, 1)),
        (1, {"RANKS": "3"} | CPU, replace(local(0, 1, 2), processor=True)),
        (4, {"size": 2}, local(0, 1, 2, 3, size=2)),
        (2, ALLOCATION, slurm(0, 1)),
        (0, ALLOCATION, slurm(0)),
        (0, ALLOCATION | {"size": 2}, slurm(0, 1, size=2)),
        (4, ALLOCATION | {"GPUS": "2"}, local(0, 1)),
        (2, ALLOCATION | {"SLURM_JOB_NUM_NODES": "1"}, local(0, 1)),
        (0, {"WORLD_SIZE": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_the_environment_says_which_ranks_there_are(there, given, expected):
    assert found(there, nodes=nodes, **given) == expected


def test_accelerators_are_not_counted_where_they_do_not_matter():
    def count() -> int:
        raise AssertionError("counted")

    assert detect({}, count, device="cpu") is None
    assert detect({"RANKS": "2"}, count, device="cpu") == replace(local(0, 1), processor=True)


@pytest.mark.parametrize(
    ("there", "given", "message"),
    [
        (4, {"GPUS": "9"}, "GPUS=9, but this machine has 4 accelerators; RANKS=9 uses its processor"),
        (4, {"GPUS": "0"}, "GPUS=0 asks for no accelerator: GPUS=0, with a comma names the first"),
        (4, {"GPUS": "two"}, "GPUS should be a whole number, 1 or more, got 'two'"),
        (4, {"GPUS": "0,4"}, "GPUS=0,4 names accelerator 4"),
        (4, {"GPUS": "1,1"}, "GPUS=1,1 .* twice"),
        (4, {"GPUS": ","}, "GPUS=, "),
        (0, {"RANKS": "many"}, "RANKS should be a whole number, 1 to 1024, got 'many'"),
        # A tuple of so many numbers was made: a MemoryError.
        (0, {"RANKS": "999999999999"}, "RANKS .* got '999999999999'"),
        (2, {"RANKS": "3"}, "RANKS=3, but this machine has 2 accelerators.*--device cpu"),
        (4, {"RANKS": "2", "GPUS": "2"}, "RANKS and GPUS are both set; leave one out"),
        (4, {"GPUS": "1", "HOSTFILE": "h"}, "GPUS and HOSTFILE"),
        (4, {"GPUS": "2", "device": "cuda:1"}, "--device cuda:1"),
        # GPUS=2 --device cpu started two ranks that left their accelerators unused.
        (4, {"GPUS": "2"} | CPU, "--device cpu uses none; set RANKS"),
        (3, {"size": 2}, "3 ranks on localhost .* 2 ranks each; change TP"),
        (0, {"size": 2}, "2 ranks .* 0 accelerators; set RANKS=2"),
        (4, {"WORLD_SIZE": "2", "RANK": "0"}, "started by a launcher .*without deepspeed or torchrun"),
        (4, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "started several times by srun.*without srun"),
    ],
)
def test_what_contradicts_itself_is_a_sentence(there, given, message):
    refused(message, there, **given)


def test_an_allocation_that_slurm_cannot_name_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(r"'scontrol show hostnames node\[1-2\]' fails", 1, **ALLOCATION)


def test_no_more_replicas_than_there_is_work_for():
    place = found(8, size=2)
    assert (place.ranks, place.replicas, place.describe()) == (8, 4, "8 ranks, 2 for each model")
    assert place.at_most(3) == local(0, 1, 2, 3, 4, 5, size=2)
    assert place.at_most(100) is place
    assert place.at_most(0) == local(0, 1, size=2)
    spread = slurm(0, 1, size=2)
    assert spread.at_most(1) is spread and spread.describe() == "4 ranks on 2 machines, 2 for each model"


# -- a hostfile ------------------------------------------------------------------------------------------------------


def hostfile(tmp_path, text: str) -> dict[str, str]:
    path = tmp_path / "hosts.txt"
    path.write_text(text)
    return {"HOSTFILE": str(path)}


def test_a_hostfile_is_read_as_deepspeed_and_mpi_read_it(tmp_path):
    place = found(0, **hostfile(tmp_path, "# two nodes\n\nnode1 slots=2\n  node2   slots = 1   # the old one\n"))
    assert place.hosts == (("node1", (0, 1)), ("node2", (0,)))
    assert (place.ranks, place.launcher) == (3, "hostfile")
    assert place.describe() == "3 ranks on 2 machines"
    assert found(0, **hostfile(tmp_path, "node1 slots=1 max_slots=8")).ranks == 1, "one machine is enough"
    place = found(0, **hostfile(tmp_path, "::1 slots=1\n[fd00::2] slots=1"))
    assert place.hosts == (("::1", (0,)), ("fd00::2", (0,))), "IPv6 was refused; pdsh and ssh take it without brackets"


@pytest.mark.parametrize(
    "text, message",
    [
        ("node1", "line 1 should look like 'node1 slots=8', got 'node1'"),
        ("node1 slots=2\nnode2 slots=two", "line 2 should look like"),
        ("node1 slots=2 max=4", "line 1 should look like"),
        ("[fd00::2 slots=2", "line 1 should look like"),
        ("node1 slots=2\n\nnode1 slots=2", "line 3 names node1 "),
        ("node1 slots=999999999999", "line 1: slots .* 1 to 1024"),
        ("# nothing\n", "names no machine"),
    ],
)
def test_wrong_hostfiles_are_sentences(tmp_path, text, message):
    refused(message, **hostfile(tmp_path, text))


def test_a_hostfile_that_cannot_be_read_or_divided_is_a_sentence(tmp_path):
    refused(f"HOSTFILE={tmp_path / 'none'}: No such file", HOSTFILE=str(tmp_path / "none"))
    refused("1 ranks on node2 cannot be divided", size=2, **hostfile(tmp_path, "node1 slots=2\nnode2 slots=1"))


def test_a_rank_starts_no_ranks(monkeypatch):
    from eval.parallel import ranks

    monkeypatch.setenv("RANKS", "2")
    assert placement.here() == local(0, 1)
    monkeypatch.setattr(ranks, "_current", ranks.Rank(1, 2, control=object()))
    assert placement.here() is None


# -- the launcher's command ----------------------------------------------------------------------------------------


def command(place: Placement, **environment: str) -> list[str]:
    return launch.launcher_command(place, ["worker", "host:1"], environment)


def world(words: list[str]) -> dict:
    (text,) = [word.removeprefix("--world_info=") for word in words if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(text))


def test_deepspeed_starts_the_ranks_of_this_machine():
    words = command(local(2, 3))
    assert words[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert world(words) == {"localhost": [2, 3]} and "--master_addr=127.0.0.1" in words
    assert words[-3:] == ["--module", "worker", "host:1"] and "--log_level=critical" in words


def test_srun_starts_one_launcher_on_each_node():
    words = command(found(2, nodes=nodes, **ALLOCATION))
    assert words[:5] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert words[5:7] == ["bash", "-c"] and '--node_rank="$SLURM_NODEID"' in words[7]
    assert world(words) == {"node1": [0, 1], "node2": [0, 1]} and "--master_addr=node1" in words
    # Without it all ranks of a node may share one core.
    assert "--cpus-per-task=8" in command(found(2, nodes=nodes, **ALLOCATION), SLURM_CPUS_PER_TASK="8")


def test_pdsh_starts_one_launcher_on_each_machine(tmp_path, monkeypatch):
    place = found(0, **hostfile(tmp_path, "node1 slots=1\nnode2 slots=2"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="HOSTFILE needs pdsh"):
        command(place)
    (tmp_path / "pdsh").touch(mode=0o755)
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    words = command(place, HF_HOME="/my models", HF_TOKEN="hf_x", WANDB_API_KEY="k", HOME="/root")
    assert words[:9] == ["pdsh", "-S", "-N", "-R", "ssh", "-f", "2", "-w", "node1,node2"] and len(words) == 10
    assert words[9].startswith(
        f"cd '{tmp_path / 'a b'}' && exec env 'HF_HOME=/my models' {sys.executable} -u -m deepspeed"
    )
    assert " --node_rank=%n " in words[9] and words[9].endswith(" --module worker host:1")
    assert "hf_x" not in words[9] and "WANDB" not in words[9] and "/root" not in words[9]
    assert world(words[9].split()) == {"node1": [0], "node2": [0, 1]}


def test_ranks_share_the_cores_of_this_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(6))
    assert launch.rank_environment(local(0, 1), {})["OMP_NUM_THREADS"] == "3"
    assert launch.rank_environment(local(*range(8)), {})["OMP_NUM_THREADS"] == "1"
    given = launch.rank_environment(local(0, 1), {"OMP_NUM_THREADS": "5", "PYTHONPATH": "/elsewhere"})
    assert given["OMP_NUM_THREADS"] == "5" and given["PYTHONPATH"] == f"{launch.PACKAGES}:/elsewhere"


def test_a_rank_on_the_processor_sees_no_accelerator(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("it looked for accelerators"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "cuda")
    take_device(processor=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["DS_ACCELERATOR"] == "cpu"
