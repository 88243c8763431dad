"""Whose answers play against the human ones: the weights of past iterates and the draws from them.

Decides: q_t = sum_k w_k pi_{t-k}, which iterate answers a prompt (source regenerate), and how many and which pairs of
earlier rounds come back (source replay). Every choice is a pure function of the run seed and of names, through
SHA-256, so a re-run, another process or another Python draws the same.
Leaves out: generating, reading and scoring answers (`stages/mix_opponent.py`). Imports no torch: flows may load it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from spinreg_core.errors import BadInput

_MANTISSA = 53  # bits of a float64: the uniform number below is exact


def mixture_weights(
    round_index: int,
    history: int | Literal["all"],
    weighting: Literal["uniform", "recency"] | Sequence[float] = "uniform",
    *,
    decay: float = 0.5,
) -> list[float]:
    """Weights w_0, w_1, ... of the iterates pi_t, pi_{t-1}, ... in the opponent of round t (arXiv 2404.04291).

    Args:
        round_index: t of the formulas, from 0 (the round number users see, less 1).
        history: how many iterates are averaged at most; "all" is fictitious play, 1 is SPIN's loss, 2 with uniform
            weights is the mixture of SPIN's official data flow.
        weighting: "uniform"; "recency", w_k proportional to decay^k; or weights newest first, one per iterate of
            `history` (with "all": older iterates than listed weigh nothing).
        decay: ratio of neighbouring weights with "recency", in (0, 1].

    Returns:
        At most min(history, t + 1) weights, newest first, non-negative, summing to 1. While fewer iterates exist than
        `history`, the weights of those that exist are renormalised.

    Raises:
        BadInput: an argument out of range, or a list that does not fit `history`.
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
    """k, the age of the iterate (pi_{t-k}) that answers a prompt, drawn with probability weights[k].

    Args:
        weights: as made by `mixture_weights`, newest first.
        seed: the run's seed.
        round_index: t of the formulas, from 0.
        prompt_id: the row's `prompt_id`.
        answer_index: which of several answers to the same prompt, from 0.

    Returns:
        k in 0 .. len(weights) - 1. It depends on the arguments alone; an iterate of weight 0 is never drawn.

    Raises:
        BadInput: weights that are no probabilities.
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
    # The sum rounded to just below 1 and the draw fell into the gap.
    return max(k for k, weight in enumerate(weights) if weight > 0)


def draws_mixture(share: float, *, seed: int, round_index: int, prompt_id: str, answer_index: int = 0) -> bool:
    """Whether an answer is sampled from the geometric mixture of its iterate with the base, with probability `share`.

    Depends on the arguments alone, and not on which iterate was drawn. A larger share takes what a smaller one takes.
    """
    return share > 0 and _uniform("spinreg draws_mixture", seed, round_index, prompt_id, answer_index) < share


def draws_replay(share: float, *, seed: int, round_index: int, prompt_id: str, answer_index: int = 0) -> bool:
    """Whether the answer of an earlier iterate is replaced by a pair of an earlier round, with probability `share`.

    Depends on the arguments alone, and not on which iterate was drawn. A larger share takes what a smaller one takes.
    """
    return share > 0 and _uniform("spinreg draws_replay", seed, round_index, prompt_id, answer_index) < share


def replay_quota(weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """How many pairs of each round to train on, so that the shares of the iterates are the weights.

    The total is as large as the scarcest iterate allows: with m = min over w_k > 0 of available_k / w_k (m pairs in
    all), round t-k gives m w_k pairs, rounded to the nearest whole number (a half goes up). Uniform weights and rounds
    of equal size therefore take everything, which is SPIN's official concatenation of two rounds' data.

    Args:
        weights: as made by `mixture_weights`, newest first.
        available: usable pairs of round t-k, in the same order.

    Returns:
        n_k, in the same order, 0 <= n_k <= available_k. All are 0 where an iterate that has weight has no pairs.

    Raises:
        BadInput: lists of different length, negative numbers, or no positive weight.
    """
    if len(weights) != len(available):
        raise BadInput("available", f"{len(available)} rounds", f"{len(weights)}, one per weight")
    if not weights or min(weights) < 0 or max(weights) <= 0:
        raise BadInput("weights", list(weights), "non-negative weights, one of them positive")
    if min(available) < 0:
        raise BadInput("available", list(available), "counts >= 0")
    # Fractions, because in floats 64 / (1/3) * (1/3) may end just below 64 and lose a pair.
    exact = [Fraction(w) for w in weights]
    total = min(n / w for w, n in zip(exact, available, strict=True) if w > 0)
    return [math.floor(total * w + Fraction(1, 2)) for w in exact]


def choose(prompt_ids: Sequence[str], count: int, *, seed: int, round_index: int, iterate: int) -> list[str]:
    """The `count` prompts whose pairs of an earlier iterate come back in round t (source replay).

    Args:
        prompt_ids: candidates, distinct, in any order.
        count: how many to take, without replacement.
        seed: the run's seed.
        round_index: t of the formulas, from 0.
        iterate: number of the iterate (0 is the base) whose pairs these are.

    Returns:
        The chosen ids in the order of their SHA-256 ranks. It does not depend on the order of `prompt_ids`, and a
        larger `count` extends a smaller one.

    Raises:
        BadInput: a count that the candidates do not allow, or a repeated id.
    """
    if not 0 <= count <= len(prompt_ids):
        raise BadInput("count", count, f"0 to {len(prompt_ids)}, the candidates there are")
    if len(set(prompt_ids)) != len(prompt_ids):
        raise BadInput("prompt_ids", "a repeated id", "distinct ids, or a pair would be taken twice")
    ranked = sorted(prompt_ids, key=lambda prompt_id: _digest("spinreg choose", seed, round_index, iterate, prompt_id))
    return ranked[:count]


def _uniform(*parts: str | int) -> float:
    """A number in [0, 1)."""
    return (int.from_bytes(_digest(*parts)[:8]) >> (64 - _MANTISSA)) / 2.0**_MANTISSA


def _digest(*parts: str | int) -> bytes:
    """SHA-256 of the parts; as JSON, so that no two lists of parts run together into the same bytes."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def references(alpha: float, round_number: int) -> dict[str, bool]:
    """Which scores a round's loss reads. In round 1 both references are the base, and one scoring gives both."""
    return {"previous": alpha > 0 or round_number == 1, "base": alpha < 1 or round_number == 1}


def effective_alpha(alpha: float, round_number: int) -> float:
    """The alpha a round is trained and evaluated with: the same for all in round 1, which it cannot change."""
    return 1.0 if round_number == 1 else alpha
