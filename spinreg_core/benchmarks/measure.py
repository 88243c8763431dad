"""Measure an iterate with the benchmarks of a configuration, and check them before a run begins.

Leaves out: which parts there are (`registry.py`), measuring itself (`spinreg_core.stages`).
"""

from __future__ import annotations

import contextlib
from typing import Any, TypedDict

from spinreg_core.benchmarks.lm_eval import plan_check
from spinreg_core.benchmarks.registry import measured_of, plan_benchmark, record_measured
from spinreg_core.config import RunConfig
from spinreg_core.errors import Damaged, StoreFailed
from spinreg_core.runs.lease import RunLease
from spinreg_core.runs.loop import Start, run_plan
from spinreg_core.runs.objects import read_manifest, require_manifest
from spinreg_core.store.base import Store


class RoundBenchmarks(TypedDict):
    """The benchmarks of an iterate, by name of part (`lm-eval gsm8k`)."""

    stage: str
    round: int
    uris: dict[str, str]
    metrics: dict[str, Any]
    seconds: float
    reused: bool


class Checked(TypedDict):
    """The tasks of lm-eval that a configuration names: of each the number of documents and of few-shot examples."""

    tasks: dict[str, Any]
    reused: bool


def do_benchmark(store: Store, lease: RunLease, config: RunConfig, round_number: int, start: Start) -> RoundBenchmarks:
    """Make sure that an iterate is measured as the configuration asks. Raises as the process that measures.

    Parts that were measured are recorded also where another part failed.
    """
    plan = plan_benchmark(config, lease.head, round_number)
    assert plan is not None, "no benchmark is wanted of this round"
    measured = measured_of(store, plan)
    reused = len(measured) == len(plan.extra["parts"])
    try:
        if not reused:
            run_plan(store, lease, config, plan, f"round-{round_number}-benchmark", start)
    except BaseException:
        with contextlib.suppress(StoreFailed, Damaged):  # they must not replace the error of the process
            record_measured(lease, round_number, measured_of(store, plan))
        raise
    measured = measured if reused else measured_of(store, plan)
    record_measured(lease, round_number, measured)
    manifests = {name: require_manifest(store, object_id) for name, object_id in measured.items()}
    return {
        "stage": "benchmark",
        "round": round_number,
        "uris": {name: store.uri(f"objects/{object_id}") for name, object_id in measured.items()},
        "metrics": {name: manifest.metrics for name, manifest in manifests.items()},
        "seconds": sum(manifest.seconds for manifest in manifests.values()),
        "reused": reused,
    }


def do_check(store: Store, lease: RunLease, config: RunConfig, start: Start) -> Checked:
    """Make sure that lm-eval knows the tasks of a configuration and can load their data. Raises BadInput."""
    plan = plan_check(config)
    assert plan is not None, "no task of lm-eval is wanted"
    manifest = read_manifest(store, plan.object_id)
    reused = manifest is not None
    if manifest is None:
        run_plan(store, lease, config, plan, "check-benchmarks", start)
        manifest = require_manifest(store, plan.object_id)
    return {"tasks": manifest.metrics, "reused": reused}
