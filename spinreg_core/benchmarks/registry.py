"""Registry of the benchmarks: the parts of an iterate's benchmark, and their results in the store.

Decides: the parts (one object each, so that an added task is measured alone) and how they are found again. Leaves out:
measuring a part (`lm_eval`, `mt_bench`, `win_rate`) and its files (`results`).

The configuration says which parts are wanted, and it may change. The run's head says what was measured, by kind and
name. So a report made elsewhere (another version of lm-eval, no GPU) still finds it. `spinreg gc` keeps these objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from spinreg_core.benchmarks import lm_eval, mt_bench, win_rate
from spinreg_core.benchmarks.results import part_job
from spinreg_core.config import RunConfig
from spinreg_core.evaluation.schema import StoredBenchmark
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.head import Head
from spinreg_core.runs.lease import RunLease
from spinreg_core.runs.objects import read_manifest, require_manifest
from spinreg_core.runs.plans import StagePlan
from spinreg_core.store.base import Store

KINDS = {"lm-eval": lm_eval, "mt-bench": mt_bench, "win-rate": win_rate}


def require_benchmark_files(config: RunConfig) -> None:
    """Raise BadInput for files that a benchmark could not use later. Needs no GPU and no judge."""
    mt_bench.require_mt_bench_files(config)
    win_rate.require_win_rate_files(config)


def parts_of(config: RunConfig, head: Head, iterate: int) -> list[StagePlan]:
    """Return the parts of iterate n that the configuration wants. Needs the iterate's committed evaluation.

    Raises BadInput where a part cannot be measured on this machine (`lm_eval.plans`).
    """
    wanted = config.benchmarks.rounds
    if wanted != "all" and iterate not in wanted:
        return []
    return [plan for kind in KINDS.values() for plan in kind.plans(config, head, iterate)]


def is_measured(store: Store, config: RunConfig, head: Head, iterate: int) -> bool:
    """Return True if every part of iterate n that the configuration wants has been measured.

    Choices of the measuring machine may differ: lm-eval's version, the meaning of `auto`, data outside the include
    path. Raises BadInput where named files are missing on this machine; Damaged.
    """
    wanted, found = config.benchmarks.rounds, head.measured(iterate)
    if wanted != "all" and iterate not in wanted:
        return True
    for known in lm_eval.known(config, head, iterate):
        object_id = found.get(part_name(known, "lm-eval"))
        if object_id is None or not known.items() <= _key_of(store, object_id).items():
            return False
    judged = [plan for kind in (mt_bench, win_rate) for plan in kind.plans(config, head, iterate)]
    return all(found.get(part_name(plan.key, plan.stage)) == plan.object_id for plan in judged)


_keys: dict[tuple[str, str], Mapping[str, object]] = {}


def _key_of(store: Store, object_id: str) -> Mapping[str, object]:
    """Return the key of an object. It never changes, and a grid asks for it repeatedly, so it is kept in memory."""
    place = store.url, object_id
    if place not in _keys:
        _keys[place] = require_manifest(store, object_id).key or {}
    return _keys[place]


def plan_benchmark(config: RunConfig, head: Head, iterate: int) -> StagePlan | None:
    """Return the job that measures the missing parts of iterate n; None where no part is wanted."""
    parts = parts_of(config, head, iterate)
    if not parts:
        return None
    inputs = {plan.object_id: plan.object_id for plan in parts}
    extra = {"parts": [part_job(plan) for plan in parts]}
    return StagePlan("benchmark", iterate, {"parts": sorted(inputs)}, inputs, extra)


def part_name(key: Mapping[str, object], stage: str) -> str:
    """Return the name of a part in a run's head, e.g. `lm-eval gsm8k`."""
    return f"{stage} {key.get('name', stage)}"


def measured_of(store: Store, plan: StagePlan) -> dict[str, str]:
    """Return the measured parts of `plan_benchmark`: objects by `part_name`."""
    parts = plan.extra["parts"]
    found = {part_name(part["key"], part["stage"]): part["object_id"] for part in parts}
    return {name: object_id for name, object_id in found.items() if read_manifest(store, object_id) is not None}


def record_measured(lease: RunLease, iterate: int, objects: dict[str, str]) -> None:
    """Record the measured parts of an iterate in the run's head, by `part_name`.

    Unlike a stage's, the object of a part may be replaced later, by one with other settings. Raises LeaseLost.
    """
    if objects.items() <= lease.head.measured(iterate).items():
        return

    def change(head: Head) -> None:
        entry = next(entry for entry in head.rounds if entry.round == iterate)
        entry.measured = entry.measured | objects

    lease.update(change)


def results_of(store: Store, config: RunConfig, head: Head, iterate: int) -> list[StoredBenchmark]:
    """Return the results of every measured part, with its object.

    Parts that the configuration wants come first, in its order, then those that it wanted earlier.
    """
    found = head.measured(iterate)
    kinds = list(KINDS)
    tasks = config.benchmarks.lm_eval_tasks()

    def place(name: str) -> tuple[int, int]:
        kind, _, task = name.partition(" ")
        return kinds.index(kind), tasks.index(task) if task in tasks else len(tasks)

    results = []
    for name in sorted(found, key=place):
        if read_manifest(store, found[name]) is not None:
            document = json.loads(fetch_file(store, found[name], "results.json").read_bytes())
            results.append(document | {"object_id": found[name], "uri": store.uri(f"objects/{found[name]}")})
    return results
