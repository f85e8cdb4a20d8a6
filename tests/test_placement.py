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


def local(*devices: int, size: int = 1) -> Placement:
    return Placement((("localhost", devices),), size)


def refused(message: str, there: int = 0, **more) -> None:
    with pytest.raises(UserError, match=message):
        found(there, **more)


# -- one machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [0, 1])
def test_one_accelerator_or_none_is_one_process(there):
    assert found(there) is None


def test_all_accelerators_are_used_unless_a_device_is_named():
    assert found(4) == local(0, 1, 2, 3)
    assert found(4, device="cuda:1") is None and found(4, device="cpu") is None


def test_accelerators_are_not_counted_where_they_do_not_matter():
    def count() -> int:
        raise AssertionError("counted")

    assert detect({}, count, device="cpu") is None
    assert detect({"RANKS": "2"}, count, device="cpu") == replace(local(0, 1), processor=True)


def test_cuda_visible_devices_chooses_first():
    assert found(2, CUDA_VISIBLE_DEVICES="5,3") == local(5, 3)
    assert found(3, CUDA_VISIBLE_DEVICES="7,5,3", GPUS="2") == local(7, 5)
    assert found(3, CUDA_VISIBLE_DEVICES="7,5,3", GPUS="2,0") == local(3, 7)
    assert found(0, CUDA_VISIBLE_DEVICES="", RANKS="2") == local(0, 1)
    refused("CUDA_VISIBLE_DEVICES=GPU-7a,GPU-8b should hold indices", 2, CUDA_VISIBLE_DEVICES="GPU-7a,GPU-8b")


def test_gpus_is_a_number_or_a_list():
    assert found(8, GPUS="3") == local(0, 1, 2)
    assert found(8, GPUS="6,2") == local(6, 2)
    assert found(8, GPUS=" 6 , 2 ") == local(6, 2)
    assert found(8, GPUS="1") is None
    # One accelerator that is not the first one needs a rank of its own.
    assert found(8, GPUS="3,") == local(3)
    assert found(8, GPUS="") == found(8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("9", "GPUS=9, but this machine has 4 accelerators; RANKS=9 uses its processor"),
        ("0", "GPUS=0 asks for no accelerator: GPUS=0, with a comma names the first"),
        ("-1", "GPUS should be a whole number"),
        ("two", "GPUS should be a whole number, 1 or more, got 'two'"),
        ("1.5", "GPUS should be a whole number"),
        ("0,4", "GPUS=0,4 names accelerator 4, but this machine has 4, from 0"),
        ("0,-1", "GPUS should be a whole number, 0 or more, got '-1'"),
        ("1,1", "GPUS=1,1 names an accelerator twice"),
        (",", "GPUS=, names no accelerator"),
    ],
)
def test_wrong_gpus_are_sentences(text, message):
    refused(message, 4, GPUS=text)


def test_gpus_without_any_accelerator():
    refused("GPUS=2, but this machine has 0 accelerators; RANKS=2 uses its processor", GPUS="2")


def test_ranks_share_the_processor_where_there_is_no_accelerator():
    assert found(0, RANKS="2") == local(0, 1)
    assert found(0, RANKS="1") is None
    assert found(4, RANKS="2") == local(0, 1)
    assert found(1, RANKS="3", device="cpu") == replace(local(0, 1, 2), processor=True)


def test_wrong_ranks_are_sentences():
    refused("RANKS should be a whole number, 1 or more, got 'many'", RANKS="many")
    refused("RANKS=3, but this machine has 2 accelerators.*--device cpu", 2, RANKS="3")


@pytest.mark.parametrize("pair", [{"RANKS": "2", "GPUS": "2"}, {"GPUS": "1", "HOSTFILE": "h"}])
def test_two_variables_contradict_each_other(pair):
    refused(f"{' and '.join(pair)} are both set; leave one out", 4, **pair)


def test_a_named_device_contradicts_accelerators():
    refused("GPUS starts one rank per accelerator, so --device cuda:1 has no meaning", 4, GPUS="2", device="cuda:1")


def test_accelerators_contradict_the_processor():
    """GPUS=2 --device cpu started two ranks that left their accelerators unused."""
    refused("GPUS starts .* but --device cpu uses none; set RANKS in place of GPUS", 4, GPUS="2", device="cpu")


# -- several ranks for one model -----------------------------------------------------------------------------------


def test_ranks_of_a_model():
    place = found(4, size=2)
    assert place == local(0, 1, 2, 3, size=2)
    assert (place.ranks, place.replicas) == (4, 2)
    assert place.describe() == "4 ranks, 2 for each model"
    assert found(0, size=2, RANKS="2") == local(0, 1, size=2)


def test_ranks_that_cannot_be_divided_into_models():
    refused("3 ranks on localhost cannot be divided into models of 2 ranks each; change TP", 3, size=2)


@pytest.mark.parametrize("there", [0, 1])
def test_a_model_over_more_ranks_than_there_are(there):
    refused(
        f"A model over 2 ranks was asked for, but this machine has {there} accelerators; set RANKS=2", there, size=2
    )


def test_no_more_replicas_than_there_is_work_for():
    place = found(8, size=2)
    assert place.at_most(3) == local(0, 1, 2, 3, 4, 5, size=2)
    assert place.at_most(100) is place
    assert place.at_most(0) == local(0, 1, size=2)
    spread = Placement((("a", (0,)), ("b", (0,))), launcher="hostfile")
    assert spread.at_most(1) is spread


# -- several machines ----------------------------------------------------------------------------------------------


def hostfile(tmp_path, text: str) -> dict[str, str]:
    path = tmp_path / "hosts.txt"
    path.write_text(text)
    return {"HOSTFILE": str(path)}


def test_a_hostfile_is_read_as_deepspeed_and_mpi_read_it(tmp_path):
    place = found(0, **hostfile(tmp_path, "# two nodes\n\nnode1 slots=2\n  node2   slots = 1   # the old one\n"))
    assert place.hosts == (("node1", (0, 1)), ("node2", (0,)))
    assert (place.ranks, place.launcher, place.hostfile) == (3, "hostfile", (tmp_path / "hosts.txt").resolve())
    assert place.describe() == "3 ranks on 2 machines"


def test_one_machine_of_a_hostfile_is_enough(tmp_path):
    assert found(0, **hostfile(tmp_path, "node1 slots=1")).ranks == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("node1", "line 1 should look like 'node1 slots=8', got 'node1'"),
        ("node1 slots=2\nnode2 slots=two", "line 2 should look like"),
        ("node1 slots=0", "line 1 should look like"),
        ("node1 slots=2 max=4", "line 1 should look like"),
        ("node1 slots=2\n\nnode1 slots=2", "line 3 names node1 a second time"),
        ("# nothing\n", "names no machine; lines look like"),
        ("node1,node2 slots=2", "line 1 should look like"),
    ],
)
def test_wrong_hostfiles_are_sentences(tmp_path, text, message):
    refused(message, **hostfile(tmp_path, text))


def test_an_unreadable_hostfile_is_a_sentence(tmp_path):
    refused("Cannot read HOSTFILE=.*: No such file or directory", HOSTFILE=str(tmp_path / "none"))
    refused("Cannot read HOSTFILE=.*: Is a directory", HOSTFILE=str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    refused("Cannot read HOSTFILE=", HOSTFILE=str(tmp_path / "binary"))


def test_the_ranks_of_a_model_are_on_one_machine(tmp_path):
    refused("1 ranks on node2 cannot be divided", size=2, **hostfile(tmp_path, "node1 slots=2\nnode2 slots=1"))


ALLOCATION = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}


def nodes(text: str) -> list[str]:
    assert text == "node[1-2]"
    return ["node1", "node2"]


def test_all_nodes_of_an_allocation_are_used():
    place = found(2, nodes=nodes, **ALLOCATION)
    assert place == Placement((("node1", (0, 1)), ("node2", (0, 1))), launcher="slurm")
    assert found(0, nodes=nodes, **ALLOCATION).ranks == 2
    assert found(0, size=2, nodes=nodes, **ALLOCATION).describe() == "4 ranks on 2 machines, 2 for each model"


def test_an_allocation_can_be_left_unused():
    assert found(4, nodes=nodes, GPUS="2", **ALLOCATION) == local(0, 1)
    assert found(4, nodes=nodes, device="cuda:0", **ALLOCATION) is None
    assert found(2, nodes=nodes, **{**ALLOCATION, "SLURM_JOB_NUM_NODES": "1"}) == local(0, 1)


def test_an_allocation_that_slurm_cannot_name_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(r"several nodes, but 'scontrol show hostnames node\[1-2\]' fails .*; give a HOSTFILE", 1, **ALLOCATION)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "started by a launcher .*without deepspeed or torchrun"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "started several times by srun.*without srun"),
    ],
)
def test_a_command_that_a_launcher_started_is_refused(variables, message):
    refused(message, 4, **variables)


def test_one_process_of_a_launcher_is_a_process():
    assert found(0, WORLD_SIZE="1", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1") is None


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


def test_pdsh_starts_one_launcher_on_each_machine(tmp_path, monkeypatch):
    place = found(0, **hostfile(tmp_path, "node1 slots=1\nnode2 slots=2"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="HOSTFILE needs pdsh to reach the machines; install it"):
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
    assert launch.rank_environment(local(0, 1), {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


def test_ranks_import_this_repository():
    path = launch.rank_environment(local(0, 1), {"PYTHONPATH": "/elsewhere"})["PYTHONPATH"]
    assert path == f"{launch.ROOT}:/elsewhere"


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_ranks_on_the_processor_leave_accelerators_alone(device):
    """With more ranks than accelerators, a rank asked for an accelerator that is not there."""
    place = detect({"RANKS": "2"}, lambda: 0 if device == "auto" else 1, device=device)
    assert place is not None and place.ranks == 2 and place.processor == (device == "cpu")


def test_a_rank_on_the_processor_sees_no_accelerator(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("it looked for accelerators"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "cuda")
    take_device(processor=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["DS_ACCELERATOR"] == "cpu"
