"""The process of one worker, which reads its work from a socket and reports to it, on this machine or another.

Decides: how the process is started (`python -m spinreg_core.generation.worker`), and that the socket's last line says
how it ended.
Leaves out: the work (`generation.worker`), its assignment (`generation.pool`), sockets to other machines
(`generation.remote_workers`).
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
    # Ends once the socket has the line about the process's end.
    keeper: threading.Thread

    def wait(self) -> int:
        """Return the exit status, after the socket has it."""
        self.keeper.join()
        return self.process.wait()


def start_engine(job: Job, environment: dict[str, str], line: socket.socket) -> EngineProcess:
    """Start an engine that reads waves from `line` and reports to it (`generation.worker`).

    The socket belongs to the engine from here on. At the engine's end it gets the line `ended STATUS [LINES];`, with
    the engine's last lines as JSON, and is closed.

    Args:
        job: the job of a worker.
        environment: extra variables of the process: its GPUs, or its share of the cores.
    """
    try:
        folder = job.workdir / job.writer
        folder.mkdir(parents=True, exist_ok=True)
        replace(job, workdir=folder).save(folder / "answer.json")
        # The process shares the socket's file, and its reads and writes must block.
        line.settimeout(None)
        speak = line.fileno()
        process = subprocess.Popen(
            [*COMMAND, str(folder / "answer.json")], stdin=speak, stdout=subprocess.PIPE, text=True, errors="replace",
            env=os.environ | environment | {"SPINREG_SAY": str(speak)}, pass_fds=[speak],
        )  # fmt: skip
    except OSError as error:
        # The disk may be full.
        _tell_end(line, 1, [f"error: its process could not be started: {error}"])
        raise
    keeper = threading.Thread(target=_keep, args=(process, line), daemon=True)
    keeper.start()
    return EngineProcess(process, keeper)


def _keep(process: subprocess.Popen[str], line: socket.socket) -> None:
    """Show what an engine prints, and report its end."""
    _tell_end(line, *show_output(process))


def _tell_end(line: socket.socket, status: int, last: list[str]) -> None:
    # The other end may be closed already.
    with contextlib.suppress(OSError):
        # The first line break ends a line that the engine left unfinished.
        line.sendall(f"\nended {status} {json.dumps(last)};\n".encode())
        line.shutdown(socket.SHUT_RDWR)
    line.close()
