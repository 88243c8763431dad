"""Paired differences between policies that answered the same questions, and which of them are supported.

Decides: the estimate of a difference over several questions and seeds, its intervals, its p-value and Holm's
correction. Leaves out: the source of the scores, and the choice of differences (`comparison`).

A score is a ratio: sum of `num` over sum of `den` over a run's questions. A mean has den 1 everywhere; a question
without a value has den 0. Runs of one variant that differ only in their seed are averaged.

An interval covers other questions, drawn from the same source and put to the same trained policies. Questions are drawn
once for all runs together, by their identity. So both sides of a difference see the same draw, also where the held-out
sets of two seeds overlap. The interval covers neither other training seeds nor other samples of the same policy. The
spread between the seeds at hand is reported next to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

import numpy as np

from spinreg_core.evaluation.intervals import Estimate, Floats, resampled_rows, wilson

LEVEL = 0.05
_EXACT = 12  # differing questions up to which every pattern of signs is enumerated


class MeanEstimate(Estimate):
    """An estimate over several runs: the runs' own `values`, and their sample standard deviation `spread`."""

    values: list[float]
    spread: float | None


class Difference(TypedDict):
    """A paired difference, as `difference` returns it. `apply_holm` adds the fields below `same`."""

    value: float
    low: float | None
    high: float | None
    se: float | None
    skew: float
    p: float
    n: int
    unit: str
    values: list[float]
    same: NotRequired[bool]  # an object compared with itself
    p_holm: NotRequired[float]
    corrected_low: NotRequired[float | None]
    corrected_high: NotRequired[float | None]
    supported: NotRequired[int]


@dataclass(frozen=True)
class Scores:
    """One metric of one iterate of one run.

    `block` names the set of questions: only equal blocks are paired. `ids`, `num` and `den` have shape [questions].
    """

    block: str
    ids: tuple[str, ...]
    num: Floats
    den: Floats

    @property
    def value(self) -> float:
        return float(self.num.sum() / self.den.sum())


class Resampled:
    """Bootstrap draws over all questions, shared by all scores."""

    def __init__(self, ids: Iterable[str], resamples: int, seed: int) -> None:
        self.place = {name: i for i, name in enumerate(sorted(set(ids)))}
        self.resamples, self._seed = resamples, seed
        self._known: dict[int, tuple[Scores, Floats]] = {}

    def prepare(self, scores: Iterable[Scores]) -> None:
        """Compute the draws of many scores together, with the same weights."""
        new = list({id(s): s for s in scores if id(s) not in self._known}.values())
        n = len(self.place)
        if not new or not n:
            return
        sums = np.zeros((2, n, len(new)))
        for column, one in enumerate(new):
            rows = [self.place[name] for name in one.ids]
            sums[0, rows, column], sums[1, rows, column] = one.num, one.den
        found = []
        for drawn in resampled_rows(n, resamples=self.resamples, seed=self._seed):
            # Shifted by n per resample, so that one bincount counts the questions of every resample on its own.
            drawn += np.arange(len(drawn))[:, None] * n
            weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                found.append((weights @ sums[0]) / (weights @ sums[1]))
        draws = np.concatenate(found)
        for column, one in enumerate(new):
            # The score is kept with its draws: otherwise another object could get its id.
            self._known[id(one)] = (one, draws[:, column])

    def draws(self, one: Scores) -> Floats:
        """Return the resampled values of a score [resamples]; NaN where a draw holds none of its questions."""
        self.prepare([one])
        return self._known[id(one)][1]


def _blocks(scores: Sequence[Scores]) -> dict[str, list[Scores]]:
    found: dict[str, list[Scores]] = {}
    for one in scores:
        found.setdefault(one.block, []).append(one)
    return found


def estimate(scores: Sequence[Scores], resampled: Resampled, unit: str) -> MeanEstimate:
    """Return the mean of a metric over runs, with its 95 % percentile bootstrap interval.

    Runs of one block are averaged first. `spread` is None for one run. A share whose questions count 0 or 1 has
    Wilson's interval for one run, and for several runs where all questions count the same (as if they were one sample):
    no resampling can show that another question might count differently.
    """
    blocks = _blocks(scores)
    values = [one.value for one in scores]
    value = float(np.mean([np.mean([one.value for one in runs]) for runs in blocks.values()]))
    draws = np.mean([np.mean([resampled.draws(one) for one in runs], axis=0) for runs in blocks.values()], axis=0)
    n = len({name for one in scores for name, den in zip(one.ids, one.den, strict=True) if den})
    low, high = _quantiles(draws) if n > 1 else (None, None)
    if (
        n > 1
        and unit == "share"
        and all(_is_share(one) for one in scores)
        and (len(scores) == 1 or value in (0.0, 1.0))
    ):
        whole = wilson(value * n, n)
        low, high = whole["low"], whole["high"]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"value": value, "low": low, "high": high, "n": n, "unit": unit, "values": values, "spread": spread}


def _is_share(one: Scores) -> bool:
    return set(one.num) <= {0.0, 1.0} and set(one.den) <= {0.0, 1.0}


def difference(ours: Sequence[Scores], theirs: Sequence[Scores], resampled: Resampled, unit: str) -> Difference | None:
    """Return ours minus theirs over the blocks that both have; None without a common block or question.

    Within a block only questions count for which all its runs have a value. The runs of a side are averaged, then the
    blocks. `low` and `high` are the 95 % percentile interval of the paired bootstrap. `se` is linearised (Cochran 1977,
    ch. 6), and `skew` is the skewness of the questions' contributions. `values` are the differences of the blocks.

    The two-sided `p` comes from the first test that applies:

    1. the sign test, where all nonzero differences have one size (for shares: McNemar's exact test);
    2. Fisher's randomisation test over all signs, where at most 12 questions differ;
    3. the larger p of Student's t with n - 1 degrees, and of the same after Hall's transformation.

    Tests 1 and 2 are exact where each side has constant denominators, else as good as the linearisation. Student's t
    alone makes false claims at several times the stated rate where few questions carry the difference, which is
    usual against the base.
    """
    left, right = _blocks(ours), _blocks(theirs)
    values: list[float] = []
    draws: list[Floats] = []
    influence: dict[str, float] = {}  # of a question on the value, linearised around each side's own ratio
    under_null: dict[str, float] = {}  # the same around the ratio both would have: these sum to the value
    paired = [_on_common([*left[block], *right[block]]) for block in left if block in right]
    weights = [[1 / len(left[block])] * len(left[block]) + [-1 / len(right[block])] * len(right[block])
               for block in left if block in right]  # fmt: skip
    used = [(runs, weight) for runs, weight in zip(paired, weights, strict=True) if runs[0].den.any()]
    if not used:
        return None
    resampled.prepare(one for runs, _ in used for one in runs)
    for runs, weight in used:
        sides = list(zip(runs, weight, strict=True))
        pooled = sum(float(one.num.sum()) for one in runs) / sum(float(one.den.sum()) for one in runs)
        values.append(sum(w * one.value for one, w in sides))
        draws.append(np.sum([w * resampled.draws(one) for one, w in sides], axis=0))
        for one, w in sides:
            scale = w / len(used) / one.den.sum()
            own, null = scale * (one.num - one.value * one.den), scale * (one.num - pooled * one.den)
            for name, den, a, b in zip(one.ids, one.den, own, null, strict=True):
                if den:
                    influence[name] = influence.get(name, 0.0) + float(a)
                    under_null[name] = under_null.get(name, 0.0) + float(b)
    value, n = float(np.mean(values)), len(influence)
    low, high = _quantiles(np.mean(draws, axis=0)) if n > 1 else (None, None)
    parts = np.array(list(influence.values()))
    square = float(np.mean(parts**2))
    se = math.sqrt(n * n / (n - 1) * square) if n > 1 else None
    skew = float(np.mean(parts**3)) / square**1.5 if square else 0.0
    p = _p_value(np.array(list(under_null.values())), value, se, skew, n)
    return {"value": value, "low": low, "high": high, "se": se, "skew": skew, "p": p, "n": n, "unit": unit,
            "values": values}  # fmt: skip


def _on_common(runs: list[Scores]) -> list[Scores]:
    """Return the scores without the questions for which any of them has no value."""
    defined = [{name for name, den in zip(one.ids, one.den, strict=True) if den} for one in runs]
    common = set.intersection(*defined)
    if all(len(own) == len(common) for own in defined):
        return runs
    kept = [np.array([name in common for name in one.ids], np.float64) for one in runs]
    return [replace(one, num=one.num * k, den=one.den * k) for one, k in zip(runs, kept, strict=True)]


def _quantiles(draws: Floats) -> tuple[float | None, float | None]:
    whole = draws[np.isfinite(draws)]
    if not len(whole):
        return None, None
    low, high = np.quantile(whole, (0.025, 0.975))
    return float(low), float(high)


def _p_value(parts: Floats, value: float, se: float | None, skew: float, n: int) -> float:
    sizes = np.abs(parts)
    largest = float(sizes.max(initial=0.0))
    parts = parts[sizes > 1e-9 * largest]
    if se is None or not len(parts):
        return 1.0
    if np.ptp(np.abs(parts)) <= 1e-9 * largest:
        return sign_p(int((parts > 0).sum()), len(parts))
    if len(parts) <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(parts))))
        sums = np.abs(signs @ parts)
        return float(np.mean(sums >= abs(parts.sum()) * (1 - 1e-9)))
    return max(student_p(t, n - 1) for t in (value / se, hall_transform(value / se, skew, n))) if se else 0.0


def sign_p(positive: int, n: int) -> float:
    """Return the two-sided p of the sign test: n differences of one size, `positive` of them above zero."""
    from scipy.stats import binomtest

    return float(binomtest(positive, n).pvalue)


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


def holm(p: Sequence[float]) -> list[float]:
    """Return adjusted p-values (Holm 1979).

    If each p is valid, rejecting those at or below 5 % makes any false claim in at most 5 % of families.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, so_far = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = so_far
    return adjusted


def apply_holm(family: Sequence[Difference]) -> None:
    """Correct the differences of one family for multiple testing; adds fields to each.

    `corrected_low` and `corrected_high` bound the interval at the level at which Holm tests the difference: the values
    that neither Student's test nor the one without skew rejects. `supported` is the sign of a supported difference,
    else 0. A difference is supported where p_holm <= 5 % and neither interval holds zero.

    Objects compared with themselves (`same`) are no tests: they do not count, and support nothing. The corrected
    intervals are inverted tests. Together they are not a simultaneous confidence region, which Holm's procedure does
    not provide.
    """
    tested = [one for one in family if not one.get("same")]
    adjusted = holm([one["p"] for one in tested])
    ranks = {i: rank for rank, i in enumerate(sorted(range(len(tested)), key=lambda i: tested[i]["p"]))}
    rejected = sum(a <= LEVEL for a in adjusted)
    for one in family:
        one |= {"p_holm": 1.0, "corrected_low": None, "corrected_high": None, "supported": 0}
    for i, (one, p) in enumerate(zip(tested, adjusted, strict=True)):
        one["p_holm"] = p
        if one["se"] is None:
            continue
        # The level of the step of Holm's procedure that decided about this difference.
        level = LEVEL / (len(tested) - min(ranks[i], rejected))
        t = student_quantile(level, one["n"] - 1)
        highest, lowest = (max(s * x for x in (s * t, skewed(s * t, one["skew"], one["n"]))) for s in (1, -1))
        low, high = one["value"] - highest * one["se"], one["value"] + lowest * one["se"]
        one["corrected_low"], one["corrected_high"] = low, high
        sign = 1 if one["value"] > 0 else -1
        bounds = (one["low"], one["high"], low, high)
        if p <= LEVEL and all(bound is not None and sign * bound > 0 for bound in bounds):
            one["supported"] = sign
