"""The task `prepare`: base model and checked rows go into the store, once per run."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from spinreg_core.runs.loop import do_prepare
from tasks.run_stage import run_committed


@task(
    name="prepare",
    task_run_name="{run}/prepare",
    tags=["spinreg", "prepare"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def prepare(run: str) -> dict[str, Any] | State[dict[str, Any]]:
    """Return `Prepared`: the object ids of base and data, and the counts of rows."""
    return run_committed("prepare", lambda c, start: do_prepare(c.store, c.session, c.config, start))
