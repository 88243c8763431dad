"""One engine as a process, at the end of a socket: here for the engines of this machine and of others alike.

Decides: how an engine's process is started (`python -m spinreg_core.generation.worker`), that it hears and speaks
through one socket, and that this socket says at last how the process ended.
Leaves out: what an engine does (`worker.py`), who gives it work (`pool.py`), where sockets to other machines
come from (`remote_workers.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, replace

from spinreg_core.runs.job import Job
from spinreg_core.runtime.child import show_output

COMMAND = [sys.executable, "-u", "-m", "spinreg_core.generation.worker"]


@dataclass(frozen=True)
class EngineProcess:
    process: subprocess.Popen[str]
    keeper: threading.Thread  # ends when the socket has been told of the process's end

    def wait(self) -> int:
        """The exit status."""
        self.keeper.join()
        return self.process.wait()


def start_engine(job: Job, environment: dict[str, str], line: socket.socket) -> EngineProcess:
    """An engine that reads waves from `line` and speaks to it (`worker.py`). When it has ended, the socket says
    `ended STATUS [its last lines as JSON];` and is closed: it belongs to the engine from here on.

    job: as `worker.py` has it. environment: what the engine's adds to ours: its GPUs, or its share of the cores.
    """
    try:
        folder = job.workdir / job.writer
        folder.mkdir(parents=True, exist_ok=True)
        replace(job, workdir=folder).save(folder / "answer.json")
        line.settimeout(None)  # the engine shares the file, which must block
        speak = line.fileno()
        process = subprocess.Popen(
            [*COMMAND, str(folder / "answer.json")], stdin=speak, stdout=subprocess.PIPE, text=True, errors="replace",
            env=os.environ | environment | {"SPINREG_SAY": str(speak)}, pass_fds=[speak],
        )  # fmt: skip
    except OSError as error:  # a full disk, say
        _tell_end(line, 1, [f"error: its process could not be started: {error}"])
        raise
    keeper = threading.Thread(target=_keep, args=(process, line), daemon=True)
    keeper.start()
    return EngineProcess(process, keeper)


def _keep(process: subprocess.Popen[str], line: socket.socket) -> None:
    """Show what an engine prints, and report its end."""
    _tell_end(line, *show_output(process))


def _tell_end(line: socket.socket, status: int, last: list[str]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        line.sendall(f"\nended {status} {json.dumps(last)};\n".encode())
        line.shutdown(socket.SHUT_RDWR)
    line.close()
