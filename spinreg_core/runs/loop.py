"""The loop over rounds and stages. Its callers give a callable per stage: a Prefect task, or a plain process.

Decides: the order of steps in an advance, when a stage counts as done, and that a stage is committed before the next
one starts. Leaves out: starting the process of a stage, showing progress (`flows`, `spinreg_core.api`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from spinreg_core.config import RunConfig, UntilConfig
from spinreg_core.errors import Damaged, SpinregError
from spinreg_core.runs.head import HELDOUT, Head
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import RunLease
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import read_manifest, read_record, require_manifest
from spinreg_core.runs.plans import StagePlan, for_each_possible_engine
from spinreg_core.runs.stages import (
    STAGES,
    before_corrections,
    complete_round,
    is_complete,
    needed_by_later_stages,
    stages_of,
)
from spinreg_core.store.base import Store
from spinreg_core.store.cache import cache_folder

# Starts the process of a job, waits for its end, and raises its failure. The text names the attempt.
Start = Callable[[Job, str], object]
R = TypeVar("R")


class StageResult(TypedDict):
    """The result of a committed stage, small enough for the result of a Prefect task."""

    stage: str
    round: int
    uri: str
    fingerprint: str
    metrics: dict[str, Any]
    seconds: float
    reused: bool


class Prepared(TypedDict):
    """The base and data objects of a run, and the counts of its rows."""

    base: str
    data: str
    summary: dict[str, Any]
    reused: bool


@dataclass(frozen=True)
class Steps:
    """The callables that `advance` calls; the argument is a round.

    `stages` has one callable per stage of `STAGES`. `run_round` runs all stages of a round. `measure` runs the
    benchmarks of an iterate and returns whether it measured anything. `why_ended` returns the reason by the conditions
    of `until` to make no further round, or None. `show` shows a finished round.
    """

    prepare: Callable[[], object]
    stages: Mapping[str, Callable[[int], object]]
    run_round: Callable[[int], object]
    measure: Callable[[int], bool]
    why_ended: Callable[[], str | None]
    show: Callable[[int], object]


def advance(lease: RunLease, config: RunConfig, by: str, steps: Steps, say: Callable[[str], object]) -> str | None:
    """Advance a run as its configuration asks, or as an unfinished advance was recorded.

    `by` names the caller: the same caller continues its own advance (a retry). Returns None, or the reason why the run
    ended before its round. Raises what the steps raise.
    """
    start, target, why = lease.begin_advance(by, config.rounds, config.until_round)
    done = complete_round(lease.head)
    say(f"run {config.run!r}: {why}" if target > done else f"run {config.run!r}: round {done} is complete; {why}")
    steps.prepare()
    for correction, rounds in before_corrections(config, lease.head).items():
        say(f"run {config.run!r}: rounds {', '.join(map(str, rounds))} hold results from before the correction "
            f"{correction!r} (CHANGELOG.md); they stay as they are")  # fmt: skip
    if not is_complete(lease.head, 0):
        run_stages(0, steps.stages)
    # The benchmarks of the configuration may have changed since earlier rounds were measured.
    for earlier in range(start + 1):
        if steps.measure(earlier) or earlier == done == 0:
            steps.show(earlier)
    # From where the advance began, also on a retry: Prefect tells nested flow runs apart by the order of their calls,
    # and would hand round 2 the finished flow run of round 1. Finished rounds show as reused.
    for round_number in range(start + 1, target + 1):
        conditions = config.until != UntilConfig() and complete_round(lease.head) < round_number
        ended = steps.why_ended() if conditions else None
        if ended is not None:
            say(f"run {config.run!r} ends before round {round_number}: {ended}")
            lease.finish_advance(ended=ended, ended_by=config.until)
            return ended
        steps.run_round(round_number)
        if complete_round(lease.head) < round_number:
            raise SpinregError(f"round {round_number} of run {config.run!r} ended without its commits")
    return None


def run_stages(round_number: int, stages: Mapping[str, Callable[[int], R]]) -> dict[str, R]:
    """Run all stages of a round in their order. Returns their results by name."""
    return {stage: stages[stage](round_number) for stage in stages_of(round_number)}


def do_stage(
    store: Store, lease: RunLease, config: RunConfig, stage: str, round_number: int, start: Start
) -> StageResult:
    """Make sure that a round's stage is committed.

    A stage is done if its object exists, by the name in the head or by its fingerprint: another run may have made it,
    or this one was killed between publishing and committing. Files that `spinreg gc` removed count as present unless a
    later stage reads them. Otherwise the process of the stage runs, from its committed parts.

    Raises Damaged for a committed object that is missing, and what `start` raises.
    """
    committed = lease.head.stage(round_number, stage)
    plan = STAGES[stage].plan(config, lease.head, round_number)
    object_id = committed or plan.object_id
    manifest = read_manifest(store, object_id)
    if manifest is None:
        record = read_record(store, object_id)
        if record is None and committed:
            where = store.uri(f"objects/{object_id}")
            raise Damaged(f"{where}: committed as round {round_number} {stage}, but not there")
        # A repair that set the object aside waits for it to be made again; only a run that has it may do without.
        usable = record is not None and (committed or record.removed is None or record.removed.repair is None)
        if usable and not _is_read_later(store, config, lease.head, stage, round_number, object_id):
            manifest = record
    reused = manifest is not None
    if manifest is None:
        if plan.object_id != object_id:
            plan = _plan_of(store, config, lease.head, stage, round_number, object_id)
        run_plan(store, lease, config, plan, f"round-{round_number}-{stage}", start)
        manifest = require_manifest(store, object_id)
    lease.commit(round_number, stage, object_id)
    return {
        "stage": stage, "round": round_number, "uri": store.uri(f"objects/{object_id}"),
        "fingerprint": object_id.rpartition("-")[2], "metrics": manifest.metrics, "seconds": manifest.seconds,
        "reused": reused,
    }  # fmt: skip


def _plan_of(store: Store, config: RunConfig, head: Head, stage: str, round_number: int, object_id: str) -> StagePlan:
    """Return the plan that makes a committed object again. Raises Damaged where no engine of `auto` makes it."""
    plans = [STAGES[stage].plan(one, head, round_number) for one in for_each_possible_engine(config)]
    for plan in plans:
        if plan.object_id == object_id:
            return plan
    where = store.uri(f"objects/{object_id}")
    raise Damaged(f"{where}: its files are gone, and this machine would make {plans[0].object_id} instead of it")


def _is_read_later(store: Store, config: RunConfig, head: Head, stage: str, round_number: int, object_id: str) -> bool:
    """Return whether a stage to come reads an object that has lost files."""
    head = head.model_copy(deep=True)
    head.enter(round_number, stage, object_id)
    # Only the evaluation reads held-out answers, and another run may have made it.
    if stage == HELDOUT:
        evaluation = STAGES["evaluate"].plan(config, head, round_number).object_id
        if read_manifest(store, evaluation) is not None:
            head.enter(round_number, "evaluate", evaluation)
    return object_id in needed_by_later_stages(config, head)


def run_plan(store: Store, lease: RunLease, config: RunConfig, plan: StagePlan, name: str, start: Start) -> None:
    """Run the process of a plan in a scratch folder named after the attempt."""
    writer = lease.writer()
    with scratch(store, config.run, name, writer) as folder:
        start(plan.job(config, store.url, writer, folder), name)


def do_prepare(store: Store, lease: RunLease, config: RunConfig, start: Start) -> Prepared:
    """Make sure that the base policy and the rows of a run are committed, once per run."""
    base, data = lease.head.base, lease.head.data
    if base and data:
        manifest = read_manifest(store, data)
        if manifest is not None and read_manifest(store, base) is not None:
            return {"base": base, "data": data, "summary": manifest.metrics, "reused": True}
    # Ids of base and data are unknown before they are made, so `spinreg gc` cannot expect them. If it marked an object
    # that is taken over here, before it could see our commit, the object is made once more.
    while True:
        writer = lease.writer()
        with scratch(store, config.run, "prepare", writer) as folder:
            # The fingerprints of what this stage makes depend on contents that only the stage itself sees.
            made: Any = start(Job("prepare", "", {}, store.url, writer, 0, {}, config, folder), "prepare")
        lease.commit_inputs(made["base"], made["data"])
        found: Manifest | None = read_manifest(store, made["data"])
        if found is not None and read_manifest(store, made["base"]) is not None:
            return {"base": made["base"], "data": made["data"], "summary": found.metrics, "reused": False}


@contextmanager
def scratch(store: Store, run: str, name: str, writer: str) -> Iterator[Path]:
    """Yield an empty folder for one attempt at a stage. It is removed after success, and kept for its log otherwise.

    Folders of earlier attempts are removed first. An attempt that still runs (of a flow that was just killed) never
    shares files with this one, because each has the name of its writer.
    """
    place = hashlib.sha256(store.url.encode()).hexdigest()[:8]
    folder = cache_folder() / "work" / f"{run}-{place}" / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / writer).mkdir(parents=True)
    yield folder / writer
    shutil.rmtree(folder / writer, ignore_errors=True)
