"""The task `evaluate`: held-out metrics of an iterate; round 0 is the base."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.run_stage import stage_task


@task(
    name="evaluate",
    task_run_name="{run}/round-{round_number}/evaluate",
    tags=["spinreg", "evaluate"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def evaluate(run: str, round_number: int) -> dict[str, Any] | State[dict[str, Any]]:
    """Return the stage's `StageResult`."""
    return stage_task("evaluate", round_number)
