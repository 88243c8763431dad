"""The task `generate`: the opponent's answers to the round's prompts."""

from __future__ import annotations

from prefect.client.schemas.objects import State

from tasks.results import StageResult
from tasks.run_stage import do_stage, stage_task


@stage_task("generate")
def generate(run: str, round_number: int) -> StageResult | State[StageResult]:
    """Answer the round's prompts with the opponent's iterates."""
    return do_stage("generate", round_number)
