"""Context that the tasks of one flow run share: the lease, the store and the resolved configuration.

A round is a flow of its own, and the server stores the parameters of flows. A lease cannot be such a parameter, so a
context variable holds it. One flow run advances one run, in one process.
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
from tasks.prewarm import discard_spare


@dataclass(frozen=True)
class Context:
    config: RunConfig
    store: Store
    session: RunLease
    target: int = 0  # the round this flow run goes to
    cancelled: Callable[[], None] = lambda: None  # raises once the flow run is cancelled
    failures: list[SpinregError] = field(default_factory=list)  # that end the flow run when all else is done

    def check(self) -> None:
        """Raise LeaseLost or RunCancelled if this flow run must not go on."""
        self.session.check()
        self.cancelled()

    @contextmanager
    def scratch(self, stage: str, writer: str) -> Iterator[Path]:
        """Yield an empty folder for one attempt at a stage. It is removed on success, and kept for its log on failure.

        Folders of earlier attempts are removed first. An earlier attempt may still run (a moment after its flow was
        killed, or if it was frozen), so each attempt has a folder of its own.
        """
        place = hashlib.sha256(self.store.url.encode()).hexdigest()[:8]
        folder = cache_folder() / "work" / f"{self.config.run}-{place}" / stage
        shutil.rmtree(folder, ignore_errors=True)
        (folder / writer).mkdir(parents=True)
        yield folder / writer
        shutil.rmtree(folder / writer, ignore_errors=True)


_current: ContextVar[Context] = ContextVar("spinreg-context")


def current_context() -> Context:
    """Return the context of the current flow run."""
    return _current.get()


@contextmanager
def use_context(context: Context) -> Iterator[Context]:
    """Makes `context` the current one inside the block; no spare process is left after it."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
        discard_spare()
