"""The stage `lm-eval-check`: whether lm-eval knows the tasks, can load their data and has enough examples, asked on the
CPU before anything is sampled or trained.

Decides: what is tried of a task: its data are loaded and one question is put. Leaves out: what can be told without
lm-eval (`benchmarks/lm_eval.py`), lm-eval itself (`benchmarks/lm_eval_model.py`).

A job's `key`: {"tasks": {name: {"fewshot", "limit"}}, ...}. Leaves no files; its manifest's metrics are {name:
{"documents", "fewshot"}}.
"""

from __future__ import annotations

import time
from typing import Any

from spinreg_core.benchmarks.lm_eval_model import check_task, open_tasks
from spinreg_core.models.source import tokenizer_folder
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import publish
from spinreg_core.runtime.main import main
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.open import open_store


def run(job: Job) -> dict[str, Any]:
    """Check the tasks. Returns the manifest. Raises BadInput."""
    start, tasks = time.monotonic(), job.key["tasks"]
    metadata = {"pretrained": str(tokenizer_folder(job.config.model, cache_folder()))}  # some make up data for a length
    manager = open_tasks(job.config.benchmarks.include_path, list(tasks), metadata)
    found = {}
    for name, asked in tasks.items():
        found[name] = check_task(manager, name, asked["fewshot"])
        print(
            f"[lm-eval-check] {name}: {found[name]['documents']} questions, {found[name]['fewshot']} examples",
            flush=True,
        )
    folder = job.workdir / "out"
    folder.mkdir(parents=True, exist_ok=True)
    return publish(open_store(job.store), job, folder, metrics=found, seconds=time.monotonic() - start)


if __name__ == "__main__":
    main(run)
