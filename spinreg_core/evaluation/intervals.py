"""Estimates with 95 % intervals: bootstrap for means, ratios and correlations, Wilson for shares.

Leaves out: paired differences between runs (`paired.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal
_CELLS = 4_000_000  # resampled values held at once (32 MB)


class Estimate(TypedDict):
    """A value and its 95 % interval from `n` observations; low and high are None where n < 2."""

    value: float
    low: float | None
    high: float | None
    n: int
    unit: str


def _interval(draws: Floats) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def bootstrap_ratio(
    numerator: Sequence[float] | Floats,
    denominator: Sequence[float] | Floats,
    unit: str,
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """sum(numerator) / sum(denominator) over rows, with the percentile bootstrap interval over rows.

    Each resample draws n rows with replacement and forms the ratio anew, so a row's numerator and
    denominator stay together. Both arguments have shape [rows]; denominators are positive.
    A mean is the case of all denominators 1; a paired difference is the case where the numerator is the
    rows' difference.

    Raises:
        ValueError: no rows, or shapes that differ.
    """
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.asarray(denominator, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 1 or top.size == 0:
        raise ValueError(f"need two non-empty vectors of one length, found shapes {top.shape} and {bottom.shape}")
    n = top.size
    value = float(top.sum() / bottom.sum())
    if n < 2:
        return {"value": value, "low": None, "high": None, "n": n, "unit": unit}
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        rows = rng.integers(0, n, size=(min(step, resamples - start), n))
        draws[start : start + len(rows)] = top[rows].sum(axis=1) / bottom[rows].sum(axis=1)
    low, high = _interval(draws)
    return {"value": value, "low": low, "high": high, "n": n, "unit": unit}


def bootstrap_mean(values: Sequence[float] | Floats, unit: str, *, resamples: int, seed: int) -> Estimate:
    """Mean over rows with its percentile bootstrap interval. Raises ValueError for no rows."""
    values = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(values, np.ones_like(values), unit, resamples=resamples, seed=seed)


def bootstrap_correlation(
    left: Sequence[float] | Floats, right: Sequence[float] | Floats, *, resamples: int, seed: int
) -> Estimate | None:
    """Pearson's correlation over rows with its percentile bootstrap interval; None where one side does not vary.

    Resamples in which a side does not vary are left out of the interval. Raises ValueError for shapes that differ.
    """
    x, y = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"need two vectors of one length, found shapes {x.shape} and {y.shape}")
    value = _correlations(x[None], y[None])
    if not value.size:
        return None
    rng, draws = np.random.default_rng(seed), []
    step = max(1, _CELLS // x.size)
    for start in range(0, resamples, step):
        rows = rng.integers(0, x.size, size=(min(step, resamples - start), x.size))
        draws.append(_correlations(x[rows], y[rows]))
    low, high = _interval(np.concatenate(draws))
    return {"value": float(value[0]), "low": low, "high": high, "n": x.size, "unit": "correlation"}


def _correlations(x: Floats, y: Floats) -> Floats:
    """Of each row of two tables, those left out where a side does not vary."""
    varied = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    x, y = (table[varied] - table[varied].mean(axis=1, keepdims=True) for table in (x, y))
    found: Floats = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return found


def wilson(successes: float, n: int) -> Estimate:
    """Share successes / n with Wilson's score interval (Wilson 1927), which stays inside [0, 1].

    Half successes (ties) are allowed; they vary less than a coin, so the interval is then a little wide.

    Raises:
        ValueError: n < 1, or successes outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, found {successes} of {n}")
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n the bound is exactly 0 or 1; rounding must not push it past the value.
    low, high = min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)
    return {"value": share, "low": low, "high": high, "n": n, "unit": "share"}


def grouped_share(
    successes: Sequence[float] | Floats, counts: Sequence[float] | Floats, *, resamples: int, seed: int
) -> Estimate:
    """sum(successes) / sum(counts), a share of things that come in groups, such as the verdicts on one prompt, which
    are alike: the bootstrap interval over groups [groups]. Where all groups have the same share, which no resampling
    moves, Wilson's as if each group were one observation. n counts the things. Groups without any are left out.

    Raises:
        ValueError: nothing in any group.
    """
    top, bottom = np.asarray(successes, np.float64), np.asarray(counts, np.float64)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    found = bootstrap_ratio(top, bottom, "share", resamples=resamples, seed=seed)
    if np.ptp(top / bottom) == 0:
        found = wilson(found["value"] * len(bottom), len(bottom))
    found["n"] = int(bottom.sum())
    return found


def count_wins(left: Sequence[float] | Floats, right: Sequence[float] | Floats, within: float = 0.0) -> float:
    """Number of pairs with left > right; values that differ by no more than `within` count half."""
    difference = np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64)
    return float(np.sum(difference > within) + 0.5 * np.sum(np.abs(difference) <= within))
