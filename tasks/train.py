"""The task `train`: the next iterate from the round's pairs."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from spinreg_core.runs.loop import StageResult
from tasks.run_stage import stage_task


@task(
    name="train",
    task_run_name="{run}/round-{round_number}/train",
    tags=["spinreg", "train"],
    # The store decides what is done already.
    cache_policy=NO_CACHE,
)
def train(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Return the result of the stage."""
    return stage_task("train", round_number)
