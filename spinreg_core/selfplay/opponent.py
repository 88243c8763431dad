"""The opponent of a round: the weights of past iterates and the draws from them.

Decides: q_t = sum_k w_k pi_{t-k}, the iterate that answers a prompt (source regenerate), and the pairs of earlier
rounds that come back (source replay). Every choice is a pure function of the run's seed and of names, through SHA-256,
so that another process, machine or Python draws the same.
Leaves out: generating, reading and scoring answers (`stages`). Imports no torch, because flows load it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from spinreg_core.errors import BadInput

# The bits of a float64's mantissa, so that `_uniform` is exact.
_MANTISSA = 53


def mixture_weights(
    round_index: int,
    history: int | Literal["all"],
    weighting: Literal["uniform", "recency"] | Sequence[float] = "uniform",
    *,
    decay: float = 0.5,
) -> list[float]:
    """Return the weights w_0, w_1, ... of pi_t, pi_{t-1}, ... in the opponent of round t (arXiv 2404.04291).

    Args:
        round_index: t of the formulas, from 0: the user's round number minus 1.
        history: how many iterates are averaged at most; "all" is fictitious play, 1 is SPIN's loss, 2 with uniform
            weights is the mixture of SPIN's official data flow.
        weighting: "uniform"; "recency", w_k proportional to decay^k; or weights newest first, one per iterate of
            `history` (with "all": older iterates than listed weigh nothing).
        decay: ratio of neighbouring weights with "recency", in (0, 1].

    Returns:
        At most min(history, t + 1) weights, newest first, non-negative, summing to 1. While fewer iterates exist than
        `history`, the weights of those that exist are renormalised.

    Raises:
        BadInput: an argument is out of range, or a list does not fit `history`.
    """
    if round_index < 0:
        raise BadInput("round_index", round_index, "t >= 0 (the first round is t = 0)")
    if history != "all" and (isinstance(history, str) or history < 1):
        raise BadInput("opponent.history", repr(history), 'a whole number >= 1, or "all"')
    count = round_index + 1 if history == "all" else min(history, round_index + 1)
    if weighting == "uniform":
        return [1.0 / count] * count
    if weighting == "recency":
        if not 0.0 < decay <= 1.0:
            raise BadInput("opponent.decay", decay, "a number in (0, 1]")
        raw = [decay**k for k in range(count)]
    elif isinstance(weighting, str):
        raise BadInput("opponent.weighting", repr(weighting), "uniform, recency or a list of weights, newest first")
    else:
        if history != "all" and len(weighting) != history:
            raise BadInput(
                "opponent.weighting",
                f"{len(weighting)} weights",
                f"{history}, one per iterate of opponent.history, newest first",
            )
        if not weighting or not all(math.isfinite(w) and w >= 0 for w in weighting) or weighting[0] <= 0:
            raise BadInput(
                "opponent.weighting", list(weighting), "finite weights >= 0, the first (newest) of them positive"
            )
        raw = [float(w) for w in weighting[:count]]
    total = math.fsum(raw)
    return [w / total for w in raw]


def draw_iterate(
    weights: Sequence[float], *, seed: int, round_index: int, prompt_id: str, answer_index: int = 0
) -> int:
    """Draw the age k of the iterate (pi_{t-k}) that answers a prompt, with probability weights[k].

    Args:
        weights: from `mixture_weights`, newest first.
        seed: the run's seed.
        round_index: t of the formulas, from 0.
        prompt_id: the row's `prompt_id`.
        answer_index: number of the answer to its prompt, from 0.

    Returns:
        k in 0 .. len(weights) - 1. It depends on the arguments alone; an iterate of weight 0 is never drawn.

    Raises:
        BadInput: the weights are not probabilities.
    """
    total = math.fsum(weights)
    if not weights or min(weights) < 0 or not math.isclose(total, 1.0, rel_tol=1e-9):
        raise BadInput("weights", list(weights), "non-negative weights that sum to 1 (see mixture_weights)")
    uniform = _uniform("spinreg draw_iterate", seed, round_index, prompt_id, answer_index)
    reached = 0.0
    for k, weight in enumerate(weights):
        reached += weight
        if uniform < reached:
            return k
    # The sum was rounded to just below 1, and the draw fell into the gap.
    return max(k for k, weight in enumerate(weights) if weight > 0)


def draws_mixture(share: float, *, seed: int, round_index: int, prompt_id: str, answer_index: int = 0) -> bool:
    """Return True with probability `share`: the answer is sampled from its iterate's geometric mixture with the base.

    The draw is independent of the iterate's. A larger share includes all answers of a smaller one.
    """
    return share > 0 and _uniform("spinreg draws_mixture", seed, round_index, prompt_id, answer_index) < share


def draws_replay(share: float, *, seed: int, round_index: int, prompt_id: str, answer_index: int = 0) -> bool:
    """Return True with probability `share`: a pair of an earlier round replaces the answer of an earlier iterate.

    The draw is independent of the iterate's. A larger share includes all answers of a smaller one.
    """
    return share > 0 and _uniform("spinreg draws_replay", seed, round_index, prompt_id, answer_index) < share


def replay_quota(weights: Sequence[float], available: Sequence[int], most: int | None = None) -> list[int]:
    """Return the number of pairs of each round to train on, so that the shares of the iterates are the weights.

    The scarcest iterate limits the total m = min over w_k > 0 of available_k / w_k. Round t-k gives m w_k pairs,
    rounded to the nearest whole number (a half goes up). Uniform weights and rounds of equal size therefore take
    everything, like SPIN's official concatenation of two rounds' data. If that is more than `most`, exactly `most`
    pairs are shared out by the largest remainders, newest first among equal ones.

    Args:
        weights: from `mixture_weights`, newest first.
        available: usable pairs of round t-k, in the same order.
        most: pairs of all rounds together; None is no limit.

    Returns:
        n_k, in the same order, 0 <= n_k <= available_k. All are 0 where an iterate with a positive weight has no pairs.

    Raises:
        BadInput: the lists differ in length, a number is negative, or no weight is positive.
    """
    if most is not None and most < 0:
        raise BadInput("most", most, "a count >= 0, or None")
    if len(weights) != len(available):
        raise BadInput("available", f"{len(available)} rounds", f"{len(weights)}, one per weight")
    if not weights or min(weights) < 0 or max(weights) <= 0:
        raise BadInput("weights", list(weights), "non-negative weights, one of them positive")
    if min(available) < 0:
        raise BadInput("available", list(available), "counts >= 0")
    # In floats 64 / (1/3) * (1/3) may end just below 64 and lose a pair, so fractions count exactly.
    exact = [Fraction(w) for w in weights]
    total = min(n / w for w, n in zip(exact, available, strict=True) if w > 0)
    quota = [math.floor(total * w + Fraction(1, 2)) for w in exact]
    if most is None or sum(quota) <= most:
        return quota
    shares = [min(most, math.floor(total)) * w for w in exact]
    quota = [math.floor(share) for share in shares]
    left = min(most, math.floor(total)) - sum(quota)
    for k in sorted(range(len(shares)), key=lambda k: (quota[k] - shares[k], k))[:left]:
        quota[k] += 1
    return quota


def choose(prompt_ids: Sequence[str], count: int, *, seed: int, round_index: int, iterate: int) -> list[str]:
    """Choose the prompts with a pair of an earlier iterate that comes back in round t (source replay).

    Args:
        prompt_ids: candidates, distinct, in any order.
        count: prompts to choose, without replacement.
        seed: the run's seed.
        round_index: t of the formulas, from 0.
        iterate: number of the pairs' iterate (0 is the base).

    Returns:
        The chosen ids in the order of their SHA-256 ranks. The order of `prompt_ids` has no influence, and a larger
        `count` extends a smaller one.

    Raises:
        BadInput: there are fewer candidates than `count`, or an id is repeated.
    """
    if not 0 <= count <= len(prompt_ids):
        raise BadInput("count", count, f"0 to {len(prompt_ids)}, the number of candidates")
    if len(set(prompt_ids)) != len(prompt_ids):
        raise BadInput("prompt_ids", "a repeated id", "distinct ids, so that no pair is taken twice")
    ranked = sorted(prompt_ids, key=lambda prompt_id: _digest("spinreg choose", seed, round_index, iterate, prompt_id))
    return ranked[:count]


def _uniform(*parts: str | int) -> float:
    """Return a number in [0, 1), the same for the same parts."""
    return (int.from_bytes(_digest(*parts)[:8]) >> (64 - _MANTISSA)) / 2.0**_MANTISSA


def _digest(*parts: str | int) -> bytes:
    """Return the SHA-256 of the parts as JSON, which keeps different lists of parts apart."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def references(alpha: float, round_number: int) -> dict[str, bool]:
    """Return the references that a round's loss reads. In round 1 both are the base, and one scoring gives both."""
    return {"previous": alpha > 0 or round_number == 1, "base": alpha < 1 or round_number == 1}


def effective_alpha(alpha: float, round_number: int) -> float:
    """Return the alpha of a round's training and evaluation: 1 in round 1, where alpha has no effect."""
    return 1.0 if round_number == 1 else alpha
