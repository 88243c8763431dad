"""The entry point of every stage process: job file, supervision, ranks and exit status.

Decides: that a stage never outlives its parent, when it becomes several ranks, and how it reports its end.
Leaves out: the stages themselves (`stages`), and starting them (`tasks.stage_process`, or a person).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from spinreg_core.errors import EXIT_PREEMPTED
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runtime.failures import RANKS, describe_error, record
from spinreg_core.runtime.quiet import quieten_libraries
from spinreg_core.runtime.rank_watch import RankWatch
from spinreg_core.runtime.supervision import Preempted, die_with_parent, on_sigterm


def main(run: Callable[[Job], Manifest | None], *, ranked: bool = False) -> NoReturn:
    """Run one stage from the command line: `python -m spinreg_core.stages.<name> JOB.json`.

    ranked: several processes can share the work. This process starts them where the job's resources ask for more than
    one; under torchrun it is one of them.
    """
    if len(sys.argv) != 2:
        print(f"usage: python -m {run.__module__} JOB.json", file=sys.stderr)
        raise SystemExit(2)
    quieten_libraries()
    job_file = Path(sys.argv[1])
    job = Job.load(job_file)
    rank = int(os.environ["RANK"]) if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 else None
    folder = job.workdir / RANKS
    faulthandler.enable()
    job.workdir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, on_sigterm)
    watch = None
    if rank is None:
        die_with_parent()
    else:
        folder.mkdir(exist_ok=True)
        watch = RankWatch(folder, rank, job.config.resources.collective_timeout_seconds)
        die_with_parent(watch.should_exit)
        # The signal itself writes the stack, also of a rank that hangs in a collective and runs no Python. The file
        # stays open as long as the process.
        stack = open(folder / f"stack-{rank}.txt", "w")  # noqa: SIM115
        faulthandler.register(signal.SIGTERM, file=stack, all_threads=False, chain=True)
        # Python's warnings belong in the log. Libraries that write to the descriptor itself go to `rank-N.err`.
        sys.stderr = sys.stdout
    start = time.monotonic()
    try:
        if ranked and rank is None:
            from spinreg_core.runtime.distributed import processes_here

            processes = processes_here(job.config.resources)
            if processes * job.config.resources.nodes > 1:
                from spinreg_core.runtime.torchrun import launch

                _end(launch(job, job_file, processes))
        manifest = run(job)
    except Preempted:
        if rank is not None:
            _end(EXIT_PREEMPTED)
        raise
    except (Exception, SystemExit) as error:
        status, message = describe_error(error, job.stage, job.config)
        if rank is None:
            print(message, flush=True)
        else:
            record(folder, rank, status, message)
        _end(status)
    if watch is not None:
        watch.finished()
    if not rank and manifest is not None:
        print(f"[{job.stage}] committed {manifest.object_id} after {time.monotonic() - start:.1f} s", flush=True)
    _end(0)


def _end(status: int) -> NoReturn:
    """End the process without threads and atexit handlers of engines and process groups, which can hang."""
    sys.stdout.flush()
    os._exit(status)
