"""Cancellation seen from inside: the flow run asks for its own state, for when nobody else acts on it.

Decides: when a run that Prefect calls Cancelling ends itself. A worker does that by SIGTERM within seconds, unless the
server was away for half a minute before: then its observer has given up for good (measured with Prefect 3.7.7). And a
run without a worker (`spinreg run`) has nobody else. Leaves out: ending the stage's process (`stage_process.py`).
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
# What a worker in good health needs at most: ten seconds until it looks, and some more to send its signal.
WORKER_SECONDS = 20.0


class RunCancelled(SpinregError):
    """Somebody cancelled the flow run; what is committed stays, and starting again continues."""


@contextmanager
def cancellation(flow_run_id: str) -> Iterator[Callable[[], None]]:
    """Yields a check that raises RunCancelled once the flow run is to be ended; it is cheap and never waits."""
    patience = WORKER_SECONDS if "PREFECT__FLOW_RUN_ID" in os.environ else 0.0
    seen, ended = threading.Event(), threading.Event()
    watching = threading.Thread(
        target=_watch, args=(UUID(flow_run_id), patience, seen, ended), name="cancellation", daemon=True
    )
    watching.start()

    def check() -> None:
        if seen.is_set():
            raise RunCancelled("cancelled; what is committed stays, and starting the run again continues it")

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
        except Exception:  # the server is away: nothing is known, and nothing changes
            continue
        if state is None or not (state.is_cancelling() or state.is_cancelled()):
            since = None
            continue
        since = time.monotonic() if since is None else since
        if time.monotonic() - since >= patience:
            seen.set()
            return
