"""Starts the ranks of a stage on this node with torchrun, and ends with the status of the rank at fault.

Decides: that only rank 0 prints to the stage's output, that the others print into `WORKDIR/ranks/`, and the message of
a failure. Leaves out: which of several failures counts (`runtime.failures`), the ranks' work (`runtime.distributed`).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from spinreg_core.errors import EXIT_PREEMPTED
from spinreg_core.runtime.failures import RANKS, is_secondary_failure, root_failure
from spinreg_core.runtime.nodes import ATTEMPT_VARIABLE, failures_elsewhere, post_order, report_failure, withdraw_order
from spinreg_core.store.open import open_store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spinreg_core.runs.job import Job


class _Logs(DefaultLogsSpecs):
    """Sends output to `rank-N.log` (of rank 0 to our own output), and errors of libraries to `rank-N.err`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(log_dir=str(folder / "torchrun"))
        self.folder = folder

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        found = super().reify(envs)  # type: ignore[arg-type]
        for local, env in envs.items():
            found.stderrs[local] = str(self.folder / f"rank-{env['RANK']}.err")
            if env["RANK"] != "0":
                found.stdouts[local] = str(self.folder / f"rank-{env['RANK']}.log")
        return found


def launch(job: Job, job_file: Path, processes: int) -> int:
    """Run the job's module as `processes` ranks here, together with the other nodes of the job.

    Returns the exit status of the whole: 0, or that of the rank at fault, whose message is printed.
    """
    nodes = job.config.resources.nodes
    if nodes == 1:
        status, message = _ranks(job, job_file, processes, run_id=f"{job.object_id}-{job.writer}")
    elif (attempt := os.environ.get(ATTEMPT_VARIABLE)) is not None:  # not the node that runs the flow
        status, message = _ranks(job, job_file, processes, run_id=attempt)
        if message and not is_secondary_failure(message):
            report_failure(open_store(job.store), job, attempt, status, message)
    else:
        store = open_store(job.store)
        attempt = post_order(store, job)
        print(f"waiting for {nodes - 1} more nodes at {job.config.resources.rendezvous} (spinreg join)", flush=True)
        try:
            status, message = _ranks(job, job_file, processes, run_id=attempt)
            if message and is_secondary_failure(message):
                status, message = next(iter(failures_elsewhere(store, job, attempt)), (status, message))
        finally:
            withdraw_order(store, job, attempt)
    if message:
        print(message, flush=True)
    return status


def _ranks(job: Job, job_file: Path, processes: int, *, run_id: str) -> tuple[int, str]:
    """Return (exit status, message of a failure)."""
    folder = job.workdir / RANKS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    resources = job.config.resources
    # The message of a failure is that of `failures.root_failure`.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Without a limit every rank would use all cores; only torchrun's command line sets one.
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // processes, 1))
    # Ranks finish their step and write a checkpoint before torchrun kills them.
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(resources.stop_seconds) + 1)
    config = LaunchConfig(
        min_nodes=resources.nodes,
        max_nodes=resources.nodes,
        nproc_per_node=processes,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=resources.rendezvous or "localhost:0",
        max_restarts=0,
        logs_specs=_Logs(folder),
    )
    try:
        elastic_launch(config, entrypoint=sys.executable)("-u", "-m", job.module, str(job_file))
    except ChildFailedError as failed:
        status, message = root_failure(folder, {rank: failure.exitcode for rank, failure in failed.failures.items()})
        return status, "" if status == EXIT_PREEMPTED else message
    except SignalException as stopped:
        return (EXIT_PREEMPTED if stopped.sigval == signal.SIGTERM else 1), ""
    except RendezvousError as error:
        return 1, f"error: {resources.nodes} nodes did not meet at {resources.rendezvous}: {error}"
    return 0, ""
