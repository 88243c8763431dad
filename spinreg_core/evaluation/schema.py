"""The fields of a benchmark's results and of a round's results, as early stopping, reports and comparisons read them.

Decides: the names and types that readers rely on. Leaves out: where the values come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

from spinreg_core.evaluation.intervals import Estimate


class BenchmarkSetup(TypedDict):
    """The settings, versions and cost behind the figures of a benchmark. `cost` has at least "seconds"."""

    kind: Literal["lm-eval", "mt-bench", "win-rate"]
    name: str
    settings: Mapping[str, Any]
    fingerprints: dict[str, Any]
    versions: dict[str, str]
    cost: dict[str, float]


class BenchmarkResults(BenchmarkSetup):
    """The content of a benchmark's `results.json`. `metrics[primary]` is the number that counts.

    `better` is the direction of `primary`. Only lm-eval has the optional fields; `directions` are those of all metrics.
    """

    primary: str
    better: str
    metrics: dict[str, Estimate]
    directions: NotRequired[dict[str, str]]
    stderr: NotRequired[dict[str, float | None]]
    intervals: NotRequired[dict[str, str]]
    notes: NotRequired[list[str]]


class StoredBenchmark(BenchmarkResults):
    """The results of a benchmark for one iterate, with the object that holds them."""

    object_id: str
    uri: str


class Training(TypedDict):
    steps: list[dict[str, float]]
    summary: dict[str, Any]


class RoundResults(TypedDict):
    """The results of one round, None if not yet available. `metrics` holds estimates over held-out rows."""

    round: int
    stages: dict[str, str]
    metrics: dict[str, Estimate] | None
    benchmarks: list[StoredBenchmark]
    pairs: dict[str, Any] | None
    training: Training | None
    margins: dict[str, Any] | None
