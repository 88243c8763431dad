"""The task `mix-opponent`: pairs of real and generated answers, scored under the references."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.results import StageResult
from tasks.run_stage import do_stage


@task(
    name="mix-opponent",
    task_run_name="{run}/round-{round_number}/mix-opponent",
    tags=["spinreg", "mix-opponent"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def mix_opponent(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Pair real with generated answers, and score them under the references."""
    return do_stage("mix-opponent", round_number)
