"""Early stopping: the conditions that end a run before its last round.

Decides: what counts as a gain, and the sentence that says why a run ended. Leaves out: the fields of the conditions
(`UntilConfig` in `config.benchmarks`), and when they are checked (`runs.loop`).

Values are compared, not intervals: a condition that waited for statistical support would end most short runs at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spinreg_core.config import RunConfig, UntilConfig
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.metrics import METRICS
from spinreg_core.evaluation.schema import BenchmarkResults, RoundResults


def require_metric(config: RunConfig) -> None:
    """Raise BadInput where `until.metric` can never end a run.

    It must be a metric of every evaluation with a better direction. Metrics against the previous iterate do not
    qualify: they compare with another policy in every round. The metrics of a benchmark are known only when it was
    measured (`why_ended`).
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
    elif metric not in METRICS or METRICS[metric]["better"] is None or "_vs_" in metric:
        known = ", ".join(name for name, found in METRICS.items() if found["better"] and "_vs_" not in name)
        raise BadInput("until.metric", metric, f"one of {known}, or NAME/METRIC of a benchmark")


def _benchmarks(config: RunConfig) -> list[str]:
    """Return the names of the benchmarks that measure every round in the same way."""
    wanted = config.benchmarks
    if wanted.rounds != "all":
        return []
    judged = ["mt-bench"] if wanted.mt_bench is not None else []
    return wanted.lm_eval_tasks() + judged + [name for name in wanted.win_rate if name != "previous"]


def why_ended(until: UntilConfig, rounds: Sequence[RoundResults]) -> str | None:
    """Return the reason to make no further round, or None.

    rounds: the rounds so far, the base first. Raises BadInput where the benchmark of `until.metric` was measured and
    has no such metric.
    """
    heldout = {entry["round"]: metrics for entry in rounds if (metrics := entry["metrics"])}
    if until.kl_base_above is not None and heldout:
        last = max(heldout)
        kl = heldout[last]["kl_base"]["value"]
        if kl > until.kl_base_above:
            return (f"the KL to the base is {kl:.4g} nats/answer after round {last}, above "
                    f"until.kl_base_above ({until.kl_base_above:g})")  # fmt: skip
    if until.metric is None or until.rounds_without_gain is None:
        return None
    values = _of_benchmark(until.metric, rounds) if "/" in until.metric else _heldout(until.metric, heldout)
    if not values:
        return None
    best = min(values, key=lambda pair: (pair[1], pair[0]))[0]
    since = values[-1][0] - best
    if since < until.rounds_without_gain:
        return None
    return (f"no round after {best or 'the base'} was better in {until.metric}, for {since} rounds "
            f"(until.rounds_without_gain: {until.rounds_without_gain})")  # fmt: skip


def _heldout(metric: str, rounds: Mapping[int, Mapping[str, Estimate]]) -> list[tuple[int, float]]:
    """Return (round, value) of the rounds that have the metric; the sign makes lower values better."""
    sign = 1 if METRICS[metric]["better"] == "lower" else -1
    return [(number, sign * metrics[metric]["value"]) for number, metrics in rounds.items() if metric in metrics]


def _of_benchmark(metric: str, rounds: Sequence[RoundResults]) -> list[tuple[int, float]]:
    """Return the same for a metric of a benchmark. Raises BadInput as `why_ended`."""
    values: list[tuple[int, float]] = []
    has: dict[str, None] = {}
    for entry in rounds:
        for part in entry["benchmarks"]:
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


def _directions(part: BenchmarkResults) -> dict[str, str]:
    """Return the better direction of each metric for which it is known.

    The direction of the primary metric also holds where it is measured on one turn, one category or one subtask.
    """
    said, primary = part.get("directions", {}), part["primary"]
    same = [name for name in part["metrics"] if name == primary or primary in (name.split("/")[0], name.split("/")[-1])]
    return dict.fromkeys(same, part["better"]) | {name: said[name] for name in part["metrics"] if name in said}
