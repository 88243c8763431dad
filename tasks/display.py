"""What a run shows in Prefect: log lines, progress, tables, markdown. Best effort, never in the way of the work.

Decides: that everything shown is sent by one background thread, the newest state of a thing only, and again
when the server could not be reached; how long the end of a run waits for that.
Leaves out: what is shown (the tasks and flows), and Prefect's own record of states.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, cast
from uuid import UUID

import httpx

from spinreg_core.progress import ProgressLine

_RETRY_SECONDS = 2.0
_lock = threading.Condition()
_waiting: dict[Hashable, Callable[[], object]] = {}
_sending = False
_thread: threading.Thread | None = None
_log = logging.getLogger("spinreg")


def run_log() -> Callable[[str], None]:
    """Where a line about the current run goes: its Prefect log, or standard logging outside a run."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        return get_run_logger().info
    except MissingContextError:
        return _log.info


class StageProgress:
    """The progress artifact of one stage, made by the first line and updated by the later ones.

    Pass an instance as `on_progress` of `run_stage`. `key`: lower case letters, digits, dashes.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None

    def __call__(self, line: ProgressLine) -> None:
        _post(self, partial(self._send, line))

    def _send(self, line: ProgressLine) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = 100.0 * line.done / max(line.total, 1)
        minutes, seconds = divmod(line.eta_seconds, 60)
        text = f"{line.stage}: {line.done}/{line.total} {line.unit}, {line.rate:.2f}/s, {minutes}:{seconds:02d} left"
        if self._artifact is None:
            self._artifact = cast(UUID, create_progress_artifact(percent, key=self._key, description=text))
        else:
            update_progress_artifact(self._artifact, percent, text)


def show_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    """Show `rows` as a table artifact of the current run."""
    from prefect.artifacts import create_table_artifact

    _post(object(), partial(create_table_artifact, rows, key=key, description=description))


def show_markdown(key: str, markdown: str, description: str) -> None:
    """Show `markdown` as an artifact of the current run."""
    from prefect.artifacts import create_markdown_artifact

    _post(object(), partial(create_markdown_artifact, markdown, key=key, description=description))


def flush(timeout_seconds: float = 10.0) -> bool:
    """Wait until everything posted is sent, at most `timeout_seconds`. Returns whether it is."""
    with _lock:
        return _lock.wait_for(lambda: not _waiting and not _sending, timeout_seconds)


def _post(thing: Hashable, send: Callable[[], object]) -> None:
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
    while True:
        with _lock:
            _lock.wait_for(lambda: _waiting)
            thing = next(iter(_waiting))
            send = _waiting.pop(thing)
            _sending = True
        away = False
        try:
            send()
        except httpx.TransportError:
            away = True
        except Exception as error:
            _log.debug("not shown: %s", error)
        with _lock:
            if away:
                _waiting.setdefault(thing, send)  # a newer state may have come in meanwhile
            _sending = False
            _lock.notify_all()
        if away:
            time.sleep(_RETRY_SECONDS)
