"""Cancellation from inside: the flow run polls its own state, and ends itself if nothing else ends it.

Decides: when a flow run in the state Cancelling ends itself. A worker sends SIGTERM within seconds, but its observer
gives up for good when the server was away for half a minute (measured with Prefect 3.7.7). A run without a worker
(`spinreg run`) has only itself. Leaves out: ending the process of a stage.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from spinreg_core.errors import SpinregError

POLL_SECONDS = 5.0
# The longest time a healthy worker needs: ten seconds until it polls, and some more to send its signal.
WORKER_SECONDS = 20.0


class RunCancelled(SpinregError):
    """The flow run was cancelled; committed work stays, and starting the run again resumes it."""


@contextmanager
def cancellation(flow_run_id: str) -> Iterator[Callable[[], None]]:
    """Yield a check that raises RunCancelled once the flow run must end. The check is cheap and never waits."""
    patience = WORKER_SECONDS if "PREFECT__FLOW_RUN_ID" in os.environ else 0.0
    seen, ended = threading.Event(), threading.Event()
    watching = threading.Thread(
        target=_watch, args=(UUID(flow_run_id), patience, seen, ended), name="cancellation", daemon=True
    )
    watching.start()

    def check() -> None:
        if seen.is_set():
            raise RunCancelled("cancelled; committed work stays, and starting the run again resumes it")

    try:
        yield check
    finally:
        ended.set()


def _watch(flow_run_id: UUID, patience: float, seen: threading.Event, ended: threading.Event) -> None:
    from prefect.client.orchestration import get_client

    since: float | None = None
    while not ended.wait(POLL_SECONDS):
        try:
            state = get_client(sync_client=True).read_flow_run(flow_run_id).state
        except Exception:  # the server is away, so the state is unknown and the decision stays as it is
            continue
        if state is None or not (state.is_cancelling() or state.is_cancelled()):
            since = None
            continue
        since = time.monotonic() if since is None else since
        if time.monotonic() - since >= patience:
            seen.set()
            return
