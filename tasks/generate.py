"""The task `generate`: iterates answer prompts, the round's or the held-out ones."""

from __future__ import annotations

from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import task_run

from spinreg_core.runs.head import HELDOUT
from spinreg_core.runs.loop import StageResult
from tasks.run_stage import stage_task


def _stage(rows: str) -> str:
    return HELDOUT if rows == "heldout" else "generate"


def _name() -> str:
    given = task_run.parameters
    return f"{given['run']}/round-{given['round_number']}/{_stage(given['rows'])}"


@task(
    name="generate",
    task_run_name=_name,
    tags=["spinreg", "generate"],
    # The store decides what is done already.
    cache_policy=NO_CACHE,
)
def generate(
    run: str, round_number: int, rows: Literal["train", "heldout"] = "train"
) -> StageResult | State[StageResult]:
    """Return the result of the stage.

    rows: "train" are the prompts of the round, for the iterates of the opponent. "heldout" are the held-out prompts,
        for the iterate that the round has trained (round 0: the base).
    """
    return stage_task(_stage(rows), round_number)
