"""95 % intervals miss the truth in 5 % of samples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from spinreg_core.evaluation.intervals import ratio_estimate

sys.path.insert(0, str(Path(__file__).parents[2] / "perf"))


@pytest.mark.slow
@pytest.mark.parametrize("population", ["ratio", "skewed"])
def test_ratio_estimate_of_10000_samples_misses_the_truth_in_5_percent(population: str) -> None:
    from interval_coverage import missed

    def share(n: int) -> float:
        return missed(population, n, 10_000, lambda top, bottom: ratio_estimate(top, bottom, "x"))

    # One standard deviation of these shares is 0.2 points; the seeds are fixed.
    assert [share(n) for n in (60, 200)] == pytest.approx([0.05, 0.05], abs=0.015)
    assert share(20) < 0.09, "docs/concepts.md says so"
