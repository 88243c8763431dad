"""The tasks `benchmark`, what an iterate is measured with besides held-out rows (round 0 is the base), and
`check-benchmarks`, which finds out at the start what could not be measured."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from spinreg_core.benchmarks.measure import do_benchmark, do_check
from tasks.run_stage import run_committed


@task(
    name="benchmark",
    task_run_name="{run}/round-{round_number}/benchmark",
    tags=["spinreg", "benchmark"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def benchmark(run: str, round_number: int) -> dict[str, Any] | State[dict[str, Any]]:
    """Return {"stage", "round", "uris", "metrics", "seconds", "reused"}."""
    return run_committed(
        f"benchmark of round {round_number}",
        lambda c, start: do_benchmark(c.store, c.session, c.config, round_number, start),
    )


@task(
    name="check-benchmarks",
    task_run_name="{run}/check-benchmarks",
    tags=["spinreg", "benchmark"],
    cache_policy=NO_CACHE,  # the store decides what is done
)
def check_benchmarks(run: str) -> dict[str, Any] | State[dict[str, Any]]:
    """Check that lm-eval knows the tasks and can load their data, before anything is sampled or trained.

    Returns {"tasks": {name: {"documents", "fewshot"}}, "reused"}. Raises BadInput.
    """
    return run_committed("check-benchmarks", lambda c, start: do_check(c.store, c.session, c.config, start))
