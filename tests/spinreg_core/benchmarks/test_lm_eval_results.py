"""Metrics, intervals and fingerprints from lm-eval's results."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spinreg_core.benchmarks.lm_eval_model import LoadedTasks
from spinreg_core.benchmarks.lm_eval_results import (
    BOOTSTRAP,
    NONE,
    STRATIFIED,
    WILSON,
    TaskMetrics,
    fingerprints,
    measured,
    primary_of,
)
from spinreg_core.evaluation.intervals import wilson

Values = dict[str, dict[tuple[str, str], list[Any]]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def all_of(values: list[list[bool]]) -> float:
    return mean([float(one) for value in values for one in value])


def evaluated(values: Values, aggregate: Any = mean, group: Any = None, **higher: bool) -> TaskMetrics:
    """`values`: by task and (metric, filter), what each question counts."""
    results: dict[str, Any] = {"results": {}, "samples": {}, "higher_is_better": dict.fromkeys(values, higher)}
    for task, found in values.items():
        results["results"][task] = {f"{m},{f}": aggregate(v) for (m, f), v in found.items()}
        results["results"][task] |= {f"{m}_stderr,{f}": 0.25 for m, f in found}
        filters = dict.fromkeys(f for _, f in found)
        results["samples"][task] = [
            {"doc_id": i, "filter": f, "metrics": [m for m, g in found if g == f]}
            | {m: v[i] for (m, g), v in found.items() if g == f}
            for f in filters for i in range(len(next(iter(found.values()))))
        ]  # fmt: skip
    tasks = {
        task: SimpleNamespace(task_name=task, aggregation=lambda found=found: {m: aggregate for m, _ in found})
        for task, found in values.items()
    }
    groups = {}
    if group is not None:
        means = [(mean(found["acc", "none"]), len(found["acc", "none"])) for found in values.values()]
        total = sum(n for _, n in means)
        value = sum(m * n for m, n in means) / total if group else mean([m for m, _ in means])
        results["results"]["all"] = {"acc,none": value, "acc_stderr,none": "N/A"}
        aggregated = SimpleNamespace(metric="acc", weight_by_size=group)
        groups["all"] = SimpleNamespace(
            name="all", has_aggregation=True, aggregate_metric_list=[aggregated],
            get_all_tasks=lambda: list(tasks.values()),
        )  # fmt: skip
    name = "all" if group is not None else next(iter(values))
    return measured(results, LoadedTasks(tasks, groups), name, resamples=4000, seed=3)  # type: ignore[arg-type]


def test_measured_binary_values_have_wilsons_interval() -> None:
    found = evaluated({"t": {("acc", "none"): [1.0, 0.0, 1.0, 1.0]}}, acc=True)
    assert found.metrics == {"acc": wilson(3, 4)}
    assert (found.intervals, found.stderr, found.better) == ({"acc": WILSON}, {"acc": 0.25}, {"acc": "higher"})
    assert found.items == [(f"t/{i}", "acc", value) for i, value in enumerate([1.0, 0.0, 1.0, 1.0])]


@pytest.mark.parametrize("right", [1.0, 0.0])
def test_measured_constant_group_is_as_uncertain_as_its_smallest_task(right: float) -> None:
    values: Any = {"large": {("acc", "none"): [right] * 400}, "small": {("acc", "none"): [right] * 10}}
    found = evaluated(values, group=False).metrics["acc"]
    alone = wilson(39 * right, 39)  # 2^2 / (1/400 + 1/10)
    assert (found["value"], found["n"], found["low"], found["high"]) == (right, 410, alone["low"], alone["high"])
    sized = evaluated(values, group=True).metrics["acc"]
    assert (sized["low"], sized["high"]) == (wilson(410 * right, 410)["low"], wilson(410 * right, 410)["high"])


def test_measured_numbers_have_a_bootstrap_interval() -> None:
    values = list(np.random.default_rng(0).random(200))
    found = evaluated({"t": {("acc", "none"): values}})
    estimate, error = found.metrics["acc"], np.std(values) / np.sqrt(200)
    assert estimate["value"] == mean(values)
    assert estimate["low"] == pytest.approx(mean(values) - 1.96 * error, abs=0.3 * error)
    assert estimate["high"] == pytest.approx(mean(values) + 1.96 * error, abs=0.3 * error)
    assert found.intervals["acc"] == BOOTSTRAP
    assert evaluated({"t": {("acc", "none"): values}}).metrics == found.metrics


def test_measured_corpus_metric_is_resampled_whole() -> None:
    """As IFEval's share of instructions: questions have several."""
    values = [[True] * (i % 3 + 1) if i % 2 else [False, True] for i in range(60)]
    found = evaluated({"t": {("inst_level_acc", "none"): values}}, all_of)
    estimate = found.metrics["inst_level_acc"]
    assert estimate["low"] is not None
    assert estimate["low"] < estimate["value"] == all_of(values) < (estimate["high"] or 0)
    assert (estimate["n"], found.intervals["inst_level_acc"], found.items) == (60, BOOTSTRAP, [])


def test_measured_metric_that_is_no_mean_has_no_items() -> None:
    """A perplexity's questions count log-likelihoods: of those the higher is the better."""
    logs = [-2.0, -3.0, -1.5]
    perplexity = evaluated(
        {"t": {("perplexity", "none"): logs}}, lambda v: float(np.exp(-np.mean(v))), perplexity=False
    )
    assert perplexity.metrics["perplexity"]["value"] == pytest.approx(np.exp(6.5 / 3))
    assert (perplexity.better["perplexity"], perplexity.items) == ("lower", [])
    parts: Values = {"a": {("acc", "none"): [1.0] * 2}, "b": {("acc", "none"): [0.0] * 8}}
    assert evaluated(parts, group=False).metrics["acc"]["value"] == 0.5, "two questions in ten are right"
    assert evaluated(parts, group=False).items == []
    assert len(evaluated(parts, group=True).items) == 10


def test_measured_first_filter_has_the_plain_name() -> None:
    values = {("exact_match", "strict"): [0.0, 0.0, 1.0], ("exact_match", "flexible"): [1.0, 0.0, 1.0]}
    found = evaluated({"t": values})
    assert list(found.metrics) == ["exact_match", "exact_match,flexible"]
    assert primary_of(found, "t") == "exact_match"


def test_primary_of_leaderboard_task_is_its_metric() -> None:
    values = {("acc", "none"): [0.0, 1.0], ("acc_norm", "none"): [1.0, 1.0]}
    assert primary_of(evaluated({"arc_challenge": values}), "arc_challenge") == "acc_norm"
    assert primary_of(evaluated({"arc_easy": values}), "arc_easy") == "acc"


def test_measured_group_of_equal_questions_is_one_sample() -> None:
    parts: Values = {"a": {("acc", "none"): [1.0, 0.0, 0.0]}, "b": {("acc", "none"): [1.0] * 5}}
    found = evaluated(parts, group=True)
    assert found.metrics["acc"] == wilson(6, 8)
    assert list(found.metrics) == ["acc", "a/acc", "b/acc"]
    assert mean([value for _, metric, value in found.items if metric == "acc"]) == 6 / 8
    assert len(found.items) == 8
    assert found.stderr["acc"] is None


def test_measured_group_of_equal_subtasks_is_resampled_within_each() -> None:
    rng = np.random.default_rng(1)
    parts: Values = {"a": {("acc", "none"): [1.0] * 50}, "b": {("acc", "none"): list(map(float, rng.random(80) < 0.5))}}
    found = evaluated(parts, group=False)
    value = (1 + mean(parts["b"]["acc", "none"])) / 2
    estimate = found.metrics["acc"]
    assert estimate["value"] == value
    width = 1.96 * np.std(parts["b"]["acc", "none"]) / np.sqrt(80) / 2  # `a` does not vary
    assert estimate["low"] == pytest.approx(value - width, abs=0.3 * width)
    assert found.intervals["acc"] == STRATIFIED
    alone = evaluated({"a": {("acc", "none"): [1.0]}, "b": {("acc", "none"): [0.0, 1.0]}}, group=False)
    assert (alone.metrics["acc"]["low"], alone.intervals["acc"]) == (None, NONE)


def test_measured_nan_metric_is_left_out() -> None:
    found = evaluated({"t": {("f1", "none"): [float("nan"), 1.0], ("acc", "none"): [1.0, 1.0]}})
    assert list(found.metrics) == ["acc"]
    json.dumps(found.metrics, allow_nan=False)


def sample(doc: int, text: str = "q", document: str = "d") -> dict[str, Any]:
    return {"doc_id": doc, "doc_hash": f"{document}{doc}", "arguments": [(f"{text}{doc}", " a")]}


def test_fingerprints_of_other_questions_differ() -> None:
    one = fingerprints({"t": [sample(0), sample(1)]})
    assert fingerprints({"t": [sample(1), sample(0), sample(1)]}) == one  # in another order, with another filter
    asked = fingerprints({"t": [sample(0, "other"), sample(1)]})
    assert asked["data"] == one["data"]
    assert asked["prompts"] != one["prompts"]
    assert fingerprints({"t": [sample(0, document="e"), sample(1)]})["data"] != one["data"]
    assert fingerprints({"t": [sample(0)]})["data"] != one["data"]
