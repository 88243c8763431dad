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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from spinreg_core.config import RunConfig
from spinreg_core.errors import EXIT_PREEMPTED, BadInput
from spinreg_core.stages.failures import described, record
from spinreg_core.stages.watch import POLL_SECONDS, RankWatch
from spinreg_core.store import stays_inside

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

    def fields(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self) | {"config": self.config.model_dump(mode="json"), "workdir": str(self.workdir)}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Job:
        """The inverse of `fields`. Raises BadInput for names that lead out of a folder: it may come from a store."""
        for name in ("stage", "object_id", "writer"):
            if fields[name] and ("/" in fields[name] or not stays_inside(fields[name])):
                raise BadInput(f"job, {name}", repr(fields[name]), "a plain name")
        config, workdir = RunConfig.model_validate(fields["config"]), Path(fields["workdir"])
        return cls(**fields | {"config": config, "workdir": workdir})

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.fields(), indent=1, sort_keys=True))

    @classmethod
    def load(cls, path: Path) -> Job:
        return cls.from_fields(json.loads(path.read_text()))


class Preempted(SystemExit):
    """SIGTERM arrived: leave now, everything committed so far stays."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


@dataclass
class _Sigterm:
    deferred: bool = False
    at: float | None = None  # time.monotonic() of the first one


_sigterm = _Sigterm()


def _on_sigterm(_signum: int, _frame: FrameType | None) -> None:
    _sigterm.at = _sigterm.at or time.monotonic()
    if not _sigterm.deferred:
        raise Preempted


@contextmanager
def finishing_steps() -> Iterator[Callable[[], float | None]]:
    """Within, SIGTERM does nothing but to make the given function return its time (time.monotonic) instead of None.

    Whoever sees that finishes what is under way and leaves; Preempted is raised then.
    """
    _sigterm.deferred = True
    try:
        yield lambda: _sigterm.at
    finally:
        _sigterm.deferred = False
    if _sigterm.at is not None:
        raise Preempted


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def die_with_parent(doomed: Callable[[], bool] = lambda: False) -> None:
    """End this process, and the process group it leads, soon after the parent is gone, or all is lost (`doomed`).

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

    def over() -> bool:
        return orphaned() or doomed()

    def end_group() -> None:
        if over() and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)

    def watch() -> None:
        while not over():
            time.sleep(POLL_SECONDS)
        time.sleep(3.0)
        end_group()
        os._exit(EXIT_PREEMPTED)

    signal.signal(signal.SIGHUP, on_hangup)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG
    atexit.register(end_group)
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main(run: Callable[[Job], dict[str, Any]], *, ranked: bool = False) -> NoReturn:
    """Run one stage from the command line: `python -m spinreg_core.stages.<name> JOB.json`.

    `ranked`: several processes can share the stage's work. Then this one starts them, if the job's resources ask for
    more than one; under torchrun it is one of them.
    """
    if len(sys.argv) != 2:
        print(f"usage: python -m {run.__module__} JOB.json", file=sys.stderr)
        raise SystemExit(2)
    job_file = Path(sys.argv[1])
    job = Job.load(job_file)
    rank = int(os.environ["RANK"]) if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 else None
    folder = job.workdir / "ranks"
    faulthandler.enable()
    job.workdir.mkdir(parents=True, exist_ok=True)
    watch = None
    if rank is not None:
        folder.mkdir(exist_ok=True)
        watch = RankWatch(folder, rank, job.config.resources.collective_timeout_seconds)
    die_with_parent((lambda: False) if watch is None else watch.doomed)
    signal.signal(signal.SIGTERM, _on_sigterm)
    if rank is not None:
        # Written by the signal itself: where a rank was that does not answer.
        stack = open(folder / f"stack-{rank}.txt", "w")  # noqa: SIM115 (as long as the process)
        faulthandler.register(signal.SIGTERM, file=stack, all_threads=False, chain=True)
        sys.stderr = sys.stdout  # warnings belong to the log; what libraries write below Python does not
    start = time.monotonic()
    try:
        processes = _processes(job) if ranked and rank is None else 1
        if processes * job.config.resources.nodes > 1 and ranked and rank is None:
            from spinreg_core.stages.launch import launch

            _end(launch(job, f"spinreg_core.stages.{job.stage.replace('-', '_')}", job_file, processes))
        manifest = run(job)
    except Preempted:
        if rank is not None:
            _end(EXIT_PREEMPTED)
        raise
    except (Exception, SystemExit) as error:  # libraries that leave the process had better say why
        status, message = described(error, job.stage, job.config)
        if rank is None:
            print(message, flush=True)
        else:
            record(folder, rank, status, message)
        _end(status)
    if watch is not None:
        watch.finished()
    if not rank:
        print(f"[{job.stage}] committed {manifest['object_id']} after {time.monotonic() - start:.1f} s", flush=True)
    _end(0)


def _processes(job: Job) -> int:
    from spinreg_core.ranks import processes_here

    return processes_here(job.config.resources)


def _end(status: int) -> NoReturn:
    """Engines and process groups leave threads and atexit work behind that can hang a finished process."""
    sys.stdout.flush()
    os._exit(status)
