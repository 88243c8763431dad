"""Paired differences between policies that answered the same questions, and which of them are supported.

Decides: the estimate of a difference over several questions and seeds, its intervals, its p-value and Holm's
correction. Leaves out: the source of the scores, and the choice of differences (`comparison`).

A score is a ratio: sum of `num` over sum of `den` over a run's questions. A mean has den 1 everywhere; a question
without a value has den 0. Runs of one variant that differ only in their seed are averaged.

An interval covers other questions, drawn from the same source and put to the same trained policies. A question counts
once, by its identity, with all that it adds to both sides, also where the held-out sets of two seeds overlap. The
interval covers neither other training seeds nor other samples of the same policy. The spread between the seeds at hand
is reported next to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spinreg_core.evaluation.intervals import (
    LEVEL,
    Estimate,
    Floats,
    error_and_skew,
    hall_transform,
    interval_of,
    student_p,
    studentised_interval,
    wilson,
)

_EXACT = 12  # differing questions up to which every pattern of signs is enumerated


class MeanEstimate(Estimate):
    """An estimate over several runs: the runs' own `values`, and their sample standard deviation `spread`."""

    values: list[float]
    spread: float | None


class Difference(Estimate):
    """A paired difference, as `difference` returns it."""

    se: float | None
    skew: float
    p: float
    values: list[float]


class CorrectedDifference(Difference):
    """A paired difference with the results of `apply_holm`. `same`: both sides are one object."""

    same: bool
    p_holm: float
    corrected_low: float | None
    corrected_high: float | None
    supported: int


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


def _blocks(scores: Sequence[Scores]) -> dict[str, list[Scores]]:
    found: dict[str, list[Scores]] = {}
    for one in scores:
        found.setdefault(one.block, []).append(one)
    return found


def estimate(scores: Sequence[Scores], unit: str) -> MeanEstimate:
    """Return the mean of a metric over runs, with its 95 % interval by Student and Hall (`studentised_interval`).

    Runs of one block are averaged first. `spread` is None for one run. A share whose questions count 0 or 1 has
    Wilson's interval for one run, and for several runs where all questions count the same (as if they were one sample):
    their scatter cannot show that another question might count differently.
    """
    blocks = _blocks(scores)
    values = [one.value for one in scores]
    value = float(np.mean([np.mean([one.value for one in runs]) for runs in blocks.values()]))
    parts = _contributions((1 / len(blocks) / len(runs), one, one.value) for runs in blocks.values() for one in runs)
    n, (low, high) = len(parts), interval_of(value, parts, unit)
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


def difference(ours: Sequence[Scores], theirs: Sequence[Scores], unit: str) -> Difference | None:
    """Return ours minus theirs over the blocks that both have; None without a common block or question.

    Within a block only questions count for which all its runs have a value. The runs of a side are averaged, then the
    blocks. `low` and `high` are the 95 % interval by Student and Hall. `se` is linearised (Cochran 1977, ch. 6), and
    `skew` is the skewness of the questions' contributions. `values` are the differences of the blocks.

    The two-sided `p` comes from the first test that applies:

    1. the sign test, where all nonzero differences have one size (for shares: McNemar's exact test);
    2. Fisher's randomisation test over all signs, where at most 12 questions differ;
    3. the larger p of Student's t with n - 1 degrees, and of the same after Hall's transformation.

    Tests 1 and 2 are exact where each side has constant denominators, else as good as the linearisation. Student's t
    alone makes false claims at several times the stated rate where few questions carry the difference, which is
    usual against the base.
    """
    left, right = _blocks(ours), _blocks(theirs)
    paired = [_on_common([*left[block], *right[block]]) for block in left if block in right]
    weights = [[1 / len(left[block])] * len(left[block]) + [-1 / len(right[block])] * len(right[block])
               for block in left if block in right]  # fmt: skip
    used = [(runs, weight) for runs, weight in zip(paired, weights, strict=True) if runs[0].den.any()]
    if not used:
        return None
    values: list[float] = []
    own: list[tuple[float, Scores, float]] = []  # linearised around each side's own ratio
    null: list[tuple[float, Scores, float]] = []  # around the ratio both would have: these sum to the value
    for runs, weight in used:
        pooled = sum(float(one.num.sum()) for one in runs) / sum(float(one.den.sum()) for one in runs)
        values.append(sum(w * one.value for one, w in zip(runs, weight, strict=True)))
        own += [(w / len(used), one, one.value) for one, w in zip(runs, weight, strict=True)]
        null += [(w / len(used), one, pooled) for one, w in zip(runs, weight, strict=True)]
    value, parts = float(np.mean(values)), _contributions(own)
    se, skew = error_and_skew(parts)
    low, high = (None, None) if se is None else studentised_interval(value, se, skew, len(parts))
    p = _p_value(_contributions(null), value, se, skew, len(parts))
    return {"value": value, "low": low, "high": high, "se": se, "skew": skew, "p": p, "n": len(parts), "unit": unit,
            "values": values}  # fmt: skip


def _contributions(weighted: Iterable[tuple[float, Scores, float]]) -> Floats:
    """Return what each question adds to a weighted sum of scores [questions], linearised around the given ratios."""
    found: dict[str, float] = {}
    for weight, one, ratio in weighted:
        parts = weight / one.den.sum() * (one.num - ratio * one.den)
        for name, den, part in zip(one.ids, one.den, parts, strict=True):
            if den:
                found[name] = found.get(name, 0.0) + float(part)
    return np.array(list(found.values()))


def _on_common(runs: list[Scores]) -> list[Scores]:
    """Return the scores without the questions for which any of them has no value."""
    defined = [{name for name, den in zip(one.ids, one.den, strict=True) if den} for one in runs]
    common = set.intersection(*defined)
    if all(len(own) == len(common) for own in defined):
        return runs
    kept = [np.array([name in common for name in one.ids], np.float64) for one in runs]
    return [replace(one, num=one.num * k, den=one.den * k) for one, k in zip(runs, kept, strict=True)]


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


def apply_holm(family: Sequence[CorrectedDifference]) -> None:
    """Correct the differences of one family for multiple testing; sets the fields of each.

    `corrected_low` and `corrected_high` bound the interval at the level at which Holm tests the difference: the values
    that neither Student's test nor the one without skew rejects. `supported` is the sign of a supported difference,
    else 0. A difference is supported where p_holm <= 5 % and the corrected interval excludes zero.

    Objects compared with themselves (`same`) are no tests: they do not count, and support nothing. The corrected
    intervals are inverted tests. Together they are not a simultaneous confidence region, which Holm's procedure does
    not provide.
    """
    tested = [one for one in family if not one["same"]]
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
        low, high = studentised_interval(one["value"], one["se"], one["skew"], one["n"], level)
        one["corrected_low"], one["corrected_high"] = low, high
        sign = 1 if one["value"] > 0 else -1
        if p <= LEVEL and sign * low > 0 and sign * high > 0:
            one["supported"] = sign
