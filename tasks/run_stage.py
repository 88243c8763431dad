"""What the stage tasks have in common: reuse what is committed, else run the process, then commit.

Decides: when a stage counts as done, what a task returns and what it retries. Leaves out: what the stages do,
and what each of them shows (their own files).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed, Failed
from prefect.tasks import Task, exponential_backoff

from spinreg_core.config import ResourcesConfig
from spinreg_core.errors import BadInput, Damaged, JudgeAway, LeaseLost, StagePreempted
from spinreg_core.maintenance.retention import needed_by_later_stages
from spinreg_core.runs.head import stage_object
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import read_manifest, read_record, require_manifest
from spinreg_core.runs.plans import STAGE_PLANS
from tasks.artifacts import StageProgress, artifact_key
from tasks.cancellation import RunCancelled
from tasks.context import current_context
from tasks.log import run_log
from tasks.prewarm import prepare_spare, take_spare
from tasks.results import StageResult
from tasks.server import call_task
from tasks.stage_process import run_stage

P = ParamSpec("P")
R = TypeVar("R")


def stage_task(
    name: str, run_name: str = "round-{round_number}/", tag: str = ""
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Return the decorator of a stage's task. run_name: the part of its run name between the run and the task."""
    return task(
        name=name,
        task_run_name=f"{{run}}/{run_name}{name}",
        tags=["spinreg", tag or name],
        cache_policy=NO_CACHE,  # the store decides what is done
    )


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


def watched_stage(job: Job, *name: object) -> dict[str, Any]:
    """`run_stage` within the run's deadline and lease, its progress shown under the artifact key of `name`.

    The process of the stage after it is started meanwhile, up to its imports.
    """
    context = current_context()
    deadline = context.config.resources.deadline_minutes

    last = job.stage in ("evaluate", "benchmark") and job.round >= context.target
    return run_stage(
        job,
        take=take_spare,
        on_start=(lambda: None) if last else prepare_spare,
        deadline_seconds=None if deadline is None else deadline * 60,
        on_progress=StageProgress(artifact_key(context.config.run, *name)),
        check=context.check,
    )


def do_stage(stage: str, round_number: int) -> StageResult | State[StageResult]:
    """Make sure that a round's stage is committed. Returns a small JSON, as the task's result.

    A stage that the head names is done, also where `spinreg gc` has removed what nothing reads any more. So is an
    object that exists under the stage's fingerprint (another run made it, or this one was killed between publishing
    and committing): it is taken over. Otherwise the stage's process runs; it continues from its own committed parts.
    """
    context = current_context()
    store, session, config = context.store, context.session, context.config
    context.check()
    committed = stage_object(session.head, round_number, stage)
    plan = STAGE_PLANS[stage](config, session.head, round_number)
    object_id = committed or plan.object_id
    manifest = read_manifest(store, object_id)
    if committed and manifest is None:
        record = read_record(store, object_id)
        if record is None:
            where = store.uri(f"objects/{object_id}")
            raise Damaged(f"{where}: committed as round {round_number} {stage}, but not there")
        if object_id not in needed_by_later_stages(config, session.head):
            manifest = record
    reused = manifest is not None
    if manifest is None:
        writer = session.writer()
        with context.scratch(f"round-{round_number}-{stage}", writer) as folder:
            try:
                watched_stage(plan.job(config, store.url, writer, folder), "round", round_number, stage)
            except StagePreempted as error:
                return preempted(error)
        manifest = require_manifest(store, object_id)
    session.commit(round_number, stage, object_id)
    result: StageResult = {
        "stage": stage,
        "round": round_number,
        "uri": store.uri(f"objects/{object_id}"),
        "fingerprint": object_id.rpartition("-")[2],
        "metrics": manifest["metrics"],
        "seconds": manifest["seconds"],
        "reused": reused,
    }
    if not reused:
        return result
    run_log()(f"{stage} of round {round_number} is done already: {result['uri']}")
    return Completed(name="Reused", message=f"committed before: {object_id}", data=result)
