"""Prefect's server: requests to it, its absence, and the queue of everything shown to people.

Decides: that one background thread sends all artifacts, only the newest state of each, and again after an absence; that
stages go on without the server; how long a step waits for it. Measured with Prefect 3.7.7: a task called directly needs
no server, not even for retries, unless it has tags. The start and end of a flow do need it: Prefect tries for about a
minute to report them, and then ends the run.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast
from uuid import UUID

import httpx

from spinreg_core.errors import BadInput, redacted
from tasks.log import log_line, run_log

if TYPE_CHECKING:
    from prefect import Flow, Task
    from prefect.client.orchestration import SyncPrefectClient


P = ParamSpec("P")
R = TypeVar("R")
# Longest delay of the step to the next round by one absence of the server, over all waits: the time of a restart.
PATIENCE_SECONDS = 10.0
START_PATIENCE_SECONDS = 15.0  # the same for a command that starts
# All work is committed when a flow ends, so a long outage of the server must not make it a failed run.
END_PATIENCE_SECONDS = 3600.0
# Silence after which the server counts as away: at its health check, when a command starts, and for the requests of
# Prefect between stages. Prefect's own patience, a minute and three tries, would stop training for a server that hangs.
_ANSWER_SECONDS = 3.0
_START_ANSWER_SECONDS = 5.0
_REQUEST_SECONDS = 8.0
_POLL_SECONDS = 2.0
_TRIES = 5  # of one request that a reachable server answers with 5xx
_away_since: float | None = None  # time.monotonic(); None if the server answered the last request
_lock = threading.Condition()
_waiting: dict[Hashable, Callable[[], object]] = {}
_sending = False
_thread: threading.Thread | None = None


def wait_for_server(patience_seconds: float = PATIENCE_SECONDS) -> bool:
    """Wait until the Prefect server answers. Returns whether it does.

    Gives up `patience_seconds` after the first call that found the server away, so that later calls during the same
    absence return at once. An embedded server that ended does not come back, so its patience is short.
    """
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        patience_seconds = min(patience_seconds, PATIENCE_SECONDS)
    server_answers()
    while (since := _away_since) is not None:
        if time.monotonic() - since >= patience_seconds:
            return False
        time.sleep(0.2)
    return True


def call_task(task: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `task` or, while the server is away, the same task without tags.

    For tags, Prefect asks the server for concurrency slots before the task begins, and fails if it is away.
    """
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

    if server_answers():
        try:
            with _impatient():
                return cast(R, task(*args, **kwargs))
        except ConcurrencySlotAcquisitionError:  # the server went away in between; the task has not begun
            _found_away()
    run_log()(f"the Prefect server is away; {task.name} goes on without its tags")
    untagged = task.with_options()
    untagged.tags = set()
    return cast(R, untagged(*args, **kwargs))


def call_subflow(flow: Flow[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `flow` as a nested flow run or, while the server is away, its plain function.

    If the server goes away in the middle, the function is called a second time, so it must find its finished work in
    the store. The flow run that could not end is closed when the server is back.
    """
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.runtime import flow_run

    unreported = False
    if wait_for_server():
        try:
            with _impatient():
                return cast(R, flow(*args, **kwargs))
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            if (stop := stopped_by(error)) is not None:
                raise stop from None
            run_log()(f"{flow.name} could not be reported to the Prefect server: {error!r}")
            if isinstance(error, httpx.TransportError):
                _found_away()
            unreported = True
    run_log()(f"{flow.name} goes on without a flow run of its own; its tasks show in this one")
    result = flow.fn(*args, **kwargs)
    if unreported:  # only now, because an error of the work may have looked like one of the server
        given = dict(signature(flow.fn).bind(*args, **kwargs).arguments)
        post(object(), partial(_close_nested, UUID(str(flow_run.id)), given))
    return result


def stopped_by(error: BaseException) -> BaseException | None:
    """Return the signal that ended a run, if `error` hides one, else None.

    A SIGTERM or Ctrl-C to the whole process group reaches the embedded server too. Prefect then cannot report the end
    of the run, and raises an error about that with the signal as its cause.
    """
    from prefect.exceptions import TerminationSignal

    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, TerminationSignal | KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen


def _close_nested(parent: UUID, parameters: Mapping[str, object]) -> None:
    """Mark the nested flow runs with these parameters as completed, because their work is done.

    A server that hung may have recorded them as failed, although only the report to it failed.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import Completed

    client = get_client(sync_client=True)
    open_runs = filters.FlowRunFilter(
        parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=[parent]),
        state=filters.FlowRunFilterState(
            type=filters.FlowRunFilterStateType(
                any_=[StateType.PENDING, StateType.RUNNING, StateType.FAILED, StateType.CRASHED]
            )
        ),
    )
    for run in client.read_flow_runs(flow_run_filter=open_runs):
        if run.parameters != parameters:
            continue
        state: State[Any] = Completed(message="The server was away when this ended; the parent flow run went on.")
        client.set_flow_run_state(run.id, state, force=True)


@contextmanager
def _impatient() -> Iterator[None]:
    """Give up Prefect's requests to the server after seconds inside the block."""
    from prefect.context import SyncClientContext
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    settings = {PREFECT_API_REQUEST_TIMEOUT: _REQUEST_SECONDS, PREFECT_CLIENT_MAX_RETRIES: 1}
    # A client of its own: that of the parent flow run keeps the patience it was made with.
    with temporary_settings(settings), SyncClientContext({"timeout": _REQUEST_SECONDS}):
        yield


def server_answers() -> bool:
    """Return whether the server answers. During an absence a thread keeps asking, and this returns at once."""
    if _away_since is None and not _asked():
        _found_away()
    return _away_since is None


def _found_away() -> None:
    global _away_since
    with _lock:
        if _away_since is not None:
            return
        _away_since = time.monotonic()
    run_log()("the Prefect server does not answer")
    context = contextvars.copy_context()  # holds the settings, and so the address of the server
    threading.Thread(target=context.run, args=(_ask_until_back,), name="away", daemon=True).start()


def _ask_until_back() -> None:
    global _away_since
    while not _asked():
        time.sleep(_POLL_SECONDS)
    _away_since = None


def _asked() -> bool:
    with asking_once(_ANSWER_SECONDS) as client:
        return client.api_healthcheck() is None


def flush(timeout_seconds: float = 10.0) -> bool:
    """Wait until everything posted is sent, but not for a server that is away. Returns whether it is sent."""
    with _lock:
        _lock.wait_for(lambda: _away_since is not None or not (_waiting or _sending), timeout_seconds)
        return not (_waiting or _sending)


def post(thing: Hashable, send: Callable[[], object]) -> None:
    """Call `send` in the background, in the caller's context; it replaces an unsent older state of `thing`."""
    global _thread
    with _lock:
        _waiting[thing] = partial(contextvars.copy_context().run, send)
        if _thread is None:
            _thread = threading.Thread(target=_send_all, name="display", daemon=True)
            _thread.start()
        _lock.notify_all()


def _send_all() -> None:
    global _sending
    tries: dict[Hashable, int] = {}
    while True:
        with _lock:
            _lock.wait_for(lambda: _waiting)
            thing = next(iter(_waiting))
            send = _waiting.pop(thing)
            _sending = True
        away = False
        try:
            send()
        except Exception as error:
            # A proxy answers with 5xx for a server that is away. A server that is there may fail on one request for
            # good, so such a request is tried a few times only.
            response = getattr(error, "response", None)
            away = isinstance(error, httpx.TransportError) or (response is not None and response.status_code >= 500)
            if away and response is not None and server_answers():
                tries[thing] = tries.get(thing, 0) + 1
                away = tries[thing] < _TRIES
            if not away:
                log_line.warning("not shown: %s", error)
        if not away:
            tries.pop(thing, None)
        with _lock:
            if away:
                _waiting.setdefault(thing, send)  # unless a newer state was posted in between
            _sending = False
            _lock.notify_all()
        if away:
            time.sleep(_POLL_SECONDS)


@contextmanager
def asking_once(seconds: float) -> Iterator[SyncPrefectClient]:
    """Yield a client that waits this long for each answer, and never retries."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": seconds}) as client,
    ):
        yield client


def require_server() -> None:
    """Raise BadInput if PREFECT_API_URL (or Prefect's active profile) names a server that does not answer.

    Without an address Prefect starts a server of its own.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    end = time.monotonic() + START_PATIENCE_SECONDS
    if not url:
        return
    while True:
        try:
            with asking_once(_START_ANSWER_SECONDS) as client:
                if isinstance(client.api_version(), str):
                    return
                why = "it is not a Prefect server"
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
        except httpx.HTTPStatusError as error:
            why = f"it answers HTTP {error.response.status_code}"
        except (ValueError, httpx.HTTPError):  # an answer that is not JSON, a circle of redirects
            why = "it is not a Prefect server"
        except (httpx.InvalidURL, RuntimeError):  # their texts may repeat a password
            why = "it is not the address of a server"
        except OSError as error:
            why = f"PREFECT_API_SSL_CERT_FILE and the like: {error.strerror}"
        raise BadInput("PREFECT_API_URL", f"cannot be used: {redacted(url)} ({why})",
                       "set it to the API of a running Prefect server (it ends in /api; the server may need "
                       "PREFECT_API_AUTH_STRING), or unset it: spinreg run then starts its own server")  # fmt: skip
