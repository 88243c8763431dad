"""Whether a run has reached what ends it before the round it was to reach.

Decides: what counts as a gain, and the sentence that says why a run ends. Leaves out: the conditions' fields
(`config_benchmarks.UntilConfig`), and who asks (`flows/spin.py`, before every round).

Values are compared, not intervals: a condition that waited for support would end most short runs at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spinreg_core.config import UntilConfig
from spinreg_core.errors import BadInput
from spinreg_core.metrics import METRICS


def require_metric(until: UntilConfig, benchmarks: Sequence[str] = ()) -> None:
    """Raise BadInput for a metric that no evaluation has, or of which no value is better than another.

    benchmarks: names of those that are measured in every round.
    """
    if until.metric is None:
        return
    name, slash, _ = until.metric.rpartition("/")
    if slash:
        if name not in benchmarks:
            measured = ", ".join(benchmarks) or "none is"
            raise BadInput("until.metric", until.metric, f"a benchmark that is measured in every round ({measured})")
    elif until.metric not in METRICS or METRICS[until.metric].better is None:
        known = ", ".join(name for name, metric in METRICS.items() if metric.better and "_vs_" not in name)
        raise BadInput("until.metric", until.metric, f"one of {known}, or NAME/METRIC of a benchmark")


def why_ended(until: UntilConfig, rounds: Sequence[dict[str, Any]]) -> str | None:
    """The reason why no further round is made, or None.

    rounds: those evaluated so far, the base first, as `report.report_data` has them: `round`, `metrics` {name:
    Estimate}, `benchmarks` [{"name", "better", "metrics"}].
    """
    done = [entry for entry in rounds if entry["metrics"]]
    if until.kl_base_above is not None and done:
        kl = done[-1]["metrics"]["kl_base"]["value"]
        if kl > until.kl_base_above:
            return (f"the KL to the base is {kl:.4g} nats/answer after round {done[-1]['round']}, above "
                    f"until.kl_base_above ({until.kl_base_above:g})")  # fmt: skip
    if until.metric is None or until.rounds_without_gain is None:
        return None
    values = [(entry["round"], value) for entry in done if (value := _value(until.metric, entry)) is not None]
    if not values:
        return None
    best = min(values, key=lambda pair: (pair[1], pair[0]))[0]
    since = values[-1][0] - best
    if since < until.rounds_without_gain:
        return None
    return (f"no round after {best or 'the base'} was better in {until.metric}, for {since} rounds "
            f"(until.rounds_without_gain: {until.rounds_without_gain})")  # fmt: skip


def _value(metric: str, entry: dict[str, Any]) -> float | None:
    """The metric's value in a round, with the sign that makes less better; None where it was not measured."""
    name, slash, inner = metric.rpartition("/")
    if not slash:
        found = entry["metrics"].get(metric)
        return None if found is None else found["value"] * (1 if METRICS[metric].better == "lower" else -1)
    for part in entry.get("benchmarks") or ():
        if part["name"] == name and inner in part["metrics"]:
            value: float = part["metrics"][inner]["value"]
            return value if part.get("better") == "lower" else -value
    return None
