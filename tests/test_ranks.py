"""Several ranks for one command, for real: how they share work, and what a user sees when one of them fails.

Every start takes seconds of two processors, so all commands of this file start in one fixture, a few at a time.
"""

import json
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.rank_starts import Ended, Start, start, write_programs

pytestmark = pytest.mark.process

AT_ONCE = 3
# What a shell would change, or take apart.
STRANGE = ("two words", "$HOME", "a;b", "'", '"', "*", "%n", "ä\\")


def both_ask(own: Start) -> bool:
    return all((own.folder / f"{number}.pid").exists() for number in range(2))


def rank(own: Start, number: int) -> psutil.Process:
    return psutil.Process(int((own.folder / f"{number}.pid").read_text()))


# name -> (what tests/rank_commands.py does, what happens once both ranks ask)
CASES: dict[str, tuple[str, Callable[[Start], None] | None]] = {
    "claim": ("claim", None),
    "refuse": ("refuse", None),
    "crash": ("crash", None),
    "death of the parent": ("wait", lambda own: own.process.kill()),
    "pdsh death": ("wait", lambda own: rank(own, 1).kill()),
    "pdsh": ("claim", None),
    "srun": ("claim", None),
}
SLOW = ("srun",)  # says what the first ones say, in another place


def cases(*names: str) -> pytest.MarkDecorator:
    """Run a test for cases by name."""
    marks = {name: [pytest.mark.slow] if name in SLOW else [] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


@pytest.fixture(scope="module")
def ended(request, tmp_path_factory) -> Iterator[Callable[[str], Ended]]:
    """How the cases that the selected tests ask for have ended."""
    folder = tmp_path_factory.mktemp("ranks")
    programs = write_programs(folder / "bin") | {"WANDB_API_KEY": "secret", "DS_ACCELERATOR": "cpu"}
    hosts = folder / "hosts.txt"
    hosts.write_text("fake1 slots=1  # the first one\nfake2 slots=1\n")
    places = {
        "pdsh": programs | {"HOSTFILE": str(hosts)},
        "srun": programs | {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "fake[1-2]"},
    }

    def run(name: str) -> Ended:
        what, act = CASES[name]
        place, strange = folder / name.replace(" ", "-"), STRANGE if what == "claim" else ()
        with start(place, "tests.rank_commands", what, str(place), *strange, environment=places.get(name[:4])) as own:
            if act is not None and own.until(lambda: both_ask(own)):
                act(own)
            return own.end()

    selected = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {name: pool.submit(run, name) for name in CASES if name in selected}
        yield lambda name: jobs[name].result()


@cases(*CASES)
def test_no_process_is_left(ended, name):
    assert ended(name).left == []


@cases("claim", "pdsh", "srun")
def test_every_number_is_claimed_once(ended, name):
    first, second = (seen(ended(name), number) for number in range(2))
    assert sorted(first["claimed"] + second["claimed"]) == list(range(40))
    assert first["claimed"] and second["claimed"]
    assert first["words"][2:] == second["words"][2:] == list(STRANGE)


def seen(own: Ended, number: int) -> dict:
    return json.loads((own.folder / f"{number}.json").read_text())


@cases("claim", "pdsh", "srun")
def test_ranks_share_the_processor_of_their_machine(ended, name):
    """One rank on each of two machines, or two ranks on one."""
    assert [seen(ended(name), number)["device"] for number in range(2)] == (
        ["0,1"] * 2 if name == "claim" else ["0"] * 2
    )


@cases("pdsh")
def test_other_machines_get_settings_but_no_keys(ended, name):
    for number in range(2):
        assert seen(ended(name), number)["mode"] == "disabled"
        assert not any("secret" in words for words in seen(ended(name), number)["lines"])


@cases("claim", "pdsh", "srun")
def test_the_first_rank_prints_and_its_exit_code_counts(ended, name):
    """Rank 0 ends with 3 while the other one still works, which must not end it."""
    own = ended(name)
    assert (own.code, own.out, own.err) == (3, "hello from rank 0\n", "")


@cases("refuse")
def test_an_error_of_the_user_is_printed_once(ended, name):
    own = ended(name)
    assert (own.code, own.out) == (2, "")
    assert own.err.strip().startswith("The budget is wrong") and own.err.count("\n") == 2


@cases("crash")
def test_a_crash_shows_its_traceback_and_one_sentence(ended, name):
    own = ended(name)
    assert own.code == 1 and own.err.count("Traceback") == 1
    assert own.err.splitlines()[-1] == f"Rank 1 of 2 failed: ValueError: seven is no colour. {kept(own)}"


@cases("pdsh death")
def test_a_rank_that_dies_is_named(ended, name):
    own = ended(name)
    sentence = f"{called(own, 1)} was lost while it was asking question q1, so all ranks were stopped. {kept(own)}\n"
    assert (own.code, own.err) == (1, f"\n{sentence}")


def called(own: Ended, number: int) -> str:
    """How sentences name a rank."""
    process = (own.folder / f"{number}.pid").read_text()
    return f"Rank {number} of 2 ({socket.gethostname()}, process {process})"


def kept(own: Ended) -> str:
    return f"3 of 40 answers are kept in {own.folder}; run the same command again to go on."


@cases("death of the parent")
def test_ranks_end_when_their_parent_is_killed(ended, name):
    own = ended(name)
    assert own.code == -signal.SIGKILL
    assert own.err == "The process that started the ranks is gone, so they end; what was answered is kept.\n"
