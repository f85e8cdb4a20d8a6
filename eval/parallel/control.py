"""What the ranks of one command share: counters and small JSON values, in torch's TCPStore.

The parent process serves the store, so it outlives every rank, and a rank that cannot reach it knows that the parent is
gone. Values are JSON, never pickles.
"""

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self

from torch.distributed import DistError, TCPStore

from llava.errors import UserError

CONNECT_SECONDS = 120
ATTEMPT_SECONDS = 5  # no signal gets through to a store that tries to connect
POLL_SECONDS = 0.02
LOOPBACK = "127.0.0.1"


class Control:
    """A client of the store, and in the parent its server.

    Attributes:
        address: "HOST:PORT", for `connect`.
    """

    def __init__(self, store: TCPStore, address: str):
        self._store = store
        self.address = address

    @classmethod
    def serve(cls, host: str = LOOPBACK) -> Self:
        """Serve a store on a free port.

        Args:
            host: the name by which ranks reach this machine. The loopback address cannot be reached from elsewhere.
        """
        listening = socket.create_server((host if host == LOOPBACK else "", 0), backlog=1024)
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
        host, _, port = address.rpartition(":")
        limit = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                # Refused at once where nobody listens; the store would try again until its time-out.
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
                brief = timedelta(seconds=ATTEMPT_SECONDS)
                store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=brief)
            except (DistError, OSError) as error:
                # The parent may have ended after the first line: then that line is refused now.
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
        """The value, or None where nobody has published it."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def get(self, key: str) -> Any:
        """The value, once somebody has published it."""
        wait_until(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))


def wait_until(ready: Callable[[], bool]) -> None:
    """Ask again and again: a wait inside the store would not let signals through."""
    while not ready():
        time.sleep(POLL_SECONDS)


def free_port() -> int:
    """A port that nobody listens on now. The launcher wants one; ranks find each other through the store."""
    with socket.create_server(("", 0)) as listening:
        return listening.getsockname()[1]
