"""The common part of the stage tasks: run a stage under Prefect, with retries, progress and the state "Reused".

Decides: the results of a task, and the failures that Prefect retries. Leaves out: when a stage counts as done
(`spinreg_core.runs`), the process of a stage (`tasks.stage_process`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed, Failed
from prefect.tasks import Task, exponential_backoff

from spinreg_core.config import ResourcesConfig
from spinreg_core.errors import BadInput, Damaged, JudgeAway, LeaseLost, StagePreempted
from spinreg_core.runs.job import Job
from spinreg_core.runs.loop import StageResult, Start, do_stage
from tasks.artifacts import StageProgress, artifact_key
from tasks.cancellation import RunCancelled
from tasks.context import Context, current_context
from tasks.log import run_log
from tasks.server import call_task
from tasks.stage_process import run_stage

R = TypeVar("R", bound=Mapping[str, Any])


def may_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return whether another attempt may cure a failure.

    Bad input, damage, a lost lease and a cancelled run stay. An absent judge was waited for already.
    """
    try:
        state.result()
    except (BadInput, Damaged, JudgeAway, LeaseLost, RunCancelled):
        return False
    except BaseException:
        return True
    return False


def preempted(error: StagePreempted) -> State[Any]:
    """Return the failed state "Preempted", which Prefect retries."""
    return Failed(name="Preempted", message=str(error), data=error)


def run_task(task: Task[..., Any], resources: ResourcesConfig, *arguments: object) -> Any:
    """Call a task with the retries of the run, and return the data of its result."""
    # Delays double and are jittered, so that the runs of one outage do not retry at the same moment.
    if resources.retries:
        task = task.with_options(
            retries=resources.retries,
            retry_delay_seconds=exponential_backoff(resources.retry_delay_seconds),
            retry_jitter_factor=0.3,
            retry_condition_fn=may_retry,
        )
    result: Any = call_task(task, *arguments)
    # Prefect returns the state itself, not its data, if the task returned one ("Reused").
    return result.result() if isinstance(result, State) else result


def watched_stage(job: Job, name: str) -> object:
    """Run the process of a stage within the deadline and lease of the run, and show its progress in Prefect."""
    context = current_context()
    deadline = context.config.resources.deadline_minutes
    return run_stage(
        job,
        deadline_seconds=None if deadline is None else deadline * 60,
        on_progress=StageProgress(artifact_key(context.config.run, name)),
        check=context.check,
    )


def run_committed(name: str, do: Callable[[Context, Start], R]) -> R | State[R]:
    """Make sure that a stage is committed, and return its result as the result of a task.

    `do` makes sure of it with the function that starts a process. Work that was done before gets the state "Reused".
    """
    context = current_context()
    context.check()
    try:
        result = do(context, watched_stage)
    except StagePreempted as error:
        return preempted(error)
    if not result["reused"]:
        return result
    run_log()(f"{name} is done already")
    return Completed(name="Reused", message=f"{name}: committed before", data=result)


def stage_task(stage: str, round_number: int) -> StageResult | State[StageResult]:
    """Make sure that a stage of a round is committed, and return its result as the result of a task."""
    return run_committed(
        f"{stage} of round {round_number}",
        lambda c, start: do_stage(c.store, c.lease, c.config, stage, round_number, start),
    )
