"""Runs the members of a comparison: as flow runs of a deployment, or in this process, one after the other.

Decides: when a member starts, so that common objects are made once; that a flow run which already advances a member is
waited for; and that a failed member ends no other. Leaves out: choosing the members.
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
from spinreg_core.runs.head import Head, read_head
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tasks.artifacts import artifact_key, show_table
from tasks.log import run_log
from tasks.server import call_subflow

POLL_SECONDS = 5.0
_UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]


class Progress:
    """States of the members, shown as a table whenever one changes. table: takes key, rows and description."""

    def __init__(
        self, store: Store, name: str, members: Sequence[Member], table: Callable[..., object] = show_table
    ) -> None:
        self._store, self._name, self._members, self._table = store, name, members, table
        self._states: dict[str, str] = {member.run: "waits" for member in members}
        self._shown: list[dict[str, str]] = []

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
            self._table(artifact_key(self._name, "members"), rows, f"Members of the comparison {self._name}")


def _advance(member: Member) -> None:
    call_subflow(spin, **member.parameters)


def run_here(
    store: Store,
    members: Sequence[Member],
    progress: Progress,
    check: Callable[[], None],
    advance: Callable[[Member], None] = _advance,
) -> dict[str, str]:
    """Advance the members in this process, each as a nested flow run. Returns the reasons of failed ones by run.

    check: raises when the comparison must end. advance: advances one member.
    """
    failures: dict[str, str] = {}
    for member in members:
        check()
        if open_reason(store, member) is None:
            progress.say(member, "was complete")
            continue
        progress.say(member, "runs")
        progress.show()
        try:
            advance(member)
        except CancelledRun:
            # Either this member alone was cancelled or the whole comparison; `check` knows after a few seconds.
            time.sleep(2 * POLL_SECONDS)
            check()
            failures[member.run] = "it was cancelled"
        except Exception as error:
            failures[member.run] = str(error) or repr(error)
        progress.say(member, f"failed: {failures[member.run]}" if member.run in failures else "complete")
    progress.show()
    return failures


class FlowRuns:
    """Flow runs of a deployment of `spin` that advance runs of one store, as the Prefect server knows them."""

    def __init__(self, deployment: str, store: Store) -> None:
        """Raise BadInput if there is no such deployment, and if its runs need the pool that this flow run is in.

        A comparison holds a slot of its pool. In the same pool it would wait for its members, and they for its slot.
        """
        self._deployment, self._store = deployment, store
        with get_client(sync_client=True) as client:
            try:
                found = client.read_deployment_by_name(deployment)
            except (ObjectNotFound, ValueError):
                remedy = "use a deployment of the flow spin (`prefect deploy --all`)"
                raise BadInput(f"deployment {deployment!r}", "does not exist", remedy) from None
            own = client.read_flow_run(UUID(str(flow_run.id))).work_pool_name
        if own is not None and own == found.work_pool_name:
            problem = f"needs the work pool {own!r}, in which this comparison holds a slot while it waits"
            remedy = "use another pool for the comparison (`control` in prefect.yaml)"
            raise BadInput(f"deployment {deployment!r}", problem, remedy)
        self._id = found.id

    def start(self, member: Member, attempt: int) -> FlowRun:
        """Start a flow run that advances a member."""
        # The key lets a request whose answer was lost find its flow run again; a retry of the comparison makes another.
        key = f"{flow_run.id}:{flow_run.run_count}:{member.run}:{attempt}"
        started: FlowRun = run_deployment(  # type: ignore[assignment]
            self._deployment, parameters=member.parameters, timeout=0, tags=["spinreg"], idempotency_key=key
        )
        return started

    def ended(self, ids: Sequence[UUID]) -> dict[UUID, str | None]:
        """Return those of the flow runs that have ended, each with its failure, or with None if it completed."""
        found: list[FlowRun] = []
        with get_client(sync_client=True) as client:
            for start in range(0, len(ids), 100):  # the server returns 200 at most
                some = filters.FlowRunFilterId(any_=list(ids[start : start + 100]))
                found += client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(id=some))
        known = {one.id for one in found}
        ended: dict[UUID, str | None] = {one: "its flow run was deleted" for one in ids if one not in known}
        for one in found:
            if one.state is not None and one.state.is_final():
                bad = not one.state.is_completed()
                ended[one.id] = f"{one.state.name}: {one.state.message or 'no message'}" if bad else None
        return ended

    def under_way(self) -> dict[str, FlowRun]:
        """Return the flow runs that advance a run of the store, or are about to, by the run's name."""
        found: dict[str, FlowRun] = {}
        with get_client(sync_client=True) as client:
            for page in range(1000):
                some = client.read_flow_runs(
                    deployment_filter=filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[self._id])),
                    flow_run_filter=filters.FlowRunFilter(
                        state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=_UNFINISHED))
                    ),
                    sort=FlowRunSort.START_TIME_ASC, limit=200, offset=200 * page,
                )  # fmt: skip
                for one in some:
                    later = one.expected_start_time is not None and one.expected_start_time > now("UTC")
                    # A schedule's flow run of tonight is not under way; one that waits for its retry is.
                    if later and one.state is not None and one.state.name == "Scheduled":
                        continue
                    if _is_of(self._store, one.parameters.get("store")):
                        found.setdefault(str(one.parameters.get("run")), one)
                if len(some) < 200:
                    break
        return found


def run_on_pool(
    store: Store,
    members: Sequence[Member],
    flow_runs: FlowRuns,
    progress: Progress,
    check: Callable[[], None],
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, str]:
    """Advance the members by flow runs of a deployment, as many at a time as its work pool takes.

    A member that shares its next objects with a running one starts when these are made. The flow runs of a killed
    comparison go on, and its next start waits for them. check: raises when the comparison must end.

    Returns the reasons of failed members by run.
    """
    waiting, running = list(members), dict[str, tuple[Member, UUID]]()
    attempts: dict[str, int] = {}
    own: set[UUID] = set()
    failures: dict[str, str] = {}
    reported_away = False
    while waiting or running:
        check()
        try:
            ended = flow_runs.ended([of for _, of in running.values()])
            under_way = flow_runs.under_way()
            for member, of in [one for one in running.values() if one[1] in ended]:
                del running[member.run]
                # A completed flow run of ours has measured all that its machine knows of: count its rounds only.
                left = (rounds_open if of in own and ended[of] is None else open_reason)(store, member)
                if ended[of] is None and left is None:
                    progress.say(member, "complete")
                elif member.run in under_way or member.run not in attempts:
                    # Another flow run advances the member now, or one that was not ours stopped before its target.
                    waiting.insert(0, member)
                else:
                    failures[member.run] = "; ".join(filter(None, [ended[of] or "its flow run ended", left]))
                    progress.say(member, f"failed: {failures[member.run]}")
            # Before any start, so that no second flow run advances the same member.
            for member in [one for one in waiting if one.run in under_way]:
                _require_same(under_way[member.run], member)
                progress.say(member, "runs, in an existing flow run")
                running[member.run] = (member, under_way[member.run].id)
                waiting.remove(member)
            heads = {run: _head(store, run) for run in running}
            for member in list(waiting):
                others = [(one, heads.get(one.run)) for one, _ in running.values()]
                if member.run not in attempts and open_reason(store, member) is None:
                    progress.say(member, "was complete")
                elif (other := waits_for(member, store, others)) is not None:
                    progress.say(member, f"waits for objects of {other.run}")
                    continue
                else:
                    started = flow_runs.start(member, attempts.get(member.run, 0) + 1)
                    attempts[member.run] = attempts.get(member.run, 0) + 1
                    progress.say(member, f"submitted as flow run {started.name}")
                    running[member.run] = (member, started.id)
                    own.add(started.id)
                waiting.remove(member)
            progress.show()
            reported_away = False
        except StoreRefused:  # waiting does not help
            raise
        except (httpx.TransportError, PrefectHTTPStatusError, StoreFailed) as error:
            # Members survive a while without the server or the store, and so does the comparison.
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500:
                raise SpinregError(f"the Prefect server refuses a request of the comparison: {error}") from error
            if not reported_away:
                run_log()(f"the Prefect server or the store is away ({error!r}); retrying every {POLL_SECONDS:g} s")
            reported_away = True
        if waiting or running:
            sleep(POLL_SECONDS)
    return failures


def _head(store: Store, run: str) -> Head | None:
    try:
        return read_head(store, run)
    except Damaged:  # `open_reason` reports it when the member's flow run ends
        return None


def _require_same(one: FlowRun, member: Member) -> None:
    """Raise BadInput for a queued flow run with other parameters than the member's.

    An earlier comparison of this name may have left it. A flow run that has started is judged by its result instead.
    """
    given = {name: one.parameters.get(name) for name in member.parameters}
    if one.state is not None and one.state.is_scheduled() and given != member.parameters:
        where = f"flow run {one.name} ({one.id})"
        problem = f"is about to advance {member.run} with other parameters"
        raise BadInput(where, problem, "give the comparison another name, or cancel that flow run")


def _is_of(store: Store, given: Any) -> bool:
    try:
        return given is None or open_store(str(given)).url == store.url
    except BadInput:
        return False
