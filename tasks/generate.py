"""The task `generate`: the opponent's answers to the round's prompts."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.results import StageResult
from tasks.run_stage import do_stage


@task(
    name="generate",
    task_run_name="{run}/round-{round_number}/generate",
    tags=["spinreg", "generate"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def generate(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Answer the round's prompts with the opponent's iterates."""
    return do_stage("generate", round_number)
