"""Run a stage in a child process of the current one, and raise its error here.

Leaves out: how a process reports an error (`runtime.failures`), stages of a flow (`tasks.stage_process`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from spinreg_core.errors import (
    EXIT_BAD_INPUT,
    EXIT_DAMAGED,
    EXIT_PREEMPTED,
    BadInput,
    Damaged,
    SpinregError,
    StageFailed,
    StagePreempted,
)
from spinreg_core.runs.job import Job


def raise_verdict(status: int | None, last: str) -> None:
    """Raise the error in a process's last line, where its exit status tells that a retry cannot help."""
    if status == EXIT_BAD_INPUT:
        raise BadInput.from_message(last.removeprefix("bad input: "))
    if status == EXIT_DAMAGED:
        raise Damaged(last.removeprefix("damaged: "))


def run_in_process(job: Job, module: str, check: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Run a job in a child process that shows its output here. Returns its result.json ({} without one).

    check: called every second; if it raises a SpinregError, the child is killed and the error is raised here.

    Raises as the child's exit status says: BadInput, Damaged, StagePreempted, StageFailed.
    """
    folder = job.workdir / job.stage
    folder.mkdir(parents=True, exist_ok=True)
    replace(job, workdir=folder).save(folder / "job.json")
    command = [sys.executable, "-m", module, str(folder / "job.json")]
    last = ""
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
                last = line.strip() or last
        except BaseException:
            # SIGTERM, say. The child needs no warning: its committed parts stay.
            child.kill()
            raise
        finally:
            ended.set()
    if stopped:
        raise stopped[0]
    raise_verdict(child.returncode, last)
    if child.returncode in (EXIT_PREEMPTED, -15):
        raise StagePreempted(f"the {job.stage} process was stopped from outside")
    if child.returncode:
        raise StageFailed(f"the {job.stage} process ended with status {child.returncode}: {last}")
    result = folder / "result.json"
    return dict(json.loads(result.read_text())) if result.exists() else {}
