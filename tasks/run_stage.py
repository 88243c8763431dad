"""What the stage tasks have in common: reuse what is committed, else run the process, then commit.

Decides: when a stage counts as done, what a task returns and what it retries. Leaves out: what the stages do,
and what each of them shows (their own files).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed, Failed
from prefect.tasks import Task, exponential_backoff

from spinreg_core.config import ResourcesConfig
from spinreg_core.errors import BadInput, Damaged, JudgeAway, LeaseLost, StagePreempted
from spinreg_core.runs.job import Job
from spinreg_core.runs.loop import Start, do_stage
from tasks.artifacts import StageProgress, artifact_key
from tasks.cancellation import RunCancelled
from tasks.context import Context, current_context
from tasks.log import run_log
from tasks.server import call_task
from tasks.stage_process import run_stage


def may_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Only failures that another attempt may cure: not bad input, damage, a lost lease or a cancelled run; nor a judge
    that is away, which was waited for."""
    try:
        state.result()
    except (BadInput, Damaged, JudgeAway, LeaseLost, RunCancelled):
        return False
    except BaseException:
        return True
    return False


def preempted(error: StagePreempted) -> State[Any]:
    """A failure for Prefect, which retries it, under the name of what it is."""
    return Failed(name="Preempted", message=str(error), data=error)


def run_task(task: Task[..., Any], resources: ResourcesConfig, *arguments: object) -> dict[str, Any]:
    """Call a task with the run's retries: delays double and are spread, so that workers do not align."""
    if resources.retries:
        task = task.with_options(
            retries=resources.retries,
            retry_delay_seconds=exponential_backoff(resources.retry_delay_seconds),
            retry_jitter_factor=0.3,
            retry_condition_fn=may_retry,
        )
    result: Any = call_task(task, *arguments)
    # A task that returns a state of its own ("Reused") hands back the state, not its data.
    return result.result() if isinstance(result, State) else result


def watched_stage(job: Job, name: str) -> dict[str, Any]:
    """`run_stage` within the run's deadline and lease, its progress shown under the artifact key of `name`."""
    context = current_context()
    deadline = context.config.resources.deadline_minutes
    return run_stage(
        job,
        deadline_seconds=None if deadline is None else deadline * 60,
        on_progress=StageProgress(artifact_key(context.config.run, name)),
        check=context.check,
    )


def run_committed(
    name: str, do: Callable[[Context, Start], Mapping[str, Any]]
) -> dict[str, Any] | State[dict[str, Any]]:
    """Return the result of a stage as that of a task: a state "Reused" for work that was done before.

    `do` makes sure that the stage is committed, with the function that starts its process.
    """
    context = current_context()
    context.check()
    try:
        result = do(context, watched_stage)
    except StagePreempted as error:
        return preempted(error)
    if not result["reused"]:
        return dict(result)
    run_log()(f"{name} is done already")
    return Completed(name="Reused", message=f"{name}: committed before", data=dict(result))


def stage_task(stage: str, round_number: int) -> dict[str, Any] | State[dict[str, Any]]:
    """Make sure that a round's stage is committed. Returns a `StageResult`, as the task's result."""
    return run_committed(
        f"{stage} of round {round_number}",
        lambda c, start: do_stage(c.store, c.session, c.config, stage, round_number, start),
    )
