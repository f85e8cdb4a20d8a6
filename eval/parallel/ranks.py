"""The place of this process among the ranks of one command, and what the ranks share.

A process is alone unless eval.parallel.worker says otherwise. Ranks share counters and small JSON values (never
pickles) in torch's TCPStore. The parent process serves the store, so the store outlives every rank, and a rank that
cannot reach it knows that the parent is gone. torch is imported only with the first store, because every command line
imports this module.
"""

import itertools
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from llava.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

CONNECT_SECONDS = 120
ATTEMPT_SECONDS = 5  # short, because a store that tries to connect lets no signal through
POLL_SECONDS = 0.02
LOOPBACK = "127.0.0.1"
# What a rank is doing, as it reports to the parent process.
LOADING, ASKING, MERGING = "loading", "asking", "merging"
WAITING, SCORING = "waiting", "scoring"
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
# A rank must not stay in one of these for longer than the time-out.
WATCHED = (LOADING, ASKING, MERGING)
# The last report of a rank is one of these.
ENDED = (FINISHED, FAILED, STOPPED)


class Control:
    """A client of the store; in the parent process also its server.

    Attributes:
        address: "HOST:PORT", for `connect`.
    """

    def __init__(self, store: "TCPStore", address: str):
        self._store = store
        self.address = address

    @classmethod
    def serve(cls, host: str = LOOPBACK) -> Self:
        """Serve a store on a free port.

        Args:
            host: the name by which ranks reach this machine; with the loopback address only ranks on this machine can.
        """
        from torch.distributed import TCPStore

        # Other machines may have IPv6 addresses only.
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        own: dict[str, Any] = {} if host == LOOPBACK else both
        listening = socket.create_server((host if host == LOOPBACK else "", 0), backlog=1024, **own)
        port = listening.getsockname()[1]
        store = TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
            master_listen_fd=listening.detach(),
        )
        return cls(store, f"{host}:{port}")

    @classmethod
    def connect(cls, address: str) -> Self:
        """Join the store at "HOST:PORT".

        Raises:
            UserError: it does not answer.
        """
        from torch.distributed import DistError, TCPStore

        host, _, port = address.rpartition(":")
        limit = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                # This fails at once if nobody listens, where TCPStore would try until its time-out.
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
                brief = timedelta(seconds=ATTEMPT_SECONDS)
                store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=brief)
            except (DistError, OSError) as error:
                # If the parent ended in between, create_connection is refused in the next turn.
                if isinstance(error, DistError) and time.monotonic() < limit:
                    continue
                raise UserError(
                    f"The process that started the ranks does not answer at {address}; its port must be reachable "
                    "from every node."
                ) from error
            store.set_timeout(timedelta(seconds=CONNECT_SECONDS))
            return cls(store, address)

    def answers(self) -> bool:
        """Whether the parent process still serves the store."""
        from torch.distributed import DistError

        try:
            self.count("beats", 0)
        except DistError:
            return False
        return True

    def count(self, key: str, amount: int = 1) -> int:
        """Add to a counter that all ranks share; returns its new value."""
        return self._store.add(key, amount)

    def put(self, key: str, value: Any) -> None:
        """Publish a JSON value."""
        self._store.set(key, json.dumps(value))

    def peek(self, key: str) -> Any:
        """The published value, or None if there is none yet."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def get(self, key: str) -> Any:
        """Wait until a value is published, and return it."""
        while not self._store.check([key]):  # waiting inside the store would not let signals through
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(key))


@dataclass(frozen=True)
class Rank:
    """The place of a process among the ranks of one start.

    Attributes:
        number: of this rank, from 0.
        world: number of ranks.
        size: ranks per replica.
        name: a random word for this start of the ranks.
        control: the store that the ranks share; None for a process that is alone.
    """

    number: int = 0
    world: int = 1
    size: int = 1
    name: str = ""
    control: "Control | None" = None
    _rounds: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)
    _counts: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def alone(self) -> bool:
        return self.control is None

    @property
    def first(self) -> bool:
        """Whether this rank merges, scores and logs."""
        return self.number == 0

    @property
    def replica(self) -> int:
        return self.number // self.size

    @property
    def replicas(self) -> int:
        return self.world // self.size

    @property
    def leads(self) -> bool:
        """Whether this rank writes the answers of its replica."""
        return self.number % self.size == 0

    def claim(self, what: str) -> int:
        """Claim the next item of a kind (batches of questions, table cells): returns 0, 1, 2, ...

        No two replicas get the same number. The ranks of a replica get the same one, so they must call this equally
        often.
        """
        own = next(self._rounds)
        if self.control is None:
            return own
        key = f"{what}/replica{self.replica}/{own}"
        if not self.leads:
            return int(self.control.get(key))
        number = self.control.count(what) - 1
        if self.size > 1:
            self.control.put(key, number)
        return number

    def count(self, what: str, amount: int = 1) -> int:
        """Add to a counter of all ranks; returns its new value."""
        if self.control is not None:
            return self.control.count(what, amount)
        self._counts[what] += amount
        return self._counts[what]

    def put(self, key: str, value: Any) -> None:
        """Publish a value to the other ranks."""
        if self.control is not None:
            self.control.put(key, value)

    def get(self, key: str) -> Any:
        """Wait until another rank has published a value, and return it."""
        assert self.control is not None
        return self.control.get(key)

    def report(self, phase: str, questions: Sequence[str] = (), **more: Any) -> None:
        """Tell the parent process what this rank does from now on.

        Args:
            questions: ids of the questions that are asked.
        """
        if self.control is not None:
            # The counter makes every report a new value, as the parent looks for changes.
            report = {"phase": phase, "questions": list(questions), "number": self.control.count("reports")}
            place = {"host": socket.gethostname(), "process": os.getpid()}
            self.control.put(f"rank{self.number}", report | place | more)

    @property
    def phase(self) -> str | None:
        """The phase that this rank reported last."""
        report = None if self.control is None else self.control.peek(f"rank{self.number}")
        return None if report is None else report["phase"]


_current = Rank()


def current() -> Rank:
    """The place of this process."""
    return _current


def become(rank: Rank) -> None:
    """Take a place; once, when the process starts."""
    global _current
    _current = rank


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.create_server(("", 0)) as listening:
        return int(listening.getsockname()[1])
