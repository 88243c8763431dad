"""The task `evaluate`: held-out metrics of an iterate; round 0 is the base."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.results import StageResult
from tasks.run_stage import do_stage


@task(
    name="evaluate",
    task_run_name="{run}/round-{round_number}/evaluate",
    tags=["spinreg", "evaluate"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def evaluate(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Evaluate an iterate on the held-out rows."""
    return do_stage("evaluate", round_number)
