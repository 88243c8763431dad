"""The task `mix-opponent`: real and generated answers are paired and scored under the references."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.run_stage import stage_task


@task(
    name="mix-opponent",
    task_run_name="{run}/round-{round_number}/mix-opponent",
    tags=["spinreg", "mix-opponent"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def mix_opponent(run: str, round_number: int) -> dict[str, Any] | State[dict[str, Any]]:
    """Return the stage's `StageResult`."""
    return stage_task("mix-opponent", round_number)
