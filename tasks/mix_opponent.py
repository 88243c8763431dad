"""The task `mix-opponent`: real and generated answers are paired and scored under the references."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from spinreg_core.runs.loop import StageResult
from tasks.run_stage import stage_task


@task(
    name="mix-opponent",
    task_run_name="{run}/round-{round_number}/mix-opponent",
    tags=["spinreg", "mix-opponent"],
    # The store decides what is done already.
    cache_policy=NO_CACHE,
)
def mix_opponent(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Return the result of the stage."""
    return stage_task("mix-opponent", round_number)
