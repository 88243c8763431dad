"""Orders of the machine that runs the flow to the other machines of a stage, and their reports of failures.

Decides: the two documents in the store, `runs/<run>/order.json` and `runs/<run>/failures/<attempt>-<machine>.json`.
They hold no result and count for one attempt only. Leaves out: their effect (`torchrun.py`, `flows/join.py`).
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
import uuid
from typing import Any

from spinreg_core.errors import Conflict, Damaged, LeaseLost
from spinreg_core.runs.job import Job
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.documents import Count, Document

ATTEMPT_VARIABLE = "SPINREG_ATTEMPT"  # set in the processes that other machines start
_WAIT_SECONDS = 10.0


class Order(Document):
    attempt: str | None
    epoch: Count
    job: dict[str, Any] | None = None


class NodeFailure(Document):
    status: int
    message: str


def post_order(store: Store, job: Job) -> str:
    """Ask the other machines to take part in a stage. Returns the name of this attempt at it.

    An order that cannot be read is replaced: it held no result. Raises LeaseLost where a later holder of the run's
    lease has asked for something.
    """
    attempt, epoch = uuid.uuid4().hex, _epoch(job)
    order = documents.dump({"attempt": attempt, "epoch": epoch, "job": job.fields()})
    key = _order(job.config.run)
    while True:
        found = store.read_tagged(key)
        try:
            if found is None:
                store.create(key, order)
                return attempt
            with contextlib.suppress(Damaged):
                if documents.parse(store, key, found[0], Order).epoch > epoch:
                    raise LeaseLost(
                        f"run {job.config.run!r} was taken over; its other machines work for its new holder"
                    )
            store.replace(key, order, found[1])
            return attempt
        except Conflict:
            continue


def withdraw_order(store: Store, job: Job, attempt: str) -> None:
    """Tell the other machines that the stage is over.

    Does nothing if there is a newer order, or if the order cannot be read: an error here would hide that of the stage.
    """
    key = _order(job.config.run)
    found = store.read_tagged(key)
    with contextlib.suppress(Conflict, Damaged):
        if found is not None and documents.parse(store, key, found[0], Order).attempt == attempt:
            store.replace(key, documents.dump({"attempt": None, "epoch": _epoch(job)}), found[1])


def read_order(store: Store, run: str) -> Order | None:
    """Return the last order; its `attempt` is None between stages. Raises Damaged."""
    return documents.read(store, _order(run), Order)


def report_failure(store: Store, job: Job, attempt: str, status: int, message: str) -> None:
    """Report a failure of ranks on this machine, for the log of the flow."""
    host = socket.gethostname()
    entry = {"status": status, "message": f"on {host}: {message}"}
    store.write(f"{_failures(job.config.run)}{attempt}-{host}-{uuid.uuid4().hex[:8]}.json", documents.dump(entry))


def failures_elsewhere(store: Store, job: Job, attempt: str) -> list[tuple[int, str]]:
    """Return (status, message) of the failures that other machines report of an attempt, after a wait of seconds."""
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        keys = [k for k in store.list(_failures(job.config.run)) if k.rsplit("/", 1)[-1].startswith(attempt)]
        if keys or time.monotonic() > end:
            entries = [found for key in keys if (found := documents.read(store, key, NodeFailure)) is not None]
            return [(entry.status, entry.message) for entry in entries]
        time.sleep(0.5)


def _epoch(job: Job) -> int:
    """Return the epoch of the lease under which a job was given out, from its writer (`RunLease.writer`)."""
    found = re.match(r"e(\d+)-", job.writer)
    return int(found[1]) if found else 0


def _order(run: str) -> str:
    return f"runs/{run}/order.json"


def _failures(run: str) -> str:
    return f"runs/{run}/failures/"
