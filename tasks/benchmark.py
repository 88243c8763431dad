"""The task `benchmark`, which measures an iterate (round 0: the base), and `check-benchmarks`, which fails early."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from spinreg_core.benchmarks.measure import Checked, RoundBenchmarks, do_benchmark, do_check
from tasks.run_stage import run_committed


@task(
    name="benchmark",
    task_run_name="{run}/round-{round_number}/benchmark",
    tags=["spinreg", "benchmark"],
    # The store decides what is done already.
    cache_policy=NO_CACHE,
)
def benchmark(run: str, round_number: int) -> RoundBenchmarks | State[RoundBenchmarks]:
    """Return the benchmarks of an iterate."""
    return run_committed(
        f"benchmark of round {round_number}",
        lambda c, start: do_benchmark(c.store, c.lease, c.config, round_number, start),
    )


@task(
    name="check-benchmarks",
    task_run_name="{run}/check-benchmarks",
    tags=["spinreg", "benchmark"],
    # The store decides what is done already.
    cache_policy=NO_CACHE,
)
def check_benchmarks(run: str) -> Checked | State[Checked]:
    """Check that lm-eval knows the tasks and can load their data, before anything is sampled or trained.

    Raises BadInput.
    """
    return run_committed("check-benchmarks", lambda c, start: do_check(c.store, c.lease, c.config, start))
