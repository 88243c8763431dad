"""The stage `lm-eval-check`: checks lm-eval's tasks, their data and their few-shot examples before a run starts.

Runs on the CPU: it loads the data of each task and builds one question. Leaves out: the checks without lm-eval, and
lm-eval itself (`benchmarks`).

A job's `key` has {"tasks": {name: {"fewshot", "limit"}}, ...}. The stage leaves no files; its manifest's metrics are
{name: {"documents", "fewshot"}}.
"""

from __future__ import annotations

import time

from spinreg_core.benchmarks.lm_eval_model import check_task, open_tasks
from spinreg_core.models.source import tokenizer_folder
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import publish
from spinreg_core.runtime.main import main
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.open import open_store


def run(job: Job) -> Manifest:
    """Check the tasks. Returns the manifest. Raises BadInput."""
    start, tasks = time.monotonic(), job.key["tasks"]
    # Tasks that generate their data, such as ruler, need the tokenizer to fill a context length.
    pretrained = tokenizer_folder(job.config.model, cache_folder())
    manager = open_tasks(job.config.benchmarks.include_path, list(tasks), pretrained)
    found = {}
    for name, asked in tasks.items():
        found[name] = check_task(manager, name, asked["fewshot"])
        print(
            f"[lm-eval-check] {name}: {found[name]['documents']} questions, {found[name]['fewshot']} examples",
            flush=True,
        )
    return publish(open_store(job.store), job, None, metrics=found, seconds=time.monotonic() - start)


if __name__ == "__main__":
    main(run)
