"""Numbers with 95 % intervals: what each held-out metric is called, means, and how sure it is.

Decides: the metrics' definitions (`METRICS`), which of them comes first (`PRIMARY`), and the estimators.
Leaves out: where the log-probabilities come from (`stages/evaluate.py`) and how rows become metrics
(`evaluation.py`).

The intervals speak about held-out rows: rows drawn again from where these came from. They do not contain
the spread between training seeds. Of rows that open alike, such as the turns of a conversation, one is held out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal, TypedDict

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


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. `better` is None where neither direction is better by itself."""

    label: str
    unit: str
    better: Literal["lower", "higher"] | None
    definition: str


# What docs/concepts.md says of stability: at fixed total beta a smaller alpha alone makes history 1 less stable.
REMEDIES = (
    "fewer steps, a lower learning rate, or KL to the base added on top (alpha below 1 with a larger beta) may help"
)
PRIMARY = "heldout_nll"
PRIMARY_REASON = (
    "It was fixed as the primary metric before any run, uses all held-out rows of the run, involves no sampling, and "
    "is computed the same way for the base and for every round; the verdict compares the last round with the base, "
    "not the best round."
)

# In the order of the report's columns.
METRICS: dict[str, Metric] = {
    "heldout_nll": Metric(
        "held-out NLL",
        "nats/token",
        "lower",
        "Negative log-likelihood of the held-out human answers: sum of -log p over all answer tokens "
        "(end-of-turn included, prompt excluded) divided by their number.",
    ),
    "nll_vs_base": Metric(
        "NLL change to base",
        "nats/token",
        "lower",
        "Held-out NLL minus the base model's, paired: both on the same rows, resampled together.",
    ),
    "nll_vs_previous": Metric(
        "NLL change to previous",
        "nats/token",
        "lower",
        "Held-out NLL minus the previous iterate's, paired in the same way.",
    ),
    "reward_accuracy": Metric(
        "reward accuracy",
        "share",
        "higher",
        "Share of held-out prompts with r(human answer) > r(the previous policy's sample), where r = log p - alpha "
        "log p_previous - (1 - alpha) log p_base is the round's implicit reward (p_previous: the last iterate, also "
        "where training.average_as has the loss use an average in its place); ties (within 0.001 nats, what sums in "
        "float32 are off by) count half. 0.5 is chance. "
        "Samples are cut at the length limit and human answers are not, whatever opponent.truncated says.",
    ),
    "exact_match": Metric(
        "exact match",
        "share",
        "higher",
        "Share of sampled answers whose final number equals the reference's (after ####, else the last number).",
    ),
    "kl_base": Metric(
        "KL to base",
        "nats/answer",
        None,
        "Mean of log p - log p_base over the policy's own sampled answers, as far as the length limit lets them go.",
    ),
    "kl_previous": Metric(
        "KL to previous",
        "nats/answer",
        None,
        "Mean of log p - log p_previous over the policy's own sampled answers.",
    ),
    "answer_length": Metric("answer length", "tokens", None, "Mean number of sampled tokens, end-of-turn included."),
    "end_of_turn_rate": Metric(
        "end-of-turn rate",
        "share",
        None,
        "Share of sampled answers that ended by themselves before the length limit.",
    ),
    "distinct_2": Metric(
        "distinct-2",
        "share",
        None,
        "Different token bigrams divided by all token bigrams of an answer, averaged over answers of at least two "
        "tokens (end-of-turn excluded). It sees repetition within an answer, not likeness between answers.",
    ),
}

# What the game of a round was like: shown beside the metrics, and better or worse by themselves in no direction.
GAME: dict[str, Metric] = {
    "margin": Metric(
        "margin",
        "nats",
        None,
        "Mean over held-out prompts of r(human answer) - r(the previous policy's sample), r as for reward accuracy.",
    ),
    "separated": Metric(
        "separated",
        "share",
        None,
        "Share of held-out prompts with beta times the margin at 2 or more: in the logistic loss such pairs have less "
        "than a quarter of the weight of a pair at 0.",
    ),
    "real_change": Metric(
        "log p of human answers",
        "nats/answer",
        None,
        "Mean change of log p of the held-out human answers against the previous policy. That it falls is the known "
        "disease of such losses.",
    ),
    "generated_change": Metric(
        "log p of generated answers",
        "nats/answer",
        None,
        "Mean change of log p of the previous policy's samples against that policy.",
    ),
    "length_bias": Metric(
        "length bias",
        "correlation",
        None,
        "Pearson correlation over held-out prompts between the margin and by how many tokens the human answer is "
        "longer than the previous policy's sample. Near 1 or -1 it is length that is told apart.",
    ),
    "entropy": Metric(
        "entropy",
        "nats/token",
        None,
        "-log p of the policy's own samples per token: with a neutral sampler an estimate of its entropy.",
    ),
    "sampler_gap": Metric(
        "sampler - scorer",
        "nats/answer",
        None,
        "Mean of log p of the policy's samples as the sampling engine told it, minus the scorer's. Not near 0: the "
        "sampled policy is not the scored one.",
    ),
}
SEPARATED = 2.0  # beta times margin


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


def wins(left: Sequence[float] | Floats, right: Sequence[float] | Floats, within: float = 0.0) -> float:
    """Number of pairs with left > right; values that differ by no more than `within` count half."""
    difference = np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64)
    return float(np.sum(difference > within) + 0.5 * np.sum(np.abs(difference) <= within))


def distinct_bigrams(token_ids: Sequence[int]) -> float | None:
    """Different bigrams / bigrams of one answer (end-of-turn left out by the caller); None below two tokens.

    Distinct-n (Li et al. 2016, arXiv 1510.03055) pools all answers; this is per answer and then averaged,
    because pooling falls with the number of answers and a resample's repeated answers would bias it down.
    """
    bigrams = list(itertools.pairwise(token_ids))
    return len(set(bigrams)) / len(bigrams) if bigrams else None


# A minus sign counts where no digit, letter or bracket stands before it: "10-5" holds 10 and 5.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+)")


def _number(text: str) -> Decimal | None:
    match = _NUMBER.search(text)
    if match is None:
        return None
    try:
        return Decimal(match.group().replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def reference_number(text: str) -> Decimal | None:
    """The number a reference ends in: after `####` where there is one, else the text's only number.

    Thousands separators, `$` and trailing zeros do not count. None where the text does not define a number.
    """
    _, marker, tail = text.rpartition("####")
    if marker:
        return _number(tail)
    numbers = _NUMBER.findall(text)
    return _number(numbers[0]) if len(numbers) == 1 else None


# A line that holds a number and at most its unit: "#### 72", "#### $5 dollars.", not "#### Step 1: add".
_NUMBER_LINE = re.compile(rf"\s*+{_NUMBER.pattern}\s*+(?:%\s*+)?[^\W\d]*+[.!]?\s*+$")


def answered_number(text: str) -> Decimal | None:
    """The number an answer gives: the one that stands alone after a `####` (the first such line), or the first
    number after the last `####`, or the answer's last number.
    """
    tails = text.split("####")[1:]
    for tail in tails:
        if _NUMBER_LINE.match(line := tail.split("\n", 1)[0]):
            return _number(line)
    if tails and (number := _number(tails[-1])) is not None:
        return number
    numbers = _NUMBER.findall(text)
    return _number(numbers[-1]) if numbers else None
