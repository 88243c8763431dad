"""Measure the coverage of 95 % intervals: how often an interval misses the truth, which should be 5 %.

    python perf/interval_coverage.py [--trials 10000] [--quick]

Rows are drawn from two populations with a known truth:

    ratio     like the held-out NLL: nats over tokens, where long answers cost more nats per token
    skewed    like a KL of few large rows: the mean of a lognormal variable with sigma 1.2

For 20, 60 and 200 rows it prints the share of intervals that miss: of `ratio_estimate` (Student and Hall, which reports
use) and of the percentile bootstrap (`bootstrap_ratio`, 1000 resamples; a fifth of the trials). The last line is one
JSON object; `ratio` is the largest miss of the first from 60 rows on, over 5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spinreg_core.evaluation.intervals import Estimate, Floats, bootstrap_ratio, ratio_estimate

ROWS = (20, 60, 200)
TOKENS = np.arange(5, 100)
Draw = Callable[[np.random.Generator, int], tuple[Floats, Floats]]


def draw_ratio(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """Return nats and tokens of n answers; an answer of T tokens costs 1 + T / 100 nats per token, with noise."""
    tokens = rng.choice(TOKENS, n).astype(np.float64)
    return tokens * (1 + tokens / 100) + rng.normal(size=n) * np.sqrt(tokens), tokens


def draw_skewed(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """Return n lognormal values, and ones."""
    return np.exp(rng.normal(0, 1.2, n)), np.ones(n)


POPULATIONS: dict[str, tuple[Draw, float]] = {
    "ratio": (draw_ratio, float((TOKENS * (1 + TOKENS / 100)).sum() / TOKENS.sum())),
    "skewed": (draw_skewed, math.exp(1.2**2 / 2)),
}


def missed(name: str, n: int, trials: int, interval: Callable[[Floats, Floats], Estimate]) -> float:
    """Return the share of the intervals of `trials` samples of n rows that miss the population's truth."""
    draw, truth = POPULATIONS[name]
    rng = np.random.default_rng(n)
    found = [interval(*draw(rng, n)) for _ in range(trials)]
    return sum(not one["low"] <= truth <= one["high"] for one in found) / trials  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000, help="samples of each size")
    parser.add_argument("--quick", action="store_true", help="500 samples")
    arguments = parser.parse_args()
    trials = 500 if arguments.quick else arguments.trials
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name in POPULATIONS:
        found[name] = {"student and hall": {}, "percentile bootstrap": {}}
        for n in ROWS:
            ours = missed(name, n, trials, lambda top, bottom: ratio_estimate(top, bottom, "x"))
            theirs = missed(name, n, trials // 5, lambda a, b: bootstrap_ratio(a, b, "x", resamples=1000, seed=0))
            found[name]["student and hall"][n], found[name]["percentile bootstrap"][n] = ours, theirs
            print(f"{name}, {n} rows: {ours:.1%} miss; percentile bootstrap: {theirs:.1%}", flush=True)
    worst = max(of["student and hall"][n] for of in found.values() for n in ROWS if n >= 60)
    print(json.dumps({"trials": trials, "missed": found, "ratio": worst / 0.05}))


if __name__ == "__main__":
    main()
