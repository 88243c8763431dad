"""The task `mix-opponent`: pairs of real and generated answers, scored under the references."""

from __future__ import annotations

from prefect.client.schemas.objects import State

from tasks.results import StageResult
from tasks.run_stage import do_stage, stage_task


@stage_task("mix-opponent")
def mix_opponent(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Pair real with generated answers, and score them under the references."""
    return do_stage("mix-opponent", round_number)
