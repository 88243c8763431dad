"""Benchmarks of an iterate besides held-out rows: which there are, and what each leaves in the store.

Decides: the parts of an iterate's benchmark (one object each, so that adding a task measures that task alone) and
how they are found again. Leaves out: how a part is measured (`lm_eval.py`, `mt_bench.py`, `win_rate.py`) and what it
leaves (`results.py`).

What is wanted follows from the configuration, which may ask for something else tomorrow. What was measured is in the
run's head, by kind and name: a report made elsewhere (another version of lm-eval, no GPU) still finds it. `spinreg gc`
leaves these objects.
"""

from __future__ import annotations

import json
from typing import Any

from spinreg_core.benchmarks import lm_eval, mt_bench, win_rate
from spinreg_core.config import RunConfig
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.lease import RunLease
from spinreg_core.runs.objects import read_manifest, require_manifest
from spinreg_core.runs.plans import StagePlan, measured_objects
from spinreg_core.store.base import Store

KINDS = {"lm-eval": lm_eval, "mt-bench": mt_bench, "win-rate": win_rate}


def require_benchmark_files(config: RunConfig) -> None:
    """Raise BadInput for what a benchmark would be refused for later: files that cannot be used. Takes no GPU, asks no
    judge."""
    mt_bench.require_mt_bench_files(config)
    win_rate.require_judge(config)


def parts_of(config: RunConfig, head: dict[str, Any], iterate: int) -> list[StagePlan]:
    """What iterate n is measured with, as the configuration says now. Needs its committed evaluation. Raises BadInput
    for what cannot be measured here (`lm_eval.plans`)."""
    wanted = config.benchmarks.rounds
    if wanted != "all" and iterate not in wanted:
        return []
    return [plan for kind in KINDS.values() for plan in kind.plans(config, head, iterate)]


def is_measured(store: Store, config: RunConfig, head: dict[str, Any], iterate: int) -> bool:
    """Whether iterate n is measured with what the configuration asks for now. What the machine that measures settles
    (lm-eval's version, what `auto` stands for, data outside the include path) may have been another. Raises BadInput
    where files that it names are not here, Damaged."""
    wanted, found = config.benchmarks.rounds, measured_objects(head, iterate)
    if wanted != "all" and iterate not in wanted:
        return True
    for known in lm_eval.known(config, head, iterate):
        object_id = found.get(part_name(known, "lm-eval"))
        if object_id is None or not known.items() <= _key_of(store, object_id).items():
            return False
    judged = [plan for kind in (mt_bench, win_rate) for plan in kind.plans(config, head, iterate)]
    return all(found.get(part_name(plan.key, plan.stage)) == plan.object_id for plan in judged)


_keys: dict[tuple[str, str], dict[str, Any]] = {}


def _key_of(store: Store, object_id: str) -> dict[str, Any]:
    """What an object is named after, which never changes: asked for again and again while members are waited for."""
    place = store.url, object_id
    if place not in _keys:
        _keys[place] = require_manifest(store, object_id).get("key", {})
    return _keys[place]


def plan_benchmark(config: RunConfig, head: dict[str, Any], iterate: int) -> StagePlan | None:
    """The job that measures whatever of iterate n's parts is missing; None where nothing is wanted."""
    parts = parts_of(config, head, iterate)
    if not parts:
        return None
    inputs = {plan.object_id: plan.object_id for plan in parts}
    extra = {
        "parts": [
            {"stage": plan.stage, "object_id": plan.object_id, "key": plan.key, "inputs": plan.inputs,
             "extra": plan.extra} for plan in parts
        ]
    }  # fmt: skip
    return StagePlan("benchmark", iterate, {"parts": sorted(inputs)}, inputs, extra)


def part_name(key: dict[str, Any], stage: str) -> str:
    """What a part is called in a run's head, e.g. `lm-eval gsm8k`."""
    return f"{stage} {key.get('name', stage)}"


def measured_of(store: Store, plan: StagePlan) -> dict[str, str]:
    """Of the parts of `plan_benchmark`, the objects of those that are measured, by their names."""
    parts = plan.extra["parts"]
    found = {part_name(part["key"], part["stage"]): part["object_id"] for part in parts}
    return {name: object_id for name, object_id in found.items() if read_manifest(store, object_id) is not None}


def record_measured(session: RunLease, iterate: int, objects: dict[str, str]) -> None:
    """Say in a run's head what an iterate is measured with, by `part_name`. Unlike a stage, a benchmark may be another
    object later: with other settings. Raises LeaseLost."""
    if objects.items() <= measured_objects(session.head, iterate).items():
        return

    def change(head: dict[str, Any]) -> None:
        entry = next(entry for entry in head["rounds"] if entry["round"] == iterate)
        entry["measured"] = entry.get("measured", {}) | objects

    session.update(change)


def results_of(store: Store, config: RunConfig, head: dict[str, Any], iterate: int) -> list[dict[str, Any]]:
    """`results.json` of every part that has been measured, with its `object_id`: first those that the configuration
    asks for, in its order, then what it asked for earlier."""
    found = measured_objects(head, iterate)
    kinds = list(KINDS)
    tasks = config.benchmarks.lm_eval_tasks()

    def place(name: str) -> tuple[int, int]:
        kind, _, task = name.partition(" ")
        return kinds.index(kind), tasks.index(task) if task in tasks else len(tasks)

    results = []
    for name in sorted(found, key=place):
        if read_manifest(store, found[name]) is not None:
            document = json.loads(fetch_file(store, found[name], "results.json").read_bytes())
            results.append(document | {"object_id": found[name]})
    return results


__all__ = ["KINDS", "is_measured", "measured_of", "part_name", "parts_of", "plan_benchmark", "record_measured",
"require_benchmark_files",
           "results_of"]  # fmt: skip
