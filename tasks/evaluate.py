"""The task `evaluate`: held-out metrics of an iterate; round 0 is the base."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from spinreg_core.runs.loop import StageResult
from tasks.run_stage import stage_task


@task(
    name="evaluate",
    task_run_name="{run}/round-{round_number}/evaluate",
    tags=["spinreg", "evaluate"],
    # The store decides what is done already.
    cache_policy=NO_CACHE,
)
def evaluate(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Return the result of the stage."""
    return stage_task("evaluate", round_number)
