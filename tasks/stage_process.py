"""Runs one stage as a process of its own, and turns its end into a result or an error.

Decides: how a stage is started, watched and ended, and that a slow display never delays it.
Leaves out: the meaning of an exit status (`runtime.failures`), the stages (`spinreg_core.stages`), the display
(`tasks.artifacts`), retries (`tasks.run_stage`), reading the manifest (the caller, from the store).
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from spinreg_core.errors import StageFailed, without_credentials
from spinreg_core.runs.job import Job
from spinreg_core.runtime.failures import MESSAGE_LINES, process_error
from spinreg_core.runtime.progress import ProgressLine, parse
from spinreg_core.runtime.supervision import STARTER_VARIABLE
from tasks.log import run_log

PROGRESS_EVERY_SECONDS = 5.0
_GONE_SECONDS = 3.0
_LINE_BYTES = 65536
# Lines that a slow display may lag behind before it misses some.
_WAITING_LINES = 1000


def run_stage(
    job: Job,
    *,
    deadline_seconds: float | None = None,
    on_line: Callable[[str], None] | None = None,
    on_progress: Callable[[ProgressLine], None] | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run `python -m spinreg_core.stages.<name> JOB.json` to its end.

    Writes `job.json` and `log.txt` (everything the stage printed) into `job.workdir`. See `run_process`
    for the callbacks. Returns `result.json` of the workdir if the stage left one, else {}.

    Raises: as `run_process`.
    """
    job.workdir.mkdir(parents=True, exist_ok=True)
    job_file = job.workdir / "job.json"
    job.save(job_file)
    log = on_line or run_log()  # an interrupt here must not leave a process behind
    run_process(
        start_process([sys.executable, "-m", job.module, str(job_file)]),
        job.workdir / "log.txt",
        name=job.stage,
        deadline_seconds=deadline_seconds,
        on_line=log,
        on_progress=on_progress,
        check=check,
        grace_seconds=job.config.resources.stop_seconds,
    )
    result = job.workdir / "result.json"
    return json.loads(result.read_text()) if result.exists() else {}


def start_process(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start `command` as the leader of a session of its own, its output in one pipe."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", STARTER_VARIABLE: str(os.getpid())} | dict(environment or {}),
    )


def run_process(
    process: subprocess.Popen[bytes],
    log_file: Path,
    *,
    name: str,
    on_line: Callable[[str], None],
    deadline_seconds: float | None = None,
    on_progress: Callable[[ProgressLine], None] | None = None,
    check: Callable[[], None] | None = None,
    grace_seconds: float = 20.0,
) -> None:
    """Run a process of `start_process` to its end, and leave no process of its group alive in any case.

    Call it from a thread that lives until it returns: the process ends with that thread.

    Args:
        on_line: gets the output line by line, in a thread of its own. Its errors are ignored, and it misses lines when
            it is too slow, so that the process never waits for it.
        on_progress: gets the parsed progress lines in the same way. Both see progress at most every 5 s.
        check: called about twice a second by the waiting thread. An error of it (a lost lease, say) ends the process.
        grace_seconds: time between SIGTERM and SIGKILL.

    Raises:
        BadInput, Damaged, JudgeAway: exit status 65, 74 and 69, with the process's own message.
        StagePreempted: exit status 143, or SIGTERM.
        StageFailed: any other exit status, or the deadline.
        TerminationSignal, KeyboardInterrupt, an error of `check`: after ending the group.
    """
    started = time.monotonic()
    tail: deque[str] = deque(maxlen=MESSAGE_LINES)
    shown: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
    reader = threading.Thread(target=_drain, args=(process, log_file, tail, shown), name=f"{name}-output", daemon=True)
    # Prefect finds the current run in context variables, which a new thread does not inherit.
    show = partial(contextvars.copy_context().run, _show, shown, on_line, on_progress)
    viewer = threading.Thread(target=show, name=f"{name}-display", daemon=True)
    try:
        reader.start()
        viewer.start()
        while True:
            try:
                # Prefect cancels a thread by setting an exception on it, which arrives only between two waits.
                status = process.wait(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if check is not None:
                    check()
                if deadline_seconds is not None and time.monotonic() - started > deadline_seconds:
                    raise StageFailed(
                        f"{name}: still running after {deadline_seconds / 60:.4g} minutes "
                        "(resources.deadline_minutes); ended"
                    ) from None
    finally:
        # Also after a good end, because a child of an engine may survive it and hold GPU memory.
        _end_group(process, grace_seconds)
        reader.join(timeout=5)
        viewer.join(timeout=2)
    if status != 0:
        raise process_error(name, status, list(tail), log_file)


def _end_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    try:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM)
            process.wait(timeout=grace_seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Also when a second signal interrupts the wait.
        _signal_group(process, signal.SIGKILL)
        process.wait()
        # SIGKILL takes effect on the rest of the group a moment later, and a GPU is free only then. The wait is
        # bounded, because zombies count as members: in a container the first process may not reap them.
        end = time.monotonic() + _GONE_SECONDS
        while _signal_group(process, 0) and time.monotonic() < end:
            time.sleep(0.01)


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> bool:
    """Send a signal to the process's group (0: none). Returns False where the group is empty."""
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        return False
    return True


def _drain(process: subprocess.Popen[bytes], log_file: Path, tail: deque[str], shown: queue.Queue[str | None]) -> None:
    """Read the output as fast as it comes: all of it into the file, its end into `tail`, and into `shown` what fits.

    A log file that cannot be written (a full disk) does not end the stage; `tail` says so once.
    """
    assert process.stdout is not None
    left_out = 0
    last_progress = -float("inf")
    written = True
    with log_file.open("ab", buffering=0) as log, process.stdout:
        while raw := process.stdout.readline(_LINE_BYTES):
            # Libraries quote addresses in their warnings.
            text = without_credentials(raw.decode("utf-8", "replace"))
            # A progress bar of a library redraws its line after \r; the last state counts.
            line = text.rstrip().rsplit("\r", 1)[-1]
            try:
                log.write(text.encode())
            except OSError as error:
                if written:
                    tail.append(f"{log_file} lacks lines from here on: {error.strerror or error}")
                    written = False
            if not line:
                continue
            tail.append(line)
            progress = parse(line)
            if progress is not None:
                now = time.monotonic()
                if now - last_progress < PROGRESS_EVERY_SECONDS and progress.done < progress.total:
                    continue
                last_progress = now
            try:
                if left_out:
                    shown.put_nowait(f"({left_out} lines left out here; all are in {log_file})")
                    left_out = 0
                shown.put_nowait(line)
            except queue.Full:
                left_out += 1
    # A stuck display is abandoned; its thread is a daemon.
    with contextlib.suppress(queue.Full):
        shown.put(None, timeout=1)


def _show(
    shown: queue.Queue[str | None],
    on_line: Callable[[str], None],
    on_progress: Callable[[ProgressLine], None] | None,
) -> None:
    while (line := shown.get()) is not None:
        # The display is best effort; the line is in the log file.
        with contextlib.suppress(Exception):
            on_line(line)
            progress = parse(line)
            if progress is not None and on_progress is not None:
                on_progress(progress)


def end_embedded_server_with_us() -> None:
    """Let Prefect's embedded server end with this process, where this process has started it."""
    from prefect.server.api.server import SubprocessASGIServer

    for server in SubprocessASGIServer._instances.values():
        if server.server_process is not None:
            _end_with_us(server.server_process.pid)


@cache
def _end_with_us(pid: int) -> None:
    # The shell's input ends with this process, also after SIGKILL: no other process holds the pipe's other end.
    watch = ["sh", "-c", f"cat > /dev/null; kill {pid} 2> /dev/null"]
    subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
