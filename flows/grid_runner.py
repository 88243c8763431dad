"""Runs the members of a comparison to their ends: as flow runs of a deployment, or here, one after the other.

Decides: which member is started when (what two members make in common is made once), that a flow run which advances a
member already is waited for instead of doubled, and that the end of one member, however bad, ends no other. Leaves
out: who the members are (`spinreg_core/comparison/grid.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import CancelledRun, ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.types._datetime import now

from flows.spin import spin
from spinreg_core.comparison.grid import Member, open_reason, rounds_open, waits_for
from spinreg_core.errors import BadInput, Damaged, SpinregError, StoreFailed, StoreRefused
from spinreg_core.runs.head import complete_round, read_head
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tasks.artifacts import artifact_key, show_table
from tasks.log import run_log
from tasks.server import call_subflow

POLL_SECONDS = 5.0
_UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]


class Progress:
    """What is known of every member, shown as a table whenever it changes."""

    def __init__(self, store: Store, name: str, members: Sequence[Member]) -> None:
        self._store, self._name, self._members = store, name, members
        self._states: dict[str, str] = {member.run: "waits" for member in members}
        self._shown: list[dict[str, Any]] = []

    def say(self, member: Member, state: str) -> None:
        if self._states[member.run] != state:
            self._states[member.run] = state
            run_log()(f"{member.run}: {state}")

    def show(self) -> None:
        rows = []
        for member in self._members:
            head = _head(self._store, member.run)
            done = "" if head is None else f"{complete_round(head)} of {member.target}"
            rows.append({"member": member.run, "rounds": done, "state": self._states[member.run]})
        if rows != self._shown:
            self._shown = rows
            show_table(artifact_key(self._name, "members"), rows, f"Members of the comparison {self._name}")


def run_here(store: Store, members: Sequence[Member], progress: Progress, check: Callable[[], None]) -> dict[str, str]:
    """Advance the members in this process, each as a nested flow run. Returns why members failed, by run. check: raises
    when this is to end."""
    failures: dict[str, str] = {}
    for member in members:
        check()
        if open_reason(store, member) is None:
            progress.say(member, "was complete")
            continue
        progress.say(member, "runs")
        progress.show()
        try:
            call_subflow(spin, **member.parameters)
        except CancelledRun:  # of this member alone, or with all of this, which is known within seconds
            time.sleep(2 * POLL_SECONDS)
            check()
            failures[member.run] = "it was cancelled"
        except Exception as error:
            failures[member.run] = str(error) or repr(error)
        progress.say(member, f"failed: {failures[member.run]}" if member.run in failures else "complete")
    progress.show()
    return failures


def require_other_pool(deployment: str) -> UUID:
    """The deployment's id. Raises BadInput where there is none, and where its runs need the pool that this run holds a
    place in: it would wait for them, and they for it."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(deployment)
        except (ObjectNotFound, ValueError):
            raise BadInput(
                "deployment", repr(deployment), "a deployment of the flow spin (`prefect deploy --all`)"
            ) from None
        own = client.read_flow_run(UUID(str(flow_run.id))).work_pool_name
    if own is not None and own == found.work_pool_name:
        raise BadInput(
            "deployment", f"{deployment}, of the work pool {own!r} in which this comparison runs too",
            "another pool for the comparison (`control` in prefect.yaml): it holds a place while it waits",
        )  # fmt: skip
    return found.id


def run_on_pool(
    store: Store, members: Sequence[Member], deployment: str, progress: Progress, check: Callable[[], None]
) -> dict[str, str]:
    """Advance the members by flow runs of a deployment, as many at a time as its work pool takes. Returns why members
    failed, by run.

    A member whose next objects another is about to make is started when they are there. check: raises when this is to
    end. Flow runs of members of a comparison that was killed go on, and its next start waits for them.
    """
    deployment_id = require_other_pool(deployment)
    waiting, running = list(members), dict[str, tuple[Member, UUID]]()
    attempts: dict[str, int] = {}
    own: set[UUID] = set()
    failures: dict[str, str] = {}
    told_away = False
    while waiting or running:
        check()
        try:
            ended = _ended([of for _, of in running.values()])
            under_way = _under_way(deployment_id, store)
            for member, of in [one for one in running.values() if one[1] in ended]:
                del running[member.run]
                # One of ours that came to its good end has measured what it was to, by what its machine says.
                left = (rounds_open if of in own and ended[of] is None else open_reason)(store, member)
                if ended[of] is None and left is None:
                    progress.say(member, "complete")
                elif member.run in under_way or member.run not in attempts:
                    waiting.insert(0, member)  # it ended for another's sake, or was somebody else's and went less far
                else:
                    failures[member.run] = "; ".join(filter(None, [ended[of] or "its flow run ended", left]))
                    progress.say(member, f"failed: {failures[member.run]}")
            for member in [one for one in waiting if one.run in under_way]:  # before anybody is started beside them
                _require_same(under_way[member.run], member)
                progress.say(member, "runs, in a flow run that was there")
                running[member.run] = (member, under_way[member.run].id)
                waiting.remove(member)
            heads = {run: _head(store, run) for run in running}
            for member in list(waiting):
                others = [(one, heads.get(one.run)) for one, _ in running.values()]
                if member.run not in attempts and open_reason(store, member) is None:
                    progress.say(member, "was complete")
                elif (other := waits_for(member, store, others)) is not None:
                    progress.say(member, f"waits for what {other.run} makes")
                    continue
                else:
                    started = _start(deployment, member, attempts.get(member.run, 0) + 1)
                    attempts[member.run] = attempts.get(member.run, 0) + 1
                    progress.say(member, f"submitted as flow run {started.name}")
                    running[member.run] = (member, started.id)
                    own.add(started.id)
                waiting.remove(member)
            progress.show()
            told_away = False
        except StoreRefused:  # which waiting does not mend
            raise
        except (httpx.TransportError, PrefectHTTPStatusError, StoreFailed) as error:
            # The members outlive a server, or a store, that is away for a while; so does this.
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500:
                raise SpinregError(f"the Prefect server refuses what the comparison asks for: {error}") from error
            if not told_away:
                run_log()(f"the Prefect server or the store is away ({error!r}); asked again every {POLL_SECONDS:g} s")
            told_away = True
        if waiting or running:
            time.sleep(POLL_SECONDS)
    return failures


def _head(store: Store, run: str) -> dict[str, Any] | None:
    try:
        return read_head(store, run)
    except Damaged:  # `open_reason` says so when its flow run ends
        return None


def _require_same(one: FlowRun, member: Member) -> None:
    """Raise BadInput for a flow run that is about to start with something else than the member is, as one that an
    earlier comparison of this name has left in the queue. One that runs already is judged by what it leaves."""
    said = {name: one.parameters.get(name) for name in member.parameters}
    if one.state is not None and one.state.is_scheduled() and said != member.parameters:
        raise BadInput(
            "name", f"flow run {one.name} ({one.id}), which is to advance {member.run} with other parameters",
            "that one cancelled, or another name of the comparison",
        )  # fmt: skip


def _start(deployment: str, member: Member, attempt: int) -> FlowRun:
    # Asked again after an answer that was lost, it is the same flow run; a retry of the comparison makes another.
    key = f"{flow_run.id}:{flow_run.run_count}:{member.run}:{attempt}"
    started: FlowRun = run_deployment(  # type: ignore[assignment]
        deployment, parameters=member.parameters, timeout=0, tags=["spinreg"], idempotency_key=key
    )
    return started


def _ended(of: Sequence[UUID]) -> dict[UUID, str | None]:
    """Of flow runs those that have ended: None, or how badly."""
    if not of:
        return {}
    found: list[FlowRun] = []
    with get_client(sync_client=True) as client:
        for start in range(0, len(of), 100):  # the server tells of 200 at most
            some = filters.FlowRunFilterId(any_=list(of[start : start + 100]))
            found += client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(id=some))
    ended: dict[UUID, str | None] = {one: "its flow run was deleted" for one in of if one not in {f.id for f in found}}
    for one in found:
        if one.state is not None and one.state.is_final():
            bad = not one.state.is_completed()
            ended[one.id] = f"{one.state.name}: {one.state.message or 'no message'}" if bad else None
    return ended


def _under_way(deployment_id: UUID, store: Store) -> dict[str, FlowRun]:
    """Flow runs of the deployment that advance a run of the store, or are about to, by the run's name."""
    found: dict[str, FlowRun] = {}
    with get_client(sync_client=True) as client:
        for page in range(1000):
            some = client.read_flow_runs(
                deployment_filter=filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[deployment_id])),
                flow_run_filter=filters.FlowRunFilter(
                    state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=_UNFINISHED))
                ),
                sort=FlowRunSort.START_TIME_ASC, limit=200, offset=200 * page,
            )  # fmt: skip
            for one in some:
                later = one.expected_start_time is not None and one.expected_start_time > now("UTC")
                if later and one.state is not None and one.state.name == "Scheduled":  # by a schedule; no retry
                    continue
                if _is_of(store, one.parameters.get("store")):
                    found.setdefault(str(one.parameters.get("run")), one)
            if len(some) < 200:
                break
    return found


def _is_of(store: Store, given: Any) -> bool:
    try:
        return given is None or open_store(str(given)).url == store.url
    except BadInput:
        return False
