"""The task `train`: the next iterate from the round's pairs."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.results import StageResult
from tasks.run_stage import do_stage


@task(
    name="train",
    task_run_name="{run}/round-{round_number}/train",
    tags=["spinreg", "train"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def train(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Train the next iterate on the round's pairs."""
    return do_stage("train", round_number)
