"""From lm-eval's results to what every part of a benchmark leaves (`results.py`), and what lm-eval said itself.

Decides: the names of metrics, which one counts (the Leaderboard's, else the task's first), and their intervals. Values
are lm-eval's own numbers. Leaves out: evaluating (`lm_eval_model.py`).

A metric is named as by lm-eval, without the filter where it is the task's first one (`exact_match` of gsm8k is its
strict-match), else with it (`exact_match,flexible-extract`). Those of a group's subtasks and subgroups have their names
in front: `mmlu_anatomy/acc`.

Intervals are over questions: Wilson's where each question counts 0 or 1, also for a group whose questions all weigh the
same, which are then taken as one sample; else percentile bootstrap, for a group within each subtask. Metrics that no
resampling makes cheap (bleu, chrf, ter), and groups with a subtask of one question, have none.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spinreg_core.evaluation.intervals import Estimate, bootstrap_mean, wilson

PRIMARY = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm"}  # of the Leaderboard, where it is not the first
_COSTLY = ("bleu", "chrf", "ter")
WILSON, BOOTSTRAP = "Wilson", "bootstrap over questions"
STRATIFIED, NONE = "bootstrap over the questions of each subtask", "none"


@dataclass
class Measured:
    """Metrics by their names. `stderr` is lm-eval's own standard error; `intervals` says how they were computed."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    stderr: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, str] = field(default_factory=dict)
    better: dict[str, str] = field(default_factory=dict)
    items: list[tuple[str, str, float]] = field(default_factory=list)

    def add(self, name: str, estimate: Estimate, how: str, stderr: Any, higher: Any) -> None:
        if not math.isfinite(estimate["value"]):  # it is in lm_eval.json
            print(f"{name} is not a number for this policy, and left out", flush=True)
            return
        if estimate["low"] is None:
            how = NONE
        self.metrics[name], self.intervals[name] = estimate, how
        self.stderr[name] = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        self.better[name] = "lower" if higher is False else "higher"

    def add_items(self, name: str, value: float, items: dict[str, Any]) -> None:
        """What each question counts, where the metric is the mean of that. (A perplexity is not, nor is a group whose
        subtasks weigh the same: means over their questions may even differ the other way round.)"""
        if items and all(map(_is_number, items.values())):
            numbers = {item: float(one) for item, one in items.items()}
            if math.isclose(np.mean([*numbers.values()]), value, rel_tol=1e-9, abs_tol=1e-9):
                self.items += [(item, name, one) for item, one in numbers.items()]


def measured(results: dict[str, Any], loaded: dict[str, Any], name: str, *, resamples: int, seed: int) -> Measured:
    """All metrics of a task or a group. `loaded`: the tasks and groups that were evaluated (`harness.load_task`)."""
    found = Measured()
    values = {task: _values(samples) for task, samples in results["samples"].items()}
    groups = sorted(loaded["groups"].values(), key=lambda group: group.name != name)  # the one that was asked for first
    for group in groups:
        _group(found, results, group, name, values, resamples, seed)
    for task_name, task in loaded["tasks"].items():
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


def _values(samples: list[dict[str, Any]]) -> dict[tuple[str, str], dict[int, Any]]:
    """What each question counts, by its index, of every (metric, filter)."""
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(value)


def _estimate(
    value: float, values: Sequence[Any], metric: str, aggregate: Callable[..., Any] | None, resamples: int, seed: int
) -> tuple[Estimate, str]:
    n = len(values)
    plain = {"value": float(value), "low": None, "high": None, "n": n}
    if all(_is_number(one) for one in values):
        numbers = np.array([float(one) for one in values])
        unit = "share" if numbers.min() >= 0 and numbers.max() <= 1 else ""
        if math.isclose(numbers.mean(), value, rel_tol=1e-9, abs_tol=1e-12):
            if set(numbers) <= {0.0, 1.0}:
                return _with_value(wilson(float(numbers.sum()), n), value), WILSON
            return _with_value(bootstrap_mean(numbers, unit, resamples=resamples, seed=seed), value), BOOTSTRAP
    unit = "share" if metric.endswith("acc") or metric in ("f1", "mcc", "exact_match") else ""
    if aggregate is None or metric in _COSTLY or n < 2:
        return Estimate(**plain, unit=unit), NONE  # type: ignore[typeddict-item]
    rng = np.random.default_rng(seed)
    try:
        draws = [float(aggregate([values[i] for i in rng.integers(0, n, n)])) for _ in range(resamples)]
    except (ValueError, ZeroDivisionError, ArithmeticError):  # not defined for some of them
        return Estimate(**plain, unit=unit), NONE  # type: ignore[typeddict-item]
    low, high = (float(bound) for bound in np.quantile(draws, (0.025, 0.975)))
    if not math.isfinite(low + high):
        return Estimate(**plain, unit=unit), NONE  # type: ignore[typeddict-item]
    return {"value": float(value), "low": low, "high": high, "n": n, "unit": unit}, BOOTSTRAP


def _with_value(estimate: Estimate, value: float) -> Estimate:
    """The same with lm-eval's number to its last digit: it adds up in another order."""
    estimate["value"] = float(value)
    return estimate


def _group(
    found: Measured,
    results: dict[str, Any],
    group: Any,
    name: str,
    values: dict[str, dict[tuple[str, str], dict[int, Any]]],
    resamples: int,
    seed: int,
) -> None:
    """The metrics that a group has of its subtasks."""
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
            strata = [np.array([float(one) for one in by_doc.values()]) for by_doc in by_task.values()]
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


def _pooled(value: float, strata: list[Any], weigh_by_size: bool, resamples: int, seed: int) -> tuple[Estimate, str]:
    n = sum(map(len, strata))
    everything = np.concatenate(strata)
    if weigh_by_size and set(everything) <= {0.0, 1.0}:
        return _with_value(wilson(float(everything.sum()), n), value), WILSON
    if set(everything) in ({0.0}, {1.0}):  # which no resampling moves
        # As many questions as one sample would have whose mean varies as this one's does.
        effective = max(1, round(len(strata) ** 2 / sum(1 / len(numbers) for numbers in strata)))
        return _with_value(wilson(float(everything[0]) * effective, effective), value) | {"n": n}, WILSON
    unit = "share" if everything.min() >= 0 and everything.max() <= 1 else ""
    if min(map(len, strata)) < 2:
        return {"value": float(value), "low": None, "high": None, "n": n, "unit": unit}, NONE
    rng = np.random.default_rng(seed)
    draws = np.zeros(resamples)
    for numbers in strata:
        weight = len(numbers) / n if weigh_by_size else 1 / len(strata)
        draws += weight * np.array(
            [numbers[rng.integers(0, len(numbers), len(numbers))].mean() for _ in range(resamples)]
        )
    low, high = (float(bound) for bound in np.quantile(draws, (0.025, 0.975)))
    return {"value": float(value), "low": low, "high": high, "n": n, "unit": unit}, STRATIFIED


def primary_of(found: Measured, name: str) -> str:
    """The metric that counts. Raises ValueError where the task has none at all."""
    if not found.metrics:
        raise ValueError(f"{name} has no metric that is a number")
    wanted = PRIMARY.get(name)
    return wanted if wanted in found.metrics else next(iter(found.metrics))


def fingerprints(samples: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """SHA-256 of the questions as they were asked: `data` of their documents, `prompts` of all requests about them."""
    data, prompts = hashlib.sha256(), hashlib.sha256()
    for task in sorted(samples):
        seen = set()
        for sample in sorted(samples[task], key=lambda sample: sample["doc_id"]):
            if sample["doc_id"] in seen:  # once more for another filter
                continue
            seen.add(sample["doc_id"])
            data.update(f"{task}\0{sample['doc_id']}\0{sample['doc_hash']}\n".encode())
            text = json.dumps(sample["arguments"], sort_keys=True, default=str, ensure_ascii=False)
            prompts.update(f"{task}\0{sample['doc_id']}\0{text}\n".encode())
    return {"data": data.hexdigest(), "prompts": prompts.hexdigest()}


def write_own(folder: Path, results: dict[str, Any]) -> None:
    """What lm-eval said: `samples.jsonl.gz`, a line for each question and filter, and `lm_eval.json`, all the rest."""
    from lm_eval.utils import handle_non_serializable

    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "samples.jsonl.gz", "wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as file,
    ):
        for task, samples in results["samples"].items():
            for sample in samples:
                line = {"task": task} | sample
                file.write(json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n")
    rest = {name: value for name, value in results.items() if name not in ("samples", "pretty_env_info")}
    text = json.dumps(rest, indent=1, default=handle_non_serializable, ensure_ascii=False)
    (folder / "lm_eval.json").write_text(text, encoding="utf-8")
