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

from spinreg_core.errors import SpinregError
from spinreg_core.runs.job import Job
from spinreg_core.runtime.failures import MESSAGE_LINES, process_error


def run_in_process(job: Job, module: str, check: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Run a job in a child process that shows its output here. Returns its result.json ({} without one).

    check: called every second; if it raises a SpinregError, the child is killed and the error is raised here.

    Raises the error that the child's exit status stands for (`failures.process_error`).
    """
    folder = job.workdir / job.stage
    folder.mkdir(parents=True, exist_ok=True)
    replace(job, workdir=folder).save(folder / "job.json")
    command = [sys.executable, "-m", module, str(folder / "job.json")]
    tail: deque[str] = deque(maxlen=MESSAGE_LINES)
    stopped: list[SpinregError] = []
    ended = threading.Event()

    def watch() -> None:
        while not stopped and not ended.wait(1.0):
            try:
                check()
            except SpinregError as error:
                stopped.append(error)
                child.kill()

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as child:
        assert child.stdout is not None
        threading.Thread(target=watch, daemon=True).start()
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                if line.strip():
                    tail.append(line.rstrip())
        except BaseException:
            # SIGTERM, say. The child needs no warning: its committed parts stay.
            child.kill()
            raise
        finally:
            ended.set()
    if stopped:
        raise stopped[0]
    if child.returncode:
        raise process_error(job.stage, child.returncode, list(tail))
    result = folder / "result.json"
    return dict(json.loads(result.read_text())) if result.exists() else {}
