"""Is Prefect's server there? Asked before anything else, where its address was given."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Hashable, Iterator
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
# How long one absence of the server may hold up the step to the next round, all waits together: a restart.
PATIENCE_SECONDS = 10.0
# Silence after which the server counts as away when it is asked whether it is there, and in what Prefect itself asks it
# between stages: its own minute of patience, three times over, would stop a training run for a server that hangs.
_ANSWER_SECONDS = 3.0
_REQUEST_SECONDS = 8.0
_POLL_SECONDS = 2.0
_TRIES = 5  # of one thing that the server answers with 5xx although it is there
_away_since: float | None = None  # time.monotonic(); None: it answered when it was last asked
_lock = threading.Condition()
_waiting: dict[Hashable, Callable[[], object]] = {}
_sending = False
_thread: threading.Thread | None = None


def wait_for_server(patience_seconds: float = PATIENCE_SECONDS) -> bool:
    """Wait until the Prefect server answers. Returns whether it does.

    Gives up when the server has been away for `patience_seconds` since the first call that found it so:
    one absence is waited for once, not again at every call. Nobody starts an embedded server again.
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

    Tags make Prefect ask the server for concurrency slots before the task begins, and fail where it is away.
    """
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

    if server_answers():
        try:
            with _impatient():
                return cast(R, task(*args, **kwargs))
        except ConcurrencySlotAcquisitionError:  # it went away in between; the task has not begun
            _found_away()
    run_log()(f"the Prefect server is away; {task.name} goes on without its tags")
    untagged = task.with_options()
    untagged.tags = set()
    return cast(R, untagged(*args, **kwargs))


def call_subflow(flow: Flow[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `flow` as a nested flow run or, while the server is away, its plain function.

    The function must be one that can be called again: where the server went away in the middle, it is, and
    finds its finished stages in the store. The flow run that could not end is closed when the server is back.
    """
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.runtime import flow_run

    untold = False
    if wait_for_server():
        try:
            with _impatient():
                return cast(R, flow(*args, **kwargs))
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            if (stop := stopped_by(error)) is not None:
                raise stop from None
            run_log()(f"the Prefect server could not be told about {flow.name}: {error!r}")
            if isinstance(error, httpx.TransportError):
                _found_away()
            untold = True
    run_log()(f"going on without a flow run of its own for {flow.name}; its tasks show in this one")
    result = flow.fn(*args, **kwargs)
    if untold:  # and not before: what failed may have been the work itself
        given = dict(signature(flow.fn).bind(*args, **kwargs).arguments)
        post(object(), partial(_close_nested, UUID(str(flow_run.id)), given))
    return result


def stopped_by(error: BaseException) -> BaseException | None:
    """The signal that ended a run, where what came out is that Prefect could not tell its server about it: a SIGTERM or
    Ctrl-C to the whole process group reaches the embedded server too."""
    from prefect.exceptions import TerminationSignal

    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, TerminationSignal | KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen


def _close_nested(parent: UUID, parameters: dict[str, Any]) -> None:
    """Mark the nested flow runs with these parameters completed: their work was taken over, and is done.

    A server that hung may have learnt, late, that they failed: what failed was telling it.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import Completed

    client = get_client(sync_client=True)
    unended = filters.FlowRunFilter(
        parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=[parent]),
        state=filters.FlowRunFilterState(
            type=filters.FlowRunFilterStateType(
                any_=[StateType.PENDING, StateType.RUNNING, StateType.FAILED, StateType.CRASHED]
            )
        ),
    )
    for run in client.read_flow_runs(flow_run_filter=unended):
        if run.parameters != parameters:
            continue
        state: State[Any] = Completed(message="The server was away when this ended; the flow run around it went on.")
        client.set_flow_run_state(run.id, state, force=True)


@contextmanager
def _impatient() -> Iterator[None]:
    """What Prefect asks the server within is given up after seconds."""
    from prefect.context import SyncClientContext
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    settings = {PREFECT_API_REQUEST_TIMEOUT: _REQUEST_SECONDS, PREFECT_CLIENT_MAX_RETRIES: 1}
    # The client of the flow run around this keeps the patience it was made with.
    with temporary_settings(settings), SyncClientContext({"timeout": _REQUEST_SECONDS}):
        yield


def server_answers() -> bool:
    """Whether the server is there. Once it is not, a thread asks on, and nobody else waits for an answer."""
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
    context = contextvars.copy_context()  # holds which server it is
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
    """Wait until everything posted is sent, at most `timeout_seconds`, and not for a server that is away. Returns
    whether it is."""
    with _lock:
        _lock.wait_for(lambda: _away_since is not None or not (_waiting or _sending), timeout_seconds)
        return not (_waiting or _sending)


def post(thing: Hashable, send: Callable[[], object]) -> None:
    """Have `send` called in the background, in the caller's context; replaces an unsent older state of `thing`."""
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
            response = getattr(error, "response", None)  # of a proxy that finds no server behind it
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
                _waiting.setdefault(thing, send)  # a newer state may have come in meanwhile
            _sending = False
            _lock.notify_all()
        if away:
            time.sleep(_POLL_SECONDS)


_SECONDS = 15.0  # in which a server that is being restarted may come back
_ANSWER_SECONDS = 5.0


@contextlib.contextmanager
def asking_once(seconds: float) -> Iterator[SyncPrefectClient]:
    """A client that waits so long for each answer and asks for none a second time."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": seconds}) as client,
    ):
        yield client


def require_server() -> None:
    """Raise BadInput where PREFECT_API_URL (or Prefect's profile in use) names no server that answers.

    Without an address Prefect starts a server of its own.
    """
    import httpx
    from prefect.settings import PREFECT_API_URL

    url, end = PREFECT_API_URL.value(), time.monotonic() + _SECONDS
    if not url:
        return
    while True:
        try:
            with asking_once(_ANSWER_SECONDS) as client:
                if isinstance(client.api_version(), str):
                    return
                why = "it answers what Prefect does not"
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
        except httpx.HTTPStatusError as error:
            why = f"it answers HTTP {error.response.status_code}"
        except (ValueError, httpx.HTTPError):  # no JSON, a circle of redirects
            why = "it answers what Prefect does not"
        except (httpx.InvalidURL, RuntimeError):  # whose texts may repeat a password
            why = "it is no address of a server"
        except OSError as error:
            why = f"PREFECT_API_SSL_CERT_FILE and the like: {error.strerror}"
        raise BadInput("PREFECT_API_URL", f"{redacted(url)}, which cannot be used ({why})",
                       "the API of a running Prefect server (it ends in /api; PREFECT_API_AUTH_STRING where the server "
                       "asks for one), or none: spinreg run then starts a server of its own")  # fmt: skip
