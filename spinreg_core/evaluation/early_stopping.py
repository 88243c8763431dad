"""Whether a run has reached what ends it before the round it was to reach.

Decides: what counts as a gain, and the sentence that says why a run ends. Leaves out: the conditions' fields
(`config_benchmarks.UntilConfig`), and who asks (`flows/spin.py`, before every round).

Values are compared, not intervals: a condition that waited for support would end most short runs at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spinreg_core.config import RunConfig, UntilConfig
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.metrics import METRICS


def require_metric(config: RunConfig) -> None:
    """Raise BadInput for a metric of `until` that no evaluation has, or of which no value is better than another.

    Neither can one against the previous iterate say that a run stands still: it is held against another policy in
    every round. Whether a benchmark has such a metric is known when it is measured (`why_ended`).
    """
    metric = config.until.metric
    if metric is None:
        return
    if "/" in metric:
        names = _benchmarks(config)
        if not any(metric.startswith(f"{name}/") for name in names):
            measured = ", ".join(names) or "none is"
            raise BadInput("until.metric", metric,
                           f"a benchmark that is measured in every round, against the same ({measured})")  # fmt: skip
    elif metric not in METRICS or METRICS[metric].better is None or "_vs_" in metric:
        known = ", ".join(name for name, found in METRICS.items() if found.better and "_vs_" not in name)
        raise BadInput("until.metric", metric, f"one of {known}, or NAME/METRIC of a benchmark")


def _benchmarks(config: RunConfig) -> list[str]:
    """Names of what every round is measured with: lm-eval's tasks, mt-bench, and whom it is held against by a judge."""
    wanted = config.benchmarks
    if wanted.rounds != "all":
        return []
    judged = ["mt-bench"] if wanted.mt_bench is not None else []
    return wanted.lm_eval_tasks() + judged + [name for name in wanted.win_rate if name != "previous"]


def why_ended(until: UntilConfig, rounds: Sequence[Mapping[str, Any]]) -> str | None:
    """The reason why no further round is made, or None. Raises BadInput where the benchmark of `until.metric` is
    measured and has no such metric.

    rounds: those evaluated so far, the base first, as `report.report_data` has them: `round`, `metrics` {name:
    Estimate}, `benchmarks` [{"name", "primary", "better", "metrics"}].
    """
    done = [entry for entry in rounds if entry["metrics"]]
    if until.kl_base_above is not None and done:
        kl = done[-1]["metrics"]["kl_base"]["value"]
        if kl > until.kl_base_above:
            return (f"the KL to the base is {kl:.4g} nats/answer after round {done[-1]['round']}, above "
                    f"until.kl_base_above ({until.kl_base_above:g})")  # fmt: skip
    if until.metric is None or until.rounds_without_gain is None:
        return None
    values = _of_benchmark(until.metric, done) if "/" in until.metric else _heldout(until.metric, done)
    if not values:
        return None
    best = min(values, key=lambda pair: (pair[1], pair[0]))[0]
    since = values[-1][0] - best
    if since < until.rounds_without_gain:
        return None
    return (f"no round after {best or 'the base'} was better in {until.metric}, for {since} rounds "
            f"(until.rounds_without_gain: {until.rounds_without_gain})")  # fmt: skip


def ended_early(head: dict[str, Any]) -> str | None:
    """How a run ended before the round that it was last told to reach, as the rest of a sentence; None where it did
    not."""
    last = head["advances"][-1] if head["advances"] else {}
    return f"ended before round {last['to']}: {last['ended']}" if last.get("ended") else None


def _heldout(metric: str, done: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(round, value) where it was measured, with the sign that makes less better."""
    sign = 1 if METRICS[metric].better == "lower" else -1
    return [(entry["round"], sign * entry["metrics"][metric]["value"]) for entry in done if metric in entry["metrics"]]


def _of_benchmark(metric: str, done: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """The same of a benchmark. Raises BadInput as `why_ended`."""
    values: list[tuple[int, float]] = []
    has: dict[str, None] = {}
    for entry in done:
        for part in entry.get("benchmarks") or ():
            if not metric.startswith(f"{part['name']}/"):
                continue
            better = _directions(part)
            has |= dict.fromkeys(f"{part['name']}/{name}" for name in better)
            inner = metric.removeprefix(f"{part['name']}/")
            if inner in better:
                sign = 1 if better[inner] == "lower" else -1
                values.append((entry["round"], sign * part["metrics"][inner]["value"]))
    if has and not values:
        raise BadInput("until.metric", metric, f"a metric that the benchmark has: {', '.join(has)}")
    return values


def _directions(part: dict[str, Any]) -> dict[str, str]:
    """Which way a benchmark's metrics are better, of those of which it is known: lm-eval says it of all, others have it
    for the one that counts, also where that is of one turn, one category or one subtask."""
    said, primary = part.get("directions") or {}, part["primary"]
    same = [name for name in part["metrics"] if name == primary or primary in (name.split("/")[0], name.split("/")[-1])]
    return dict.fromkeys(same, part["better"]) | {name: said[name] for name in part["metrics"] if name in said}
