"""Paired differences between policies that answered the same questions, and how many of them to believe.

Decides: the estimate of a difference over several questions and seeds, its intervals, its p-value and Holm's
correction. Leaves out: where the scores come from and which differences are looked at (`comparison/compare.py`).

A score is a ratio: sum of `num` over sum of `den` over a run's questions (a mean has den 1 everywhere; a question
for which the metric is not defined has den 0). Runs of one variant that differ in their seed are averaged.

What an interval covers: other questions, drawn from where these came from, put to these same trained policies.
Questions are drawn once for all runs together, by their identity, so that whatever is subtracted saw the same
draw, also where the held-out sets of two seeds overlap. It does not cover other training seeds: the spread between
the seeds at hand is reported beside it, not inside it. Nor does it cover other samples of the same policy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from spinreg_core.evaluation.intervals import Floats, wilson

LEVEL = 0.05
_EXACT = 12  # questions that differ, up to which all sign patterns are gone through
_CELLS = 4_000_000  # weights held at once (32 MB)
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Scores:
    """One metric of one iterate of one run. `block` names the set of questions: only equal blocks are paired.
    ids: [n] of the questions; num, den: [n]."""

    block: str
    ids: tuple[str, ...]
    num: Floats
    den: Floats

    @property
    def value(self) -> float:
        return float(self.num.sum() / self.den.sum())


class Resampled:
    """Bootstrap weights of a universe of questions, one draw for all scores that are asked about.

    draws(s): [resamples] values of the score `s`, NaN where a draw holds none of its questions.
    """

    def __init__(self, ids: Iterable[str], resamples: int, seed: int) -> None:
        self.place = {name: i for i, name in enumerate(sorted(set(ids)))}
        self.resamples, self._seed = resamples, seed
        self._known: dict[int, tuple[Scores, Floats]] = {}

    def prepare(self, scores: Iterable[Scores]) -> None:
        """Draw for many scores at once: weights are made once for all of them."""
        new = list({id(s): s for s in scores if id(s) not in self._known}.values())
        n = len(self.place)
        if not new or not n:
            return
        sums = np.zeros((2, n, len(new)))
        for column, one in enumerate(new):
            rows = [self.place[name] for name in one.ids]
            sums[0, rows, column], sums[1, rows, column] = one.num, one.den
        rng, step, found = np.random.default_rng(self._seed), max(1, _CELLS // n), []
        for start in range(0, self.resamples, step):
            drawn = rng.integers(0, n, size=(min(step, self.resamples - start), n))
            drawn += np.arange(len(drawn))[:, None] * n
            weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                found.append((weights @ sums[0]) / (weights @ sums[1]))
        draws = np.concatenate(found)
        for column, one in enumerate(new):
            self._known[id(one)] = (one, draws[:, column])

    def draws(self, one: Scores) -> Floats:
        self.prepare([one])
        return self._known[id(one)][1]


def _blocks(scores: Sequence[Scores]) -> dict[str, list[Scores]]:
    found: dict[str, list[Scores]] = {}
    for one in scores:
        found.setdefault(one.block, []).append(one)
    return found


def estimate(scores: Sequence[Scores], resampled: Resampled, unit: str) -> dict[str, Any]:
    """The mean of a metric over runs, with its 95 % percentile bootstrap interval and the spread between the runs.

    `spread`: sample standard deviation between runs, None for one run. Runs of one block are averaged first. Of a share
    where each question counts 0 or 1, the interval is Wilson's for one run, and for several where all their questions
    count the same (as if they were one sample): no resampling sees that another question might count otherwise.
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


def difference(
    ours: Sequence[Scores], theirs: Sequence[Scores], resampled: Resampled, unit: str
) -> dict[str, Any] | None:
    """Ours minus theirs over the blocks that both have; None where there is no such block, or no question in it.

    Within a block only questions count for which all its runs have a value; the runs of a side are averaged, then the
    blocks. Returns value, the 95 % percentile interval of the paired bootstrap (`low`, `high`), `se` (linearised:
    Cochran 1977, ch. 6), `skew` (of the questions' shares in it), `p` (two-sided), n (questions), `values` (the
    difference in every block) and unit.

    p: where all questions that differ differ by as much, the sign test (for shares that is McNemar's exact test); where
    at most 12 differ, over all signs of their differences (Fisher's randomisation test). Both are exact where each
    side's denominators are the same, and else as good as the linearisation. Otherwise the larger of Student's with
    n - 1 degrees and the same without the skew (`hall_transform`): where a few questions carry the difference, as is
    usual against the base, Student's alone makes false claims in up to several times the stated share of cases.
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
    """The same scores without the questions for which any of them has no value."""
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
    """Two-sided p of the sign test: so many of n differences of one size are positive; each is with probability 1/2."""
    log = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(positive, n - positive) + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(one - n * math.log(2)) for one in log))


def hall_transform(t: float, skew: float, n: int) -> float:
    """Hall's transformation of a t statistic of n observations (Hall 1992, J. R. Statist. Soc. B 54, 221-228): rises
    with t, and is closer to Student's distribution than t is where the observations are skewed."""
    u = t / math.sqrt(n)
    return math.sqrt(n) * (u + skew * u**2 / 3 + skew**2 * u**3 / 27 + skew / (6 * n))


def skewed(t: float, skew: float, n: int) -> float:
    """The statistic that `hall_transform` makes t of."""
    if abs(skew) < 1e-6:
        return t
    return math.sqrt(n) * 3 / skew * (math.cbrt(1 + skew * (t / math.sqrt(n) - skew / (6 * n))) - 1)


def student_p(t: float, degrees: int) -> float:
    """Two-sided p of Student's t, by Wallace's normal approximation (1959): off by under 1 % of the quantile for 5
    degrees and more."""
    z = (8 * degrees + 1) / (8 * degrees + 3) * math.sqrt(degrees * math.log1p(t * t / degrees))
    return math.erfc(z / math.sqrt(2))


def student_quantile(p: float, degrees: int) -> float:
    """The t at which `student_p` is p."""
    z = -_NORMAL.inv_cdf(p / 2) * (8 * degrees + 3) / (8 * degrees + 1)
    return math.sqrt(degrees * math.expm1(z * z / degrees))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): where each p is right, rejecting those at or below 5 % makes a false claim, one or
    more, in at most 5 % of families."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, so_far = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = so_far
    return adjusted


def apply_holm(family: Sequence[dict[str, Any]]) -> None:
    """Add to the differences of one family `p_holm`, the interval at the level Holm tests each with
    (`corrected_low`, `corrected_high`: the t statistics that neither Student's test nor the one without skew rejects)
    and `supported`: the sign of the difference where it is, else 0.

    A difference is supported where p_holm <= 5 % and neither interval holds zero. The differences of an object from
    itself (`same`) are no tests: they do not count, and support nothing. The corrected intervals are tests turned
    round; together they are not a simultaneous confidence region, which Holm's procedure does not give.
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
        level = LEVEL / (len(tested) - min(ranks[i], rejected))  # of the step that decided about it
        t = student_quantile(level, one["n"] - 1)
        highest, lowest = (max(s * x for x in (s * t, skewed(s * t, one["skew"], one["n"]))) for s in (1, -1))
        one["corrected_low"] = one["value"] - highest * one["se"]
        one["corrected_high"] = one["value"] + lowest * one["se"]
        sign = 1 if one["value"] > 0 else -1
        if p <= LEVEL and all(sign * bound > 0 for bound in _bounds(one)):
            one["supported"] = sign


def _bounds(one: Mapping[str, Any]) -> list[float]:
    names = ("low", "high", "corrected_low", "corrected_high")
    return [math.nan if one[name] is None else one[name] for name in names]
