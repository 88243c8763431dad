"""The task `evaluate`: held-out metrics of an iterate; round 0 is the base."""

from __future__ import annotations

from prefect.client.schemas.objects import State

from tasks.results import StageResult
from tasks.run_stage import do_stage, stage_task


@stage_task("evaluate")
def evaluate(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Evaluate an iterate on the held-out rows."""
    return do_stage("evaluate", round_number)
