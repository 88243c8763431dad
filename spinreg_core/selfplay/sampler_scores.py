"""Log-probabilities that the sampling engine reported, in place of our scorer's: only where both agree.

Decides: which answers can be taken over at all, how many of a shard are checked, and how near is near enough.
Leaves out: the scorer (`logprobs/scoring.py`), and what the scores are for (`stages/mix_opponent.py`).

Only the policy's own, neutral sampler counts: at temperature 1, without top-p and top-k, an answer's sampled tokens
have as their sum the answer's log-probability under the policy. Kernels and number formats differ between engine and
scorer, so every shard is checked on a sample, and a shard that fails is scored like any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CHECKED = 4  # answers of each shard that are scored by both
TOLERANCE = 0.1  # nats, for each of them


def checked_scores(
    by_shard: Mapping[str, Mapping[bytes, float]], score: Callable[[Sequence[bytes]], Sequence[float]]
) -> tuple[dict[bytes, float], dict[str, Any]]:
    """Scores of those shards whose sample agrees with the scorer, by answer, and the figures of the check.

    by_shard: what the engine said (nats): shard -> key of the answer -> log-probability. score: our scorer, by key; it
    is called once. Figures: `engine_checked` answers, `engine_mean_difference` and `engine_worst_difference` (engine
    minus scorer, in nats; of largest absolute value), `engine_shards` and `engine_shards_refused`. The scorer's numbers
    are taken for what was checked.
    """
    samples = {shard: sorted(found, key=_rank)[:CHECKED] for shard, found in by_shard.items() if found}
    names = [name for sample in samples.values() for name in sample]
    exact = dict(zip(names, score(names), strict=True)) if names else {}
    differences: list[float] = []
    taken: dict[bytes, float] = {}
    refused = 0
    for shard, sample in samples.items():
        own = [by_shard[shard][name] - exact[name] for name in sample]
        differences += own
        if all(abs(d) <= TOLERANCE for d in own):  # nan is no agreement
            taken |= by_shard[shard]
        else:
            refused += 1
    figures = {
        "engine_checked": len(names),
        "engine_mean_difference": sum(differences) / len(names) if names else 0.0,
        "engine_worst_difference": max(differences, key=abs, default=0.0),
        "engine_shards": len(samples),
        "engine_shards_refused": refused,
    }
    return taken | exact, figures


def _rank(name: bytes) -> bytes:
    return hashlib.sha256(name).digest()
