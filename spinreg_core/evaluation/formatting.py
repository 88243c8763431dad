"""Metrics as text: numbers with their intervals, labels, and arrows for the better direction."""

from __future__ import annotations

import math
from collections.abc import Iterable

from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.evaluation.metrics import GAME, METRICS, PRIMARY

ARROWS = {"lower": "↓", "higher": "↑", None: ""}


def _decimals(estimate: Estimate) -> int:
    """Return the decimals that give half the interval's width two significant digits; 3 without an interval."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None or _same(low, high):
        return 3
    return max(0, min(6, 1 - math.floor(math.log10((high - low) / 2))))


def _same(low: float, high: float) -> bool:
    """Return whether an interval has no width but that of rounding."""
    return math.isclose(low, high, rel_tol=1e-9)


def format_number(value: float, estimate: Estimate) -> str:
    """Return a number with decimals that fit the estimate's interval; never `-0.00`."""
    text = f"{value:.{_decimals(estimate)}f}"
    return text.lstrip("-") if float(text) == 0 else text


def format_estimate(estimate: Estimate | None) -> str:
    """Return `1.236 [1.201, 1.261]`; only the value without an interval; an empty text for None."""
    if estimate is None:
        return ""
    value = format_number(estimate["value"], estimate)
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None or _same(low, high):
        return value
    return f"{value} [{format_number(low, estimate)}, {format_number(high, estimate)}]"


def counts(estimates: Iterable[Estimate | None]) -> str:
    """Return `n 64`, the number of rows or questions; several numbers where estimates differ."""
    return f"n {', '.join(map(str, sorted({one['n'] for one in estimates if one is not None})))}"


def label(name: str, n: str | None = None) -> str:
    """Return `held-out NLL * ↓ (nats/token, n 64)`; the star marks the primary metric. n: from `counts`."""
    metric = METRICS.get(name) or GAME.get(name)
    if metric is None:
        return name.replace("_", " ")
    star, arrow = " *" if name == PRIMARY else "", f" {ARROWS[metric['better']]}".rstrip()
    return f"{metric['label']}{star}{arrow} ({', '.join(filter(None, [metric['unit'], n]))})"
