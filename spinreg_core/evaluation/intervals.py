"""Estimates with 95 % intervals: Student and Hall for means and ratios, Wilson for shares, bootstrap for the rest.

Leaves out: paired differences between runs (`evaluation.paired`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEVEL = 0.05  # of the tests that intervals invert
Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal
RESAMPLED_CELLS = 4_000_000  # resampled values held at once (32 MB)


class Estimate(TypedDict):
    """A value and its 95 % interval from `n` observations; low and high are None where n < 2."""

    value: float
    low: float | None
    high: float | None
    n: int
    unit: str


def hall_transform(t: float, skew: float, n: int) -> float:
    """Return Hall's transformation of a t statistic of n observations (Hall 1992, J. R. Statist. Soc. B 54, 221-228).

    It increases with t. For skewed observations it is closer to Student's distribution than t.
    """
    u = t / math.sqrt(n)
    return math.sqrt(n) * (u + skew * u**2 / 3 + skew**2 * u**3 / 27 + skew / (6 * n))


def skewed(t: float, skew: float, n: int) -> float:
    """Return the inverse of `hall_transform`: the statistic that it maps to t."""
    if abs(skew) < 1e-6:
        return t
    return math.sqrt(n) * 3 / skew * (math.cbrt(1 + skew * (t / math.sqrt(n) - skew / (6 * n))) - 1)


def student_p(t: float, degrees: int) -> float:
    """Return the two-sided p of Student's t with so many degrees of freedom."""
    from scipy.stats import t as student

    return float(2 * student.sf(abs(t), degrees))


def student_quantile(p: float, degrees: int) -> float:
    """Return the t at which `student_p` is p."""
    from scipy.stats import t as student

    return float(student.isf(p / 2, degrees))


def error_and_skew(parts: Floats) -> tuple[float | None, float]:
    """Return the standard error of an estimate (None for one row) and the skewness of its rows' contributions.

    parts: what each row adds to the estimate [rows], linearised (Cochran 1977, ch. 6); they sum to zero.
    """
    n, square = len(parts), float(np.mean(parts**2))
    skew = float(np.mean(parts**3)) / square**1.5 if square else 0.0
    return (math.sqrt(n * n / (n - 1) * square) if n > 1 else None), skew


def studentised_interval(value: float, se: float, skew: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the values that neither Student's test nor the one after Hall's transformation rejects at this level.

    Student's interval alone misses the mean of a skewed measure too often; `perf/interval_coverage.py` shows both.
    """
    t = student_quantile(level, n - 1)
    highest, lowest = (max(sign * x for x in (sign * t, skewed(sign * t, skew, n))) for sign in (1, -1))
    return value - highest * se, value + lowest * se


def ratio_estimate(numerator: Sequence[float] | Floats, denominator: Sequence[float] | Floats, unit: str) -> Estimate:
    """Return sum(numerator) / sum(denominator) over rows, with the interval of `studentised_interval`.

    Both arguments have shape [rows]; denominators are positive. A mean has only denominators of 1. A paired difference
    has the rows' differences as numerators. `interval_of` cuts the interval.

    Raises:
        ValueError: no rows, or shapes that differ.
    """
    top, bottom = _vectors(numerator, denominator)
    value = float(top.sum() / bottom.sum())
    low, high = interval_of(value, (top - value * bottom) / bottom.sum(), unit)
    return {"value": value, "low": low, "high": high, "n": top.size, "unit": unit}


def interval_of(value: float, parts: Floats, unit: str) -> tuple[float, float] | tuple[None, None]:
    """Return the `studentised_interval` of an estimate from its rows' contributions, None twice for one row.

    A share's interval is cut to [0, 1], that of a length in tokens at 0. parts: as for `error_and_skew`.
    """
    se, skew = error_and_skew(parts)
    if se is None:
        return None, None
    low, high = studentised_interval(value, se, skew, len(parts))
    least = 0.0 if unit in ("share", "tokens") else low
    return max(least, low), min(1.0, high) if unit == "share" else high


def without_interval(value: float, n: int, unit: str) -> Estimate:
    """Return an estimate of a value that has no interval."""
    return {"value": float(value), "low": None, "high": None, "n": n, "unit": unit}


def percentile_estimate(value: float, draws: Floats | Sequence[float], n: int, unit: str) -> Estimate:
    """Return a value with the percentile interval of its resampled `draws` [resamples]."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": float(value), "low": float(low), "high": float(high), "n": n, "unit": unit}


def resampled_rows(n: int, *, resamples: int, seed: int, cells: int = RESAMPLED_CELLS) -> Iterator[NDArray[np.int64]]:
    """Draw n of n rows with replacement, again and again; yields row numbers [resamples of one piece, n].

    A piece holds about `cells` numbers, which bounds memory. The size of the pieces does not change what is drawn: a
    generator's stream is one stream however it is cut.
    """
    rng, step = np.random.default_rng(seed), max(1, cells // n)
    for start in range(0, resamples, step):
        yield rng.integers(0, n, size=(min(step, resamples - start), n))


def bootstrap_ratio(
    numerator: Sequence[float] | Floats,
    denominator: Sequence[float] | Floats,
    unit: str,
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """Return sum(numerator) / sum(denominator) over rows, with the percentile bootstrap interval over rows.

    Each resample draws n rows with replacement and computes the ratio again, so that a row's numerator and denominator
    stay together. Both arguments have shape [rows]; denominators are positive. A mean has only denominators of 1. A
    paired difference has the rows' differences as numerators.

    Raises:
        ValueError: no rows, or shapes that differ.
    """
    top, bottom = _vectors(numerator, denominator)
    value = top.sum() / bottom.sum()
    if top.size < 2:
        return without_interval(value, top.size, unit)
    pieces = resampled_rows(top.size, resamples=resamples, seed=seed)
    draws = [top[rows].sum(axis=1) / bottom[rows].sum(axis=1) for rows in pieces]
    return percentile_estimate(value, np.concatenate(draws), top.size, unit)


def _vectors(numerator: Sequence[float] | Floats, denominator: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if top.shape != bottom.shape or top.ndim != 1 or top.size == 0:
        raise ValueError(f"need two non-empty vectors of one length, found shapes {top.shape} and {bottom.shape}")
    return top, bottom


def bootstrap_mean(values: Sequence[float] | Floats, unit: str, *, resamples: int, seed: int) -> Estimate:
    """Return the mean over rows with its percentile bootstrap interval. Raises ValueError for no rows."""
    values = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(values, np.ones_like(values), unit, resamples=resamples, seed=seed)


def bootstrap_correlation(
    left: Sequence[float] | Floats, right: Sequence[float] | Floats, *, resamples: int, seed: int
) -> Estimate | None:
    """Return Pearson's correlation over rows with its percentile bootstrap interval; None where a side is constant.

    Resamples in which a side is constant do not count in the interval. Raises ValueError for shapes that differ.
    """
    x, y = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"need two vectors of one length, found shapes {x.shape} and {y.shape}")
    value = _correlations(x[None], y[None])
    if not value.size:
        return None
    pieces = resampled_rows(x.size, resamples=resamples, seed=seed)
    draws = np.concatenate([_correlations(x[rows], y[rows]) for rows in pieces])
    return percentile_estimate(value[0], draws, x.size, "correlation")


def _correlations(x: Floats, y: Floats) -> Floats:
    """Return the correlation of each pair of rows of two tables; pairs with a constant side are left out."""
    varied = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    x, y = (table[varied] - table[varied].mean(axis=1, keepdims=True) for table in (x, y))
    found: Floats = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return found


def wilson(successes: float, n: int) -> Estimate:
    """Return the share successes / n with Wilson's score interval (Wilson 1927), which stays inside [0, 1].

    Half successes (ties) are allowed. They vary less than a coin, so the interval is then slightly too wide.

    Raises:
        ValueError: n < 1, or successes outside [0, n].
    """
    # Not scipy's `binomtest(...).proportion_ci`: it takes whole successes only.
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
    """Return sum(successes) / sum(counts), a share of things that come in groups [groups], with its interval.

    Things of one group are alike, for example both verdicts on one prompt, so the bootstrap is over groups. Where all
    groups have the same share, which no resampling can change, the interval is Wilson's with each group as one
    observation. n counts the things. Empty groups are left out.

    Raises:
        ValueError: every group is empty.
    """
    top, bottom = np.asarray(successes, np.float64), np.asarray(counts, np.float64)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    found = bootstrap_ratio(top, bottom, "share", resamples=resamples, seed=seed)
    if np.ptp(top / bottom) == 0:
        found = wilson(found["value"] * len(bottom), len(bottom))
    found["n"] = int(bottom.sum())
    return found
