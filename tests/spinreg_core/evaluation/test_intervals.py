"""Estimators against closed forms, brute force, and coverage on populations with a known truth."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from spinreg_core.evaluation import intervals


def test_bootstrap_ratio_of_rows_equals_a_plain_loop() -> None:
    """Against a plain loop that draws the same rows."""
    rng = np.random.default_rng(5)
    top, bottom = rng.normal(50, 20, size=17), rng.integers(1, 90, size=17).astype(float)
    found = intervals.bootstrap_ratio(top, bottom, "nats/token", resamples=200, seed=3)
    draws = []
    for rows in np.random.default_rng(3).integers(0, 17, size=(200, 17)):
        numerator = denominator = 0.0
        for row in rows:
            numerator += top[row]
            denominator += bottom[row]
        draws.append(numerator / denominator)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["value"] == pytest.approx(sum(top) / sum(bottom))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert (found["n"], found["unit"]) == (17, "nats/token")


def test_resampled_rows_in_pieces_equal_one_draw() -> None:
    """A generator's stream is one stream however many rows are drawn at once."""
    pieces = list(intervals.resampled_rows(40, resamples=500, seed=9, cells=7 * 40))
    assert [len(rows) for rows in pieces] == [7] * 71 + [3]
    (whole,) = intervals.resampled_rows(40, resamples=500, seed=9)
    assert np.array_equal(np.concatenate(pieces), whole)


def test_bootstrap_mean_of_many_rows_approaches_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=2000)
    found = intervals.bootstrap_mean(values, "x", resamples=4000, seed=0)
    assert found == intervals.bootstrap_mean(values, "x", resamples=4000, seed=0)
    assert found != intervals.bootstrap_mean(values, "x", resamples=4000, seed=1)
    half = intervals.Z95 * values.std() / np.sqrt(2000)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.05 * half)


def _rows(rng: np.random.Generator, n: int) -> tuple[intervals.Floats, intervals.Floats]:
    """Long answers cost more per token, so the mean of the rows' ratios is another number than the ratio."""
    tokens = rng.integers(5, 100, size=n).astype(float)
    return tokens * (1 + tokens / 100) + rng.normal(size=n) * np.sqrt(tokens), tokens


def test_ratio_estimate_of_paired_rows_is_narrower_than_two_apart() -> None:
    """The paired interval covers a small true change that two separate intervals would hide."""
    rng = np.random.default_rng(2)
    trials, hits, widths, separate = 300, 0, [], []
    for _ in range(trials):
        base, tokens = _rows(rng, 64)
        policy = base - 0.02 * tokens + rng.normal(size=64) * 0.2 * np.sqrt(tokens)  # 0.02 nats/token lower
        change = intervals.ratio_estimate(policy - base, tokens, "nats/token")
        hits += bool(change["low"] <= -0.02 <= change["high"])
        widths.append(change["high"] - change["low"])
        own = intervals.ratio_estimate(policy, tokens, "nats/token")
        separate.append(own["high"] - own["low"])
        other = intervals.ratio_estimate(base, tokens, "nats/token")
        assert change["value"] == pytest.approx(own["value"] - other["value"])
    assert 0.90 <= hits / trials <= 0.985
    assert np.mean(widths) < 0.3 * np.mean(separate)


def test_ratio_estimate_bounds_are_rejected_by_the_milder_test_at_5_percent() -> None:
    """By the definition: at each bound the larger p of Student's test and of Hall's is 5 %."""
    rng = np.random.default_rng(4)
    for n, sigma in [(12, 0.1), (40, 1.0), (60, 1.6)]:
        tokens = rng.integers(5, 90, n).astype(float)
        top = tokens * np.exp(rng.normal(0, sigma, n))
        found = intervals.ratio_estimate(top, tokens, "x")
        value = top.sum() / tokens.sum()
        parts = top - value * tokens
        se = parts.std(ddof=1) * np.sqrt(n) / tokens.sum()
        skew = np.mean(parts**3) / np.mean(parts**2) ** 1.5
        for bound in (found["low"], found["high"]):
            t = (value - bound) / se
            hall = intervals.hall_transform(t, skew, n)
            p = max(intervals.student_p(t, n - 1), intervals.student_p(hall, n - 1))
            assert p == pytest.approx(0.05, rel=1e-6)


def test_ratio_estimate_of_unskewed_rows_has_students_interval() -> None:
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) + 7
    found = intervals.ratio_estimate(values, np.ones(5), "x")
    known = ttest_1samp(values, 0).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((known.low, known.high))


def test_ratio_estimate_of_a_share_ends_at_0_and_1() -> None:
    values = [1.0] * 9 + [0.7]
    assert intervals.ratio_estimate(values, np.ones(10), "share")["high"] == 1
    assert intervals.ratio_estimate(values, np.ones(10), "x")["high"] > 1
    for unit in ("share", "tokens"):
        assert intervals.ratio_estimate([0.0, 0.0, 0.1], np.ones(3), unit)["low"] == 0
    assert intervals.ratio_estimate([0.0, 0.0, 0.1], np.ones(3), "nats")["low"] < 0


def test_ratio_estimate_of_equal_rows_has_no_width() -> None:
    found = intervals.ratio_estimate([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], "x")
    assert (found["value"], found["low"], found["high"]) == (2.0, 2.0, 2.0)


def test_ratio_estimate_of_one_row_has_no_interval() -> None:
    found = intervals.ratio_estimate([2.0], [1.0], "x")
    assert (found["value"], found["low"], found["high"], found["n"]) == (2.0, None, None, 1)
    with pytest.raises(ValueError, match="non-empty"):
        intervals.ratio_estimate([], [], "x")


def test_hall_transform_and_skewed_are_inverse() -> None:
    for t, skew, n in [(2.0, 1.5, 30), (-3.0, 2.0, 20), (1.0, -6.0, 60), (2.5, 0.0, 10), (0.0, 0.7, 9)]:
        assert intervals.skewed(intervals.hall_transform(t, skew, n), skew, n) == pytest.approx(t, abs=1e-9)
    assert intervals.hall_transform(-2.2, 2.0, 30) > -2.2, (
        "few large values above: a mean below zero is weaker evidence"
    )
    assert intervals.hall_transform(-2.2, -2.0, 30) == -intervals.hall_transform(2.2, 2.0, 30)


def test_student_quantile_equals_the_tables_and_inverts_p() -> None:
    """Quantiles from the usual tables."""
    for degrees, p, t in [
        (1, 0.05, 12.706),
        (2, 0.01, 9.925),
        (5, 0.05, 2.571),
        (10, 0.05, 2.228),
        (20, 0.01, 2.845),
        (30, 0.05, 2.042),
        (100, 0.001, 3.390),
    ]:
        assert intervals.student_quantile(p, degrees) == pytest.approx(t, abs=0.0006)
        assert intervals.student_p(intervals.student_quantile(p, degrees), degrees) == pytest.approx(p, rel=1e-9)
        assert intervals.student_p(-t, degrees) == intervals.student_p(t, degrees)
    assert intervals.student_p(0, 5) == 1
    assert 0 < intervals.student_p(30, 40) < 1e-20


def test_bootstrap_mean_of_one_row_has_no_interval() -> None:
    found = intervals.bootstrap_mean([2.0], "x", resamples=100, seed=0)
    assert (found["value"], found["low"], found["high"], found["n"]) == (2.0, None, None, 1)
    with pytest.raises(ValueError, match="non-empty"):
        intervals.bootstrap_mean([], "x", resamples=100, seed=0)
    with pytest.raises(ValueError, match="one length"):
        intervals.bootstrap_ratio([1.0, 2.0], [1.0], "x", resamples=100, seed=0)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(successes: int, n: int, low: float, high: float) -> None:
    found = intervals.wilson(successes, n)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=5e-5)
    mirrored = intervals.wilson(n - successes, n)
    assert (1 - mirrored["high"], 1 - mirrored["low"]) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case: tuple[int, int]) -> None:
    """|share - p| = z sqrt(p (1 - p) / n) at both bounds, which lie in [0, 1] around the share; ties included."""
    halves, n = case
    found = intervals.wilson(halves / 2, n)
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    for bound in (found["low"], found["high"]):
        distance = intervals.Z95 * np.sqrt(bound * (1 - bound) / n)
        assert abs(found["value"] - bound) == pytest.approx(distance, abs=1e-7)


def test_wilson_of_impossible_counts_raises() -> None:
    for successes, n in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="successes"):
            intervals.wilson(successes, n)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (1, 29), (15, 148), (81, 263), (7, 7)])
def test_wilson_of_whole_successes_equals_scipy(successes: int, n: int) -> None:
    found, known = intervals.wilson(successes, n), binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((known.low, known.high), rel=1e-12, abs=1e-15)


def test_bootstrap_correlation_equals_the_textbook() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=60)
    y = 0.7 * x + rng.normal(size=60)
    found = intervals.bootstrap_correlation(x, y, resamples=500, seed=0)
    assert found is not None
    assert found["value"] == pytest.approx(statistics.correlation(x.tolist(), y.tolist()))
    assert found["low"] is not None
    assert found["high"] is not None
    assert -1 <= found["low"] < found["value"] < found["high"] <= 1
    exact = intervals.bootstrap_correlation(x, 3 - 2 * x, resamples=100, seed=0)
    assert exact is not None
    assert (exact["value"], exact["low"], exact["high"]) == pytest.approx((-1, -1, -1))


def test_bootstrap_correlation_of_a_constant_side_is_none() -> None:
    assert intervals.bootstrap_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], resamples=100, seed=0) is None
    rare = intervals.bootstrap_correlation([0.0, 0.0, 1.0], [0.0, 1.0, 5.0], resamples=200, seed=0)
    assert rare is not None, "resamples without the third row are left out"
    with pytest.raises(ValueError, match="one length"):
        intervals.bootstrap_correlation([1.0], [1.0, 2.0], resamples=100, seed=0)


def test_grouped_share_of_equal_groups_has_wilsons_interval() -> None:
    found = intervals.grouped_share([2, 0, 1, 0], [2, 2, 1, 0], resamples=500, seed=0)
    assert (found["value"], found["n"]) == (0.6, 5)
    assert found == intervals.bootstrap_ratio([2, 0, 1], [2, 2, 1], "share", resamples=500, seed=0) | {"n": 5}
    whole = intervals.grouped_share([2, 2], [2, 2], resamples=500, seed=0)
    assert whole == intervals.wilson(2, 2) | {"n": 4}
    with pytest.raises(ValueError, match="non-empty"):
        intervals.grouped_share([0], [0], resamples=10, seed=0)
