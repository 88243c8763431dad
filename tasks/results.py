"""Results of the stage tasks: the small JSON documents that Prefect shows and flows read."""

from __future__ import annotations

from typing import Any, TypedDict


class StageResult(TypedDict):
    """Result of a stage of a round. `uri`: the object; `seconds`: of the attempt that finished the stage."""

    stage: str
    round: int
    uri: str
    fingerprint: str
    metrics: dict[str, Any]
    seconds: float
    reused: bool


class PreparedResult(TypedDict):
    """Result of `prepare`: two object ids, and the counts of rows."""

    base: str
    data: str
    summary: dict[str, Any]
    reused: bool


class BenchmarkResult(TypedDict):
    """Result of `benchmark`: URIs and metrics by the name of the benchmark."""

    stage: str
    round: int
    uris: dict[str, str]
    metrics: dict[str, dict[str, Any]]
    seconds: float
    reused: bool


class CheckResult(TypedDict):
    """Result of `check-benchmarks`: {"documents", "fewshot"} by task of lm-eval."""

    tasks: dict[str, Any]
    reused: bool
