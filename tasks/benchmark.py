"""The task `benchmark`: what an iterate is measured with besides held-out rows; round 0 is the base."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from spinreg_core.benchmarks import plan_benchmark
from spinreg_core.errors import StagePreempted
from spinreg_core.objects import read_manifest, require_manifest
from tasks.context import current
from tasks.stage import preempted, watched_stage


@task(
    name="benchmark",
    task_run_name="{run}/round-{round_number}/benchmark",
    tags=["spinreg", "benchmark"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def benchmark(run: str, round_number: int) -> dict[str, Any] | State[dict[str, Any]]:
    """Returns {"stage", "round", "uri", "metrics", "seconds", "reused"}."""
    context = current()
    store, session, config = context.store, context.session, context.config
    context.check()
    plan = plan_benchmark(config, session.head, round_number)
    assert plan is not None, "no benchmark is wanted of this round"
    manifest = read_manifest(store, plan.object_id)
    reused = manifest is not None
    if manifest is None:
        writer = session.writer()
        with context.scratch(f"round-{round_number}-benchmark", writer) as folder:
            try:
                watched_stage(plan.job(config, store.url, writer, folder), "round", round_number, "benchmark")
            except StagePreempted as error:
                return preempted(error)
        manifest = require_manifest(store, plan.object_id)
    result = {
        "stage": "benchmark",
        "round": round_number,
        "uri": store.uri(f"objects/{plan.object_id}"),
        "metrics": manifest["metrics"],
        "seconds": manifest["seconds"],
        "reused": reused,
    }
    return Completed(name="Reused", message=f"measured before: {plan.object_id}", data=result) if reused else result
