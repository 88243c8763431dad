"""The task `prepare`: base model and checked rows go into the store, once per run."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from spinreg_core.runs.loop import Prepared, do_prepare
from tasks.run_stage import run_committed


@task(
    name="prepare",
    task_run_name="{run}/prepare",
    tags=["spinreg", "prepare"],
    # The store decides what is done already.
    cache_policy=NO_CACHE,
)
def prepare(run: str) -> Prepared | State[Prepared]:
    """Return `Prepared`: the object ids of base and data, and the counts of rows."""
    return run_committed("prepare", lambda c, start: do_prepare(c.store, c.lease, c.config, start))
