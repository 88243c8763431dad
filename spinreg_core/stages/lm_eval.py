"""Process of the stage `benchmark` that measures tasks of lm-eval with one policy, one after the other.

Decides: the content of a task's object, which is published before the next task begins. The process stops at the first
failure, and its parent continues with the other tasks. Leaves out: lm-eval itself, and the metrics (`benchmarks`).

A job's `extra` has {"parts": [`PartJob`]}, all of one policy. The object of a part also has `samples.jsonl.gz`,
lm-eval's record of every answer, and `lm_eval.json`, its own results.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from spinreg_core.benchmarks.lm_eval import SEEDS
from spinreg_core.benchmarks.lm_eval_model import (
    Meter,
    Share,
    evaluate,
    load_task,
    open_model,
    open_tasks,
    restrict_gpus,
)
from spinreg_core.benchmarks.lm_eval_results import fingerprints, measured, primary_of, write_own
from spinreg_core.benchmarks.results import BenchmarkResults, write_part
from spinreg_core.evaluation.formatting import format_estimate
from spinreg_core.runs.fetch import fetch_folder
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import publish, versions
from spinreg_core.runtime.main import main
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

# Set by torchrun. accelerate and vLLM would use them to join the ranks, but each process has its own model.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
                   "MASTER_PORT")  # fmt: skip
_SHOWN_METRICS = 6


def run(job: Job) -> Manifest | None:
    """Measure and publish the parts. Returns the manifest of the last one (empty on ranks other than 0).

    The cost of the first part includes the time to open the model.
    """
    begin = time.monotonic()
    share = Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), job.workdir / "exchange")
    share.folder.mkdir(exist_ok=True)
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    store, wanted, parts = open_store(job.store), job.config.benchmarks, job.extra["parts"]
    backend = parts[0]["key"]["backend"]
    if backend == "vllm" and share.size > 1 and job.config.resources.device != "cpu":
        restrict_gpus(share.rank, job.config.generation.tensor_parallel)
    policy = fetch_folder(store, job.inputs["policy"], "policy")
    names = [part["key"]["name"] for part in parts]
    manager = open_tasks(wanted.include_path, names, policy)
    meter = Meter()
    model = open_model(policy, job.config, backend, share, meter)
    manifest: Manifest | None = None
    for part in parts:
        one = replace(job, workdir=job.workdir / part["object_id"], **part)
        manifest = _measure(store, one, model, manager, share, meter, begin)
        begin = time.monotonic()
    return manifest


def _measure(
    store: Store, job: Job, model: Any, manager: Any, share: Share, meter: Meter, begin: float
) -> Manifest | None:
    key, config, opening = job.key, job.config, time.monotonic() - begin
    name = key["name"]
    loaded = load_task(manager, name)
    meter.start(name)
    chat = key["questions_as"] == "chat"
    results = evaluate(model, manager, loaded, name, fewshot=key["fewshot"], limit=key["limit"], chat=chat)
    fields = ("requests", "too_long", "prompt_tokens", "answer_tokens")
    counts = [sum(each) for each in zip(*share.exchange([getattr(meter, name) for name in fields]), strict=True)]
    cost = dict(zip(fields, counts, strict=True))
    if share.rank:
        return None
    found = measured(results, loaded, name, resamples=key["bootstrap"], seed=SEEDS["numpy"])
    primary = primary_of(found, name)
    shots = {results["n-shot"][task] for task in loaded.tasks}
    too_long = cost.pop("too_long")
    notes = [] if not too_long else [
        f"{too_long} of {cost['requests']} requests are longer than the model's context of {model.max_length} tokens; "
        "lm-eval leaves out their beginning"
    ]  # fmt: skip
    document: BenchmarkResults = {
        "kind": "lm-eval",
        "name": name,
        "primary": primary,
        "better": found.better[primary],
        "directions": found.better,
        "metrics": found.metrics,
        "stderr": found.stderr,
        "intervals": found.intervals,
        "settings": {
            "fewshot": shots.pop() if len(shots) == 1 else None, "limit": key["limit"], "backend": key["backend"],
            "precision": key["precision"], "questions_as": key["questions_as"], "processes": share.size,
            "batch_size": config.benchmarks.batch_size if key["backend"] == "hf" else None,
            "include_path": config.benchmarks.include_path, "include_sha256": key["include"],
            "seeds": SEEDS, "task_versions": {task: results["versions"][task] for task in loaded.tasks},
        } | {name: key[name] for name in ("template_arguments",) if name in key},
        "fingerprints": {"policy": job.inputs["policy"]} | fingerprints(results["samples"]),
        "versions": versions() | {"lm-eval": key["lm_eval"]},
        "cost": {"seconds": round(time.monotonic() - begin, 3), "opening_seconds": round(opening, 3)} | cost,
        "notes": notes,
    }  # fmt: skip
    for metric in list(found.metrics)[:_SHOWN_METRICS]:
        print(f"{name}, {metric}: {format_estimate(found.metrics[metric])}", flush=True)
    for note in notes:
        print(f"{name}: {note}", flush=True)
    folder = job.workdir / "out"
    write_own(folder, results)
    metrics = write_part(folder, document, found.items)
    return publish(store, job, folder, metrics=metrics, seconds=time.monotonic() - begin)


if __name__ == "__main__":
    main(run, ranked=True)
