"""The task `generate`: the round's prompts are answered by the opponent's iterates."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.run_stage import do_stage


@task(
    name="generate",
    task_run_name="{run}/round-{round_number}/generate",
    tags=["spinreg", "generate"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def generate(run: str, round_number: int) -> dict[str, Any] | State[dict[str, Any]]:
    """Returns {"stage", "round", "uri", "fingerprint", "metrics", "seconds", "reused"}."""
    return do_stage("generate", round_number)
