"""The public face: advance and read runs from Python, without Prefect. `import spinreg_core` loads it lazily.

run = spinreg_core.run(spinreg_core.RunConfig(run="mine", model="/models/chat", dataset="rows.jsonl", until_round=2))
run.metrics(2)["heldout_nll"]
model = spinreg_core.load_policy(run.policy(2))
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinreg_core.benchmarks.lm_eval import plan_check
from spinreg_core.benchmarks.measure import do_benchmark, do_check
from spinreg_core.benchmarks.registry import plan_benchmark, require_benchmark_files
from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import override
from spinreg_core.errors import BadInput, Damaged, SpinregError, StageFailed, StagePreempted, StoreFailed
from spinreg_core.evaluation.early_stopping import require_metric, why_ended
from spinreg_core.evaluation.samples import ShownSample
from spinreg_core.maintenance import repair
from spinreg_core.reports.run_report import read_json, read_metrics, report_data, write_report
from spinreg_core.runs.fetch import fetch_folder
from spinreg_core.runs.head import Head, require_config, require_head, resolve_run
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import RunLease, hold_lease
from spinreg_core.runs.loop import Steps, advance, do_prepare, do_stage, run_stages
from spinreg_core.runs.stages import STAGES, complete_round
from spinreg_core.runtime.child import run_in_process
from spinreg_core.store.base import Store
from spinreg_core.store.cache import require_cache
from spinreg_core.store.open import open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spinreg_core.evaluation.intervals import Estimate
    from spinreg_core.models.loading import Precision
    from spinreg_core.reports.schema import Report


def run(config: RunConfig | str | Path, *, say: Callable[[str], object] = print, **fields: Any) -> Run:
    """Advance a run in plain processes, without Prefect, and return it.

    A call after a killed one finishes the same advance and adds nothing. A call with an `until_round` that is reached
    changes nothing. Retries, deadlines, trackers and progress pages come with the flow `spin`.

    Args:
        config: the configuration, or the path of its file (YAML or JSON).
        say: gets lines about the advance. What stages print goes to standard output.
        fields: fields that win over the configuration, e.g. `until_round=3` or `objective={"alpha": 1.0}`.

    Raises:
        BadInput: the configuration is not valid, or differs from the one that the run was started with.
        LeaseHeld: another process advances the run.
        LeaseLost: another process took the run over; the stage under way was killed.
        StageFailed, Damaged, StoreFailed: a stage failed. Committed stages stay committed.
    """
    if isinstance(config, RunConfig):
        given, file = override(config.model_dump(mode="json", exclude_unset=True), fields), None
    else:
        given, file = fields, str(config)
    resolved = resolve_run(given, file)
    store = open_store(resolved.store)
    require_usable(resolved)
    # A name of its own for every call: a caller that asks again under the same name gets its recorded advance.
    label = f"spinreg_core.run (pid {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:12]})"
    failures: list[SpinregError] = []
    with hold_lease(store, resolved, label) as lease:

        def start(job: Job, name: str) -> object:
            lease.check()
            return run_in_process(job, job.module, lease.check)

        def call(stage: str) -> Callable[[int], object]:
            return lambda number: do_stage(store, lease, resolved, stage, number, start)

        def prepare() -> None:
            if plan_check(resolved) is not None:
                do_check(store, lease, resolved, start)
            do_prepare(store, lease, resolved, start)

        def measure(number: int) -> bool:
            call = partial(do_benchmark, store, lease, resolved, number, start)
            return measure_or_note(resolved, lease, number, call, failures, say)

        def run_round(number: int) -> None:
            run_stages(number, calls)
            measure(number)

        def ended() -> str | None:
            return why_ended(resolved.until, report_data(store, resolved.run)["rounds"])

        calls = {stage: call(stage) for stage in STAGES}
        steps = Steps(prepare, calls, run_round, measure, ended, show=lambda number: None)
        repair.finish(store, lease, resolved, steps.prepare, steps.stages, say)
        advance(lease, resolved, label, steps, say)
        # A process that was frozen and lost the run leaves the report to its successor.
        lease.check()
        write_report(store, resolved.run)
        lease.finish_advance()
    if failures:
        raise failures[0]
    return Run(store, resolved.run)


def require_usable(config: RunConfig) -> None:
    """Raise BadInput for problems that would end a stage hours later, as far as this process can see them.

    It looks at the cache, the files of benchmarks, and the metric of `until`.
    """
    require_cache()
    require_benchmark_files(config)
    require_metric(config)


def measure_or_note(
    config: RunConfig,
    lease: RunLease,
    round_number: int,
    benchmark: Callable[[], Mapping[str, object]],
    failures: list[SpinregError],
    say: Callable[[str], object],
) -> bool:
    """Call `benchmark` if benchmarks of an iterate are wanted. Returns whether it measured anything new.

    No later round reads benchmarks. So a failure (an absent judge, a task that lm-eval cannot run) is reported, added
    to `failures`, and the rounds go on. Raises what stops a run: a lost lease, cancellation, preemption.
    """
    try:
        return plan_benchmark(config, lease.head, round_number) is not None and not benchmark()["reused"]
    # Named before its base class StageFailed: preemption stops the run.
    except StagePreempted:
        raise
    except (BadInput, Damaged, StageFailed, StoreFailed) as error:
        say(f"round {round_number} is not measured in full: {error}")
        failures.append(error)
        return False


class Run:
    """A run in a store: its configuration, metrics, samples and policies. Made by `run` and `read_run`."""

    def __init__(self, store: Store, name: str) -> None:
        """Raises BadInput if there is no such run, Damaged if its head or configuration cannot be read."""
        self.store, self.name = store, name
        require_head(store, name)
        self.config = require_config(store, name)

    @property
    def head(self) -> Head:
        """The head of the run as it is now."""
        return require_head(self.store, self.name)

    @property
    def complete_round(self) -> int:
        """The last complete round; 0 also before any round is complete."""
        return complete_round(self.head)

    def report(self) -> Report:
        """Return the content of report.json, computed from what is committed now."""
        return report_data(self.store, self.name)

    def metrics(self, round_number: int) -> dict[str, Estimate]:
        """Return the held-out metrics of an iterate (0: the base) by name, with 95 % intervals.

        Raises BadInput for a round that is not evaluated.
        """
        return read_metrics(self.store, self.config, self._object(round_number, "evaluate"), round_number)

    def samples(self, round_number: int) -> list[ShownSample]:
        """Return the shown held-out prompts of an iterate with the human answer and the iterate's sample.

        Raises BadInput for a round that is not evaluated.
        """
        return list(read_json(self.store, self._object(round_number, "evaluate"), "samples.json")["samples"])

    def policy(self, round_number: int) -> Path:
        """Return a verified local folder with the policy of an iterate, in the Hugging Face layout (0: the base).

        Raises BadInput for a round that is not trained, Damaged if files differ from those committed, Removed if
        `spinreg gc` has removed the policy.
        """
        object_id = self.head.base if round_number == 0 else None
        return fetch_folder(self.store, object_id or self._object(round_number, "train"), "policy")

    def _object(self, round_number: int, stage: str) -> str:
        found = self.head.stage(round_number, stage)
        if found is None:
            raise BadInput(f"run {self.name!r}, round {round_number}", f"no committed {stage}",
                           f"a round from 0 to {self.complete_round}")  # fmt: skip
        return found


def read_run(store: Store | str, name: str) -> Run:
    """Return a run of a store (or of its URL). Raises BadInput if there is no such run."""
    return Run(open_store(store) if isinstance(store, str) else store, name)


def load_policy(folder: Path | str, precision: Precision = "fp32", device: str = "cpu") -> PreTrainedModel:
    """Return the policy in a folder, with the number format and attention of training and scoring.

    Reads safetensors alone and runs no code of the folder. Raises BadInput for a folder that cannot be loaded.
    """
    from spinreg_core.models.loading import load_policy as load

    return load(folder, precision, device)
