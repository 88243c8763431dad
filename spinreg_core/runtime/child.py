"""Run a stage in a child process of the current one, and raise its error here.

Leaves out: how a process reports an error (`runtime.failures`), stages of a flow (`tasks.stage_process`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from spinreg_core.runs.job import Job
from spinreg_core.runtime.failures import MESSAGE_LINES, process_error

_LAST_WORDS_SECONDS = 5.0


def show_output(process: subprocess.Popen[str], check: Callable[[], object] = lambda: None) -> tuple[int, list[str]]:
    """Show a process's output here until the process ends. Returns its exit status and the last lines of its output.

    Calls `check` every second, and raises what it raises.
    """
    last: deque[str] = deque(maxlen=MESSAGE_LINES)

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                last.append(line.rstrip())

    shown = threading.Thread(target=show, daemon=True)
    shown.start()
    # The end of the output would be too late, because a child of the process may keep its pipe open.
    while (status := _status_after(1.0, process)) is None:
        check()
    shown.join(timeout=_LAST_WORDS_SECONDS)
    return status, list(last)


def _status_after(seconds: float, process: subprocess.Popen[str]) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def run_in_process(job: Job, module: str, check: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Run a job in a child process that shows its output here. Returns its result.json ({} without one).

    check: called every second; what it raises ends the child and is raised here.

    Raises the error that the child's exit status stands for (`failures.process_error`).
    """
    folder = job.workdir / job.stage
    folder.mkdir(parents=True, exist_ok=True)
    replace(job, workdir=folder).save(folder / "job.json")
    command = [sys.executable, "-m", module, str(folder / "job.json")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")
    try:
        status, output = show_output(child, check)
    finally:
        # After SIGTERM, say. The child needs no warning: its committed parts stay.
        child.kill()
        child.wait()
    if status:
        raise process_error(job.stage, status, output)
    result = folder / "result.json"
    return dict(json.loads(result.read_text())) if result.exists() else {}
