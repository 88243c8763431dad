"""The task `mix-opponent`: real and generated answers are paired and scored under the references."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.run_stage import do_stage


@task(
    name="mix-opponent",
    task_run_name="{run}/round-{round_number}/mix-opponent",
    tags=["spinreg", "mix-opponent"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def mix_opponent(run: str, round_number: int) -> dict[str, Any] | State[dict[str, Any]]:
    """Returns {"stage", "round", "uri", "fingerprint", "metrics", "seconds", "reused"}."""
    return do_stage("mix-opponent", round_number)
