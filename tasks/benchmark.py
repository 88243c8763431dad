"""The tasks `benchmark`, what an iterate is measured with besides held-out rows (round 0 is the base), and
`check-benchmarks`, which finds out at the start what could not be measured."""

from __future__ import annotations

from prefect.client.schemas.objects import State
from prefect.states import Completed

from spinreg_core.benchmarks.lm_eval import plan_check
from spinreg_core.benchmarks.registry import measured_of, plan_benchmark, record_measured
from spinreg_core.errors import StagePreempted
from spinreg_core.runs.objects import read_manifest, require_manifest
from tasks.context import current_context
from tasks.results import BenchmarkResult, CheckResult
from tasks.run_stage import preempted, stage_task, watched_stage


@stage_task("benchmark")
def benchmark(run: str, round_number: int) -> BenchmarkResult | State[BenchmarkResult]:
    """Run the benchmarks that the configuration wants of an iterate."""
    context = current_context()
    store, session, config = context.store, context.session, context.config
    context.check()
    plan = plan_benchmark(config, session.head, round_number)
    assert plan is not None, "no benchmark is wanted of this round"
    measured = measured_of(store, plan)
    reused = len(measured) == len(plan.extra["parts"])
    try:
        if not reused:
            writer = session.writer()
            with context.scratch(f"round-{round_number}-benchmark", writer) as folder:
                try:
                    watched_stage(plan.job(config, store.url, writer, folder), "round", round_number, "benchmark")
                except StagePreempted as error:
                    return preempted(error)
    finally:  # of several parts some are measured also where another failed
        measured = measured if reused else measured_of(store, plan)
        record_measured(session, round_number, measured)
    manifests = {name: require_manifest(store, object_id) for name, object_id in measured.items()}
    result: BenchmarkResult = {
        "stage": "benchmark",
        "round": round_number,
        "uris": {name: store.uri(f"objects/{object_id}") for name, object_id in measured.items()},
        "metrics": {name: manifest["metrics"] for name, manifest in manifests.items()},
        "seconds": sum(manifest["seconds"] for manifest in manifests.values()),
        "reused": reused,
    }
    return Completed(name="Reused", message="measured before", data=result) if reused else result


@stage_task("check-benchmarks", run_name="", tag="benchmark")
def check_benchmarks(run: str) -> CheckResult | State[CheckResult]:
    """See that lm-eval knows the tasks and can load their data, before anything is sampled or trained.

    Raises BadInput.
    """
    context = current_context()
    store, session, config = context.store, context.session, context.config
    context.check()
    plan = plan_check(config)
    assert plan is not None, "no task of lm-eval is wanted"
    manifest = read_manifest(store, plan.object_id)
    reused = manifest is not None
    if manifest is None:
        writer = session.writer()
        with context.scratch("check-benchmarks", writer) as folder:
            watched_stage(plan.job(config, store.url, writer, folder), "check-benchmarks")
        manifest = require_manifest(store, plan.object_id)
    result: CheckResult = {"tasks": manifest["metrics"], "reused": reused}
    return Completed(name="Reused", message="checked before", data=result) if reused else result
