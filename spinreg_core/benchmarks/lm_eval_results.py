"""Metrics and intervals from lm-eval's results, and the files with its own output.

Decides: the names of metrics, the primary metric (the Leaderboard's, else the task's first), and the intervals. Values
are lm-eval's own numbers. Leaves out: evaluating (`lm_eval_model`).

Metrics have lm-eval's names, without the filter where it is the task's first one (`exact_match` of gsm8k is its
strict-match), else with it (`exact_match,flexible-extract`). The name of a subtask or subgroup is a prefix:
`mmlu_anatomy/acc`.

Intervals are over questions. Wilson's is used where each question counts 0 or 1. A group whose questions all have the
same weight is one sample. Everything else has a percentile bootstrap, for a group within each subtask. Metrics that are
too expensive to resample (bleu, chrf, ter), and groups with a subtask of one question, have no interval.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from spinreg_core.benchmarks.lm_eval_model import EvalResults, EvalSample, LoadedTasks
from spinreg_core.benchmarks.results import Item
from spinreg_core.evaluation.intervals import (
    Estimate,
    Floats,
    bootstrap_mean,
    percentile_estimate,
    wilson,
    without_interval,
)

# The Leaderboard's metrics of tasks for which it is not lm-eval's first.
PRIMARY = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm"}
_COSTLY = ("bleu", "chrf", "ter")
WILSON, BOOTSTRAP = "Wilson", "bootstrap over questions"
STRATIFIED, NONE = "bootstrap over the questions of each subtask", "none"
Values = dict[tuple[str, str], dict[int, object]]  # by (metric, filter): the value of each question, by its index


@dataclass
class TaskMetrics:
    """Metrics by name. `stderr` is lm-eval's own standard error; `intervals` names the methods of the intervals."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    stderr: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, str] = field(default_factory=dict)
    better: dict[str, str] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)

    def add(self, name: str, estimate: Estimate, how: str, stderr: object, higher: bool | None) -> None:
        if not math.isfinite(estimate["value"]):  # lm_eval.json has it
            print(f"{name} is not a number for this policy, and is left out", flush=True)
            return
        if estimate["low"] is None:
            how = NONE
        self.metrics[name], self.intervals[name] = estimate, how
        self.stderr[name] = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        self.better[name] = "lower" if higher is False else "higher"

    def add_items(self, name: str, value: float, items: Mapping[str, object]) -> None:
        """Add the questions' values where the metric is their mean.

        A perplexity is not, nor is a group whose subtasks have equal weights: there, the mean over questions may even
        differ in the other direction.
        """
        numbers = {item: float(one) for item, one in items.items() if _is_number(one)}
        if not numbers or len(numbers) < len(items):
            return
        if math.isclose(np.mean([*numbers.values()]), value, rel_tol=1e-9, abs_tol=1e-9):
            self.items += [(item, name, one) for item, one in numbers.items()]


def measured(results: EvalResults, loaded: LoadedTasks, name: str, *, resamples: int, seed: int) -> TaskMetrics:
    """Return all metrics of a task or a group. loaded: the tasks and groups that were evaluated."""
    found = TaskMetrics()
    values = {task: _values(samples) for task, samples in results["samples"].items()}
    groups = sorted(loaded.groups.values(), key=lambda group: group.name != name)  # the requested group first
    for group in groups:
        _group(found, results, group, name, values, resamples, seed)
    for task_name, task in loaded.tasks.items():
        numbers, prefix = results["results"][task_name], "" if task_name == name else f"{task_name}/"
        filters = list(dict.fromkeys(filter_name for _, filter_name in values[task_name]))
        for (metric, filter_name), by_doc in values[task_name].items():
            label = prefix + metric + ("" if filter_name == filters[0] else f",{filter_name}")
            value = numbers[f"{metric},{filter_name}"]
            aggregate = task.aggregation().get(metric)
            estimate, how = _estimate(value, list(by_doc.values()), metric, aggregate, resamples, seed)
            higher = results["higher_is_better"].get(task_name, {}).get(metric)
            found.add(label, estimate, how, numbers.get(f"{metric}_stderr,{filter_name}"), higher)
            if not any(group.has_aggregation for group in groups):
                found.add_items(label, value, {f"{task_name}/{doc}": one for doc, one in by_doc.items()})
    return found


def _values(samples: Sequence[EvalSample]) -> Values:
    found: Values = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]  # type: ignore[literal-required]
            found.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = value
    return found


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(value)


def _estimate(
    value: float, values: Sequence[object], metric: str, aggregate: Callable[..., Any] | None, resamples: int, seed: int
) -> tuple[Estimate, str]:
    n = len(values)
    numbers = np.array([float(one) for one in values if _is_number(one)])
    if len(numbers) == n:
        unit = "share" if numbers.min() >= 0 and numbers.max() <= 1 else ""
        if math.isclose(numbers.mean(), value, rel_tol=1e-9, abs_tol=1e-12):
            if set(numbers) <= {0.0, 1.0}:
                return _with_value(wilson(float(numbers.sum()), n), value), WILSON
            return _with_value(bootstrap_mean(numbers, unit, resamples=resamples, seed=seed), value), BOOTSTRAP
    unit = "share" if metric.endswith("acc") or metric in ("f1", "mcc", "exact_match") else ""
    plain = without_interval(value, n, unit)
    if aggregate is None or metric in _COSTLY or n < 2:
        return plain, NONE
    rng = np.random.default_rng(seed)
    try:
        draws = [float(aggregate([values[i] for i in rng.integers(0, n, n)])) for _ in range(resamples)]
    except (ValueError, ArithmeticError):  # the metric is not defined for some draws
        return plain, NONE
    found = percentile_estimate(value, draws, n, unit)
    bounded = all(bound is not None and math.isfinite(bound) for bound in (found["low"], found["high"]))
    return (found, BOOTSTRAP) if bounded else (plain, NONE)


def _with_value(estimate: Estimate, value: float) -> Estimate:
    """Set the value to lm-eval's: it sums in another order, which changes the last digit."""
    estimate["value"] = float(value)
    return estimate


def _group(
    found: TaskMetrics,
    results: EvalResults,
    group: Any,
    name: str,
    values: Mapping[str, Values],
    resamples: int,
    seed: int,
) -> None:
    """Add the metrics that lm-eval aggregates over a group's subtasks."""
    if not group.has_aggregation:
        return
    numbers, tasks = results["results"][group.name], [task.task_name for task in group.get_all_tasks()]
    prefix = "" if group.name == name else f"{group.name}/"
    for aggregated in group.aggregate_metric_list:
        metric = aggregated.metric
        keys = [key for key in numbers if key.startswith(f"{metric},")]
        for i, key in enumerate(keys):
            filter_name = key.partition(",")[2]
            by_task = {
                task: values[task][metric, filter_name] for task in tasks if (metric, filter_name) in values[task]
            }
            strata = [np.array([*by_doc.values()], np.float64) for by_doc in by_task.values()]
            estimate, how = _pooled(numbers[key], strata, aggregated.weight_by_size, resamples, seed)
            label = metric if i == 0 else f"{metric},{filter_name}"
            higher = [results["higher_is_better"].get(task, {}).get(metric) for task in by_task]
            better = None if None in higher or len(set(higher)) > 1 else higher[0]
            found.add(prefix + label, estimate, how, numbers.get(f"{metric}_stderr,{filter_name}"), better)
            if not prefix:
                found.add_items(
                    label,
                    numbers[key],
                    {f"{task}/{doc}": one for task in by_task for doc, one in by_task[task].items()},
                )


def _pooled(
    value: float, strata: Sequence[Floats], weigh_by_size: bool, resamples: int, seed: int
) -> tuple[Estimate, str]:
    n = sum(map(len, strata))
    everything = np.concatenate(strata)
    if weigh_by_size and set(everything) <= {0.0, 1.0}:
        return _with_value(wilson(float(everything.sum()), n), value), WILSON
    if set(everything) in ({0.0}, {1.0}):
        # Resampling cannot vary it. Wilson's interval of the effective sample size, by the variance of the mean.
        effective = max(1, round(len(strata) ** 2 / sum(1 / len(numbers) for numbers in strata)))
        return _with_value(wilson(float(everything[0]) * effective, effective), value) | {"n": n}, WILSON
    unit = "share" if everything.min() >= 0 and everything.max() <= 1 else ""
    if min(map(len, strata)) < 2:
        return without_interval(value, n, unit), NONE
    rng = np.random.default_rng(seed)
    draws = np.zeros(resamples)
    for numbers in strata:
        weight = len(numbers) / n if weigh_by_size else 1 / len(strata)
        draws += weight * np.array(
            [numbers[rng.integers(0, len(numbers), len(numbers))].mean() for _ in range(resamples)]
        )
    return percentile_estimate(value, draws, n, unit), STRATIFIED


def primary_of(found: TaskMetrics, name: str) -> str:
    """Return the primary metric. Raises ValueError where the task has no metric."""
    if not found.metrics:
        raise ValueError(f"{name} has no metric that is a number")
    wanted = PRIMARY.get(name)
    return wanted if wanted in found.metrics else next(iter(found.metrics))


def fingerprints(samples: Mapping[str, Sequence[EvalSample]]) -> dict[str, str]:
    """Return the SHA-256 of the questions: `data` of their documents, `prompts` of all requests about them."""
    data, prompts = hashlib.sha256(), hashlib.sha256()
    for task in sorted(samples):
        seen = set()
        for sample in sorted(samples[task], key=lambda sample: sample["doc_id"]):
            if sample["doc_id"] in seen:  # the same question with another filter
                continue
            seen.add(sample["doc_id"])
            data.update(f"{task}\0{sample['doc_id']}\0{sample['doc_hash']}\n".encode())
            text = json.dumps(sample["arguments"], sort_keys=True, default=str, ensure_ascii=False)
            prompts.update(f"{task}\0{sample['doc_id']}\0{text}\n".encode())
    return {"data": data.hexdigest(), "prompts": prompts.hexdigest()}


def write_own(folder: Path, results: EvalResults) -> None:
    """Write lm-eval's output: `samples.jsonl.gz`, a line per question and filter, and `lm_eval.json` with the rest."""
    from lm_eval.utils import handle_non_serializable

    folder.mkdir(parents=True, exist_ok=True)
    # Without a name and a time in its header, so that equal samples give equal files.
    with (
        open(folder / "samples.jsonl.gz", "wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as file,
    ):
        for task, samples in results["samples"].items():
            for sample in samples:
                line = {"task": task, **sample}
                file.write(json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n")
    rest = {name: value for name, value in results.items() if name not in ("samples", "pretty_env_info")}
    text = json.dumps(rest, indent=1, default=handle_non_serializable, ensure_ascii=False)
    (folder / "lm_eval.json").write_text(text, encoding="utf-8")
