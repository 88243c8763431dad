"""The flow `round`: one round of self-play, all its stages in order; also benchmarks.

Decides: the Prefect task of each stage, and what is shown at the end of a round. Leaves out: the order of stages and
rounds (`spinreg_core.runs`), the tasks (`tasks`). Runs inside `spin` only, which holds the lease.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.tasks import Task

from flows.artifacts import show_round, track
from spinreg_core.api import measure_or_note
from spinreg_core.config import RunConfig
from spinreg_core.errors import StagePreempted
from spinreg_core.runs.head import HELDOUT
from spinreg_core.runs.loop import StageResult, run_stages
from spinreg_core.runs.stages import STAGES
from tasks.benchmark import benchmark
from tasks.context import current_context
from tasks.evaluate import evaluate
from tasks.generate import generate
from tasks.log import run_log
from tasks.mix_opponent import mix_opponent
from tasks.run_stage import preempted, run_task
from tasks.server import flush, wait_for_server
from tasks.train import train


def stage_calls(config: RunConfig) -> dict[str, Callable[[int], StageResult]]:
    """Return a call of its Prefect task for every stage, as `advance` and `run_stages` take them."""
    tasks: dict[str, tuple[Task[..., Any], tuple[str, ...]]] = {
        "generate": (generate, ()), "mix-opponent": (mix_opponent, ()), "train": (train, ()),
        HELDOUT: (generate, ("heldout",)), "evaluate": (evaluate, ()),
    }  # fmt: skip
    assert tasks.keys() == STAGES.keys()

    def call(stage: str) -> Callable[[int], StageResult]:
        task, more = tasks[stage]
        return lambda number: run_task(task, config.resources, config.run, number, *more)

    return {stage: call(stage) for stage in tasks}


@flow(name="round", flow_run_name="{run}/round-{round_number}", persist_result=False)
def round_(run: str, round_number: int) -> dict[str, StageResult] | State[dict[str, StageResult]]:
    """Train iterate `round_number` from the one before it, and evaluate it.

    Args:
        run: Name of the run.
        round_number: The round, counted from 1.
    """
    context = current_context()
    try:
        results = run_stages(round_number, stage_calls(context.config))
        measure(round_number)
    except StagePreempted as error:
        return preempted(error)
    show_round(round_number)
    track(context.store, context.config)
    flush()
    # A restart of the server is soon over; without this wait the end of the flow run could not be reported.
    wait_for_server()
    return results


def measure(round_number: int) -> bool:
    """Run the benchmarks of an iterate as a task (`measure_or_note`). A failure fails the flow run after its rounds."""
    context = current_context()
    config = context.config
    call = partial(run_task, benchmark, config.resources, config.run, round_number)
    return measure_or_note(config, context.lease, round_number, call, context.failures, run_log())
