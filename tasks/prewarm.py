"""The process of the next stage, started while this one works: importing torch and transformers takes seconds.

Decides: that there is one spare at most, that it belongs to the thread that started it and ends with it, and that a
stage never waits for or fails by it: where there is none alive, the stage's process is started afresh.
Leaves out: running a stage (`tasks/process.py`), what a spare does (`spinreg_core.runtime.prewarmed`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tasks.stage_process import start_process

_spare: subprocess.Popen[bytes] | None = None


def prepare_spare() -> None:
    """Start a spare unless there is one, or the machine will not have another process."""
    global _spare
    if _spare is None or _spare.poll() is not None:
        discard_spare()
        with contextlib.suppress(OSError):
            _spare = start_process([sys.executable, "-m", "spinreg_core.runtime.prewarmed"], stdin=subprocess.PIPE)


def take_spare(module: str, job_file: Path) -> subprocess.Popen[bytes] | None:
    """The spare, told to be the stage `python -m MODULE JOB_FILE`; None where there is none alive."""
    global _spare
    process, _spare = _spare, None
    if process is None or process.poll() is not None:
        return None
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps([module, str(job_file)]).encode() + b"\n")
        process.stdin.close()
    except BrokenPipeError:
        _end(process)
        return None
    return process


def discard_spare() -> None:
    """End the spare, if there is one, at once."""
    global _spare
    process, _spare = _spare, None
    if process is not None:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
