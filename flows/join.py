"""A further machine of a run whose stages spread over several: it takes part in every stage, one after another.

Decides: how it learns of a stage (`runs/<run>/order.json` in the store, written by the machine that runs the flow) and
when it lets go of one. Leaves out: how ranks meet (torchrun's rendezvous, `spinreg_core/runtime/torchrun.py`).
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from spinreg_core.errors import BadInput, Damaged, SpinregError, StoreFailed
from spinreg_core.runs.job import Job
from spinreg_core.runs.stages import stages_of
from spinreg_core.runtime.nodes import ATTEMPT_VARIABLE, read_order
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tasks.stage_process import run_process, start_process

_POLL_SECONDS = 2.0


class _Over(Exception):
    """The stage this machine takes part in has ended elsewhere."""


def join_run(store_url: str, run: str, *, say: Callable[[str], None]) -> NoReturn:
    """Take part in the stages of a run until interrupted. Errors of a stage are said, and the next one awaited.

    Raises BadInput for a store that cannot be used.
    """
    store = open_store(store_url)
    store.check()
    say(f"waiting for the stages of run {run} in {store.url}")
    done: str | None = None
    while True:
        try:
            order = read_order(store, run)
        except (StoreFailed, Damaged) as error:  # it may come back, and be written again
            say(str(error))
            time.sleep(_POLL_SECONDS)
            continue
        if order is None or order.attempt in (None, done):
            time.sleep(_POLL_SECONDS)
            continue
        done = order.attempt
        with tempfile.TemporaryDirectory(prefix=f"spinreg-{run}-") as folder:
            try:
                job = _ordered(order.job or {}, store, run, Path(folder) / "work")
                say(f"taking part in {job.stage} of round {job.round}")
                _take_part(store, run, job, order.attempt, say)
            except _Over:
                say(f"{(order.job or {}).get('stage')} is over")
            except SpinregError as error:
                say(str(error))


def _ordered(fields: dict[str, Any], store: Store, run: str, workdir: Path) -> Job:
    """Return the job of an order, for the run and the store that this machine was told to work for.

    Raises BadInput for another run, and for `prepare`, which would publish files of this machine that the order names.
    """
    job = Job.from_fields(fields)
    if job.stage not in stages_of(1) or job.config.run != run:
        raise BadInput(f"order of run {run}", f"{job.stage} of run {job.config.run}",
                       f"one of {', '.join(stages_of(1))} of run {run}")  # fmt: skip
    return replace(job, store=store.url, workdir=workdir)


def _take_part(store: Store, run: str, job: Job, attempt: str, say: Callable[[str], None]) -> None:
    job.workdir.mkdir(parents=True)
    job_file = job.workdir / "job.json"
    job.save(job_file)
    asked = time.monotonic()

    def check() -> None:
        nonlocal asked
        if time.monotonic() - asked > _POLL_SECONDS:
            asked = time.monotonic()
            with contextlib.suppress(StoreFailed):  # a store that is away for a moment ends nothing
                order = read_order(store, run)
                if order is None or order.attempt != attempt:
                    raise _Over

    run_process(
        start_process([sys.executable, "-m", job.module, str(job_file)], environment={ATTEMPT_VARIABLE: attempt}),
        job.workdir / "log.txt",
        name=job.stage,
        on_line=say,
        check=check,
        grace_seconds=job.config.resources.stop_seconds,
    )
