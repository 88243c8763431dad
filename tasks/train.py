"""The task `train`: the next iterate from the round's pairs."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.run_stage import stage_task


@task(
    name="train",
    task_run_name="{run}/round-{round_number}/train",
    tags=["spinreg", "train"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def train(run: str, round_number: int) -> dict[str, Any] | State[dict[str, Any]]:
    """Return the stage's `StageResult`."""
    return stage_task("train", round_number)
