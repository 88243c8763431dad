"""The stage `benchmark`: measures the parts of an iterate's benchmark, one by one.

Decides: a part that any run has measured is not measured again, and a failed part does not stop the others. Only if the
judge is away are the other judged parts skipped, so that its patience is spent once. Leaves out: the parts
(`benchmarks`).

A job's `extra` has {"parts": [`PartJob`]}. The stage leaves no files: the manifest names the parts as its inputs and
holds their metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from spinreg_core.benchmarks import lm_eval
from spinreg_core.benchmarks.registry import KINDS, part_name
from spinreg_core.errors import JudgeAway
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import publish, read_manifest
from spinreg_core.runtime.main import main
from spinreg_core.store.open import open_store


def run(job: Job) -> Manifest:
    """Measure the missing parts. Returns the manifest.

    Raises the error of the first failed part after the others were measured. JudgeAway takes precedence, since a retry
    is worthwhile after it.
    """
    start, store = time.monotonic(), open_store(job.store)
    metrics: dict[str, Any] = {}
    missing: list[Job] = []
    for part in job.extra["parts"]:
        manifest = read_manifest(store, part["object_id"])
        if manifest is None:
            missing.append(replace(job, workdir=job.workdir / part["object_id"], **part))
        else:
            metrics[part_name(part["key"], part["stage"])] = manifest.metrics
    failed: Exception | None = None
    for one, found in _measured(missing):
        name = part_name(one.key, one.stage)
        if isinstance(found, Exception):
            print(f"[benchmark] {name} failed: {found}", flush=True)
            if failed is None or (isinstance(found, JudgeAway) and not isinstance(failed, JudgeAway)):
                failed = found
        else:
            metrics[name] = found.metrics
    if failed is not None:
        raise failed
    return publish(store, job, None, metrics=metrics, seconds=time.monotonic() - start)


def _measured(jobs: list[Job]) -> Iterator[tuple[Job, Manifest | Exception]]:
    """Yield each part with its manifest, or with the error that it raised."""
    # Together, because one process loads the policy once for all tasks of lm-eval.
    yield from lm_eval.run_all([job for job in jobs if job.stage == "lm-eval"])
    away: JudgeAway | None = None
    for job in jobs:
        if job.stage != "lm-eval" and away is not None:
            yield job, JudgeAway("not started, because the judge is away")
        elif job.stage != "lm-eval":
            print(f"[benchmark] {part_name(job.key, job.stage)}", flush=True)
            try:
                yield job, KINDS[job.stage].run(job)
            except Exception as error:
                away = error if isinstance(error, JudgeAway) else None
                yield job, error


if __name__ == "__main__":
    main(run)
