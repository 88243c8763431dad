"""Benchmarks of an iterate besides held-out rows: which there are, and what each leaves in the store.

Decides: the parts of an iterate's benchmark (one object each, so that adding a task measures that task alone) and
how they are found. Leaves
out: how a part is measured (`lm_eval.py`, `mt_bench.py`, `win_rate.py`) and what it leaves (`part.py`).

Benchmarks are no part of a run's head: they follow from its configuration, which may ask for others tomorrow, and
`spinreg gc` leaves them.
"""

from __future__ import annotations

import json
from typing import Any

from spinreg_core.benchmarks import lm_eval, mt_bench, win_rate
from spinreg_core.config import RunConfig
from spinreg_core.objects import fetch_file, read_manifest
from spinreg_core.rounds import Plan
from spinreg_core.store import Store

KINDS = {"lm-eval": lm_eval, "mt-bench": mt_bench, "win-rate": win_rate}


def check(config: RunConfig) -> None:
    """Raise BadInput for what a benchmark would be refused for later: files that cannot be used. Takes no GPU, asks no
    judge."""
    mt_bench.check(config)
    win_rate.check(config)


def parts_of(config: RunConfig, head: dict[str, Any], iterate: int) -> list[Plan]:
    """What iterate n is measured with, as the configuration says now. Needs its committed evaluation."""
    wanted = config.benchmarks.rounds
    if wanted != "all" and iterate not in wanted:
        return []
    return [plan for kind in KINDS.values() for plan in kind.plans(config, head, iterate)]


def plan_benchmark(config: RunConfig, head: dict[str, Any], iterate: int) -> Plan | None:
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
    return Plan("benchmark", iterate, {"parts": sorted(inputs)}, inputs, extra)


def results_of(store: Store, config: RunConfig, head: dict[str, Any], iterate: int) -> list[dict[str, Any]]:
    """`results.json` of every part that has been measured, with its `object_id`, in the order of the configuration."""
    found = []
    for plan in parts_of(config, head, iterate):
        if read_manifest(store, plan.object_id) is not None:
            document = json.loads(fetch_file(store, plan.object_id, "results.json").read_bytes())
            found.append(document | {"object_id": plan.object_id})
    return found


__all__ = ["KINDS", "check", "parts_of", "plan_benchmark", "results_of"]
