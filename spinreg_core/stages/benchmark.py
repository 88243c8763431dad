"""The stage `benchmark`: what an iterate is measured with besides held-out rows, part by part.

Decides: that a part which is measured already, by whichever run, is not measured again, and that one that fails does
not keep the others from being measured. Leaves out: the parts (`benchmarks/`).

A job's `extra`: {"parts": [{"stage", "object_id", "key", "inputs", "extra"}]}, one job each. Leaves no files of its
own: the manifest names the parts as its inputs, and holds their metrics.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from spinreg_core.benchmarks import KINDS
from spinreg_core.objects import publish, read_manifest
from spinreg_core.stages.job import Job, main
from spinreg_core.store import open_store


def run(job: Job) -> dict[str, Any]:
    """Measure the parts that are missing. Returns the manifest.

    Raises what the first part raised that failed, after the others were measured.
    """
    start, store = time.monotonic(), open_store(job.store)
    failed: Exception | None = None
    metrics: dict[str, Any] = {}
    for part in job.extra["parts"]:
        name = part["key"].get("name", part["stage"])
        manifest = read_manifest(store, part["object_id"])
        if manifest is None:
            print(f"[benchmark] {part['stage']} {name}", flush=True)
            try:
                manifest = KINDS[part["stage"]].run(replace(job, workdir=job.workdir / part["object_id"], **part))
            except Exception as error:
                print(f"[benchmark] {part['stage']} {name} failed: {error}", flush=True)
                failed = failed or error
                continue
        metrics[f"{part['stage']} {name}"] = manifest["metrics"]
    if failed is not None:
        raise failed
    folder = job.workdir / "out"
    folder.mkdir(parents=True, exist_ok=True)
    return publish(store, job, folder, metrics=metrics, seconds=time.monotonic() - start)


if __name__ == "__main__":
    main(run)
