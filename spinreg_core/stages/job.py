"""What every stage process shares: its job file, its manners towards the parent, its exit status.

Decides: the job file's fields; that a stage never outlives its parent; which exit status means what.
Leaves out: what a stage does (one file each) and how it is started (`tasks/process.py`, or a person).
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from spinreg_core.config import RunConfig
from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, EXIT_PREEMPTED, BadInput, Damaged, SpinregError

STARTER_VARIABLE = "SPINREG_STARTER"  # process id of the task's process, an ancestor of every stage process


@dataclass(frozen=True)
class Job:
    """One stage's work order. `key` is what `object_id` fingerprints; `inputs` maps names to object ids."""

    stage: str
    object_id: str
    key: dict[str, Any]
    store: str
    writer: str
    round: int
    inputs: dict[str, Any]
    config: RunConfig
    workdir: Path
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        fields = asdict(self) | {"config": self.config.model_dump(mode="json"), "workdir": str(self.workdir)}
        path.write_text(json.dumps(fields, indent=1, sort_keys=True))

    @classmethod
    def load(cls, path: Path) -> Job:
        fields = json.loads(path.read_text())
        fields["config"] = RunConfig.model_validate(fields["config"])
        fields["workdir"] = Path(fields["workdir"])
        return cls(**fields)


class Preempted(SystemExit):
    """SIGTERM arrived: leave now, everything committed so far stays."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


def _on_sigterm(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise Preempted


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def die_with_parent() -> None:
    """End this process, and the process group it leads, soon after the parent is gone.

    PDEATHSIG asks at once, with SIGHUP: unlike SIGTERM, which may come from anyone, it says that nobody is
    left to end the group (getppid does not say so yet while the parent's last threads end). The watching
    thread is for what sits in a long C call, and for a starter that was gone before this line (importing
    torch takes seconds). Engines' own children are reached by neither, only by ending the group.
    """
    parent = os.getppid()
    starter = int(os.environ.get(STARTER_VARIABLE, parent))
    hung_up = threading.Event()

    def on_hangup(_signum: int, _frame: FrameType | None) -> NoReturn:
        hung_up.set()
        raise Preempted

    def orphaned() -> bool:
        return hung_up.is_set() or os.getppid() != parent or _gone(starter)

    def end_group() -> None:
        if orphaned() and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)

    def watch() -> None:
        while not orphaned():
            time.sleep(0.5)
        time.sleep(3.0)
        end_group()
        os._exit(EXIT_PREEMPTED)

    signal.signal(signal.SIGHUP, on_hangup)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG
    atexit.register(end_group)
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main(run: Callable[[Job], dict[str, Any]]) -> NoReturn:
    """Run one stage from the command line: `python -m spinreg_core.stages.<name> JOB.json`."""
    if len(sys.argv) != 2:
        print(f"usage: python -m {run.__module__} JOB.json", file=sys.stderr)
        raise SystemExit(2)
    faulthandler.enable()
    die_with_parent()
    signal.signal(signal.SIGTERM, _on_sigterm)
    job = Job.load(Path(sys.argv[1]))
    job.workdir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        manifest = run(job)
    except BadInput as error:
        print(f"bad input: {error}", flush=True)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except Damaged as error:
        print(f"damaged: {error}", flush=True)
        raise SystemExit(EXIT_DAMAGED) from None
    except SpinregError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(1) from None
    print(f"[{job.stage}] committed {manifest['object_id']} after {time.monotonic() - start:.1f} s", flush=True)
    sys.stdout.flush()
    # Engines leave threads and atexit work behind that can hang a finished process.
    os._exit(0)
