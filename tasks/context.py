"""What the tasks of one flow run share: the open session, the store and the resolved configuration.

Decides: nothing; a round is a flow of its own and a flow's parameters go to the server, where a lease has no
place, so the open session waits here. One flow run advances one run, in one process.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from spinreg_core.config import RunConfig
from spinreg_core.errors import SpinregError
from spinreg_core.runs.lease import RunLease
from spinreg_core.store.base import Store
from spinreg_core.store.cache import cache_folder


@dataclass(frozen=True)
class Context:
    config: RunConfig
    store: Store
    session: RunLease
    cancelled: Callable[[], None] = lambda: None  # raises once the flow run is cancelled
    failures: list[SpinregError] = field(default_factory=list)  # that end the flow run when all else is done

    def check(self) -> None:
        """Raises LeaseLost or RunCancelled where this flow run must not go on."""
        self.session.check()
        self.cancelled()

    @contextmanager
    def scratch(self, stage: str, writer: str) -> Iterator[Path]:
        """An empty folder for one attempt at a stage; removed after a good end, kept for its log after a bad one.

        What earlier attempts left is removed first. One that still runs (a frozen flow's, a moment after
        its flow was killed) never shares files with this one.
        """
        place = hashlib.sha256(self.store.url.encode()).hexdigest()[:8]
        folder = cache_folder() / "work" / f"{self.config.run}-{place}" / stage
        shutil.rmtree(folder, ignore_errors=True)
        (folder / writer).mkdir(parents=True)
        yield folder / writer
        shutil.rmtree(folder / writer, ignore_errors=True)


_current: ContextVar[Context] = ContextVar("spinreg-context")


def current_context() -> Context:
    """The context of the flow run this code is called by."""
    return _current.get()


@contextmanager
def use_context(context: Context) -> Iterator[Context]:
    """Makes `context` the current one inside the block."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
