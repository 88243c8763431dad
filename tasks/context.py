"""The lease, the store and the resolved configuration that the tasks of one flow run share.

They are kept here because a round is a flow of its own: a flow's parameters go to the server, and a lease cannot. One
flow run advances one run, in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from spinreg_core.config import RunConfig
from spinreg_core.errors import SpinregError
from spinreg_core.runs.lease import RunLease
from spinreg_core.store.base import Store


@dataclass(frozen=True)
class Context:
    config: RunConfig
    store: Store
    lease: RunLease
    cancelled: Callable[[], None] = lambda: None  # raises once the flow run is cancelled
    failures: list[SpinregError] = field(default_factory=list)  # that end the flow run when all else is done

    def check(self) -> None:
        """Raise LeaseLost or RunCancelled if this flow run must not go on."""
        self.lease.check()
        self.cancelled()


_current: ContextVar[Context] = ContextVar("spinreg-context")


def current_context() -> Context:
    """Return the context of the flow run that calls this code."""
    return _current.get()


@contextmanager
def use_context(context: Context) -> Iterator[Context]:
    """Make `context` the current one inside the block."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
