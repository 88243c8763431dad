"""The task `train`: the next iterate from the round's pairs."""

from __future__ import annotations

from prefect.client.schemas.objects import State

from tasks.results import StageResult
from tasks.run_stage import do_stage, stage_task


@stage_task("train")
def train(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Train the next iterate on the round's pairs."""
    return do_stage("train", round_number)
