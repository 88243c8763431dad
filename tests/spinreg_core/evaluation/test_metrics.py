"""Estimators against closed forms, brute force, and coverage on populations whose truth is known."""

from __future__ import annotations

import statistics
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinreg_core.evaluation import final_answers, intervals, metrics


def test_ratio_is_recomputed_in_every_resample() -> None:
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


def test_resampling_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator's stream is one stream however many rows are drawn at once."""
    values = np.random.default_rng(0).normal(size=40)
    whole = intervals.bootstrap_mean(values, "x", resamples=500, seed=9)
    monkeypatch.setattr(metrics, "_CELLS", 7 * 40)
    assert intervals.bootstrap_mean(values, "x", resamples=500, seed=9) == whole


def test_bootstrap_is_seeded_and_approaches_the_normal_interval() -> None:
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


def test_bootstrap_of_a_ratio_covers_the_truth_in_95_of_100_samples() -> None:
    rng = np.random.default_rng(11)
    possible = np.arange(5, 100)
    truth = (possible * (1 + possible / 100)).sum() / possible.sum()
    trials, hits = 400, 0
    for trial in range(trials):
        found = intervals.bootstrap_ratio(*_rows(rng, 64), "nats/token", resamples=400, seed=trial)
        hits += bool(found["low"] <= truth <= found["high"])
    # Binomial(400, 0.95) has a standard deviation of 1.1 %; the percentile interval at n = 64 lies about 1 % low.
    assert 0.91 <= hits / trials <= 0.98


def test_pairing_removes_what_both_models_share() -> None:
    """The paired interval covers a small true change that two separate intervals would hide."""
    rng = np.random.default_rng(2)
    trials, hits, widths, separate = 300, 0, [], []
    for trial in range(trials):
        base, tokens = _rows(rng, 64)
        policy = base - 0.02 * tokens + rng.normal(size=64) * 0.2 * np.sqrt(tokens)  # 0.02 nats/token lower
        change = intervals.bootstrap_ratio(policy - base, tokens, "nats/token", resamples=300, seed=trial)
        hits += bool(change["low"] <= -0.02 <= change["high"])
        widths.append(change["high"] - change["low"])
        own = intervals.bootstrap_ratio(policy, tokens, "nats/token", resamples=300, seed=trial)
        separate.append(own["high"] - own["low"])
        other = intervals.bootstrap_ratio(base, tokens, "nats/token", resamples=300, seed=trial)
        assert change["value"] == pytest.approx(own["value"] - other["value"])
    assert 0.90 <= hits / trials <= 0.985
    assert np.mean(widths) < 0.3 * np.mean(separate)


def test_one_row_has_no_interval_and_no_rows_no_value() -> None:
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
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
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


def test_wilson_refuses_impossible_counts() -> None:
    for successes, n in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="successes"):
            intervals.wilson(successes, n)


def test_ties_count_half() -> None:
    assert intervals.count_wins([1.0, 2.0, 3.0, -1.0], [0.0, 2.0, 4.0, -1.0]) == 2.0
    assert intervals.count_wins([1.0, 1.25, 1.5, 0.5], [1.0, 1.0, 1.0, 1.0], within=0.25) == 0.5 + 0.5 + 1 + 0
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    assert intervals.count_wins(left, right) + intervals.count_wins(right, left) == 50


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], None), ([1], None), ([1, 2], 1.0), ([1, 1, 1, 1], 1 / 3), ([1, 2, 1, 2, 1], 0.5), ([1, 2, 3, 4], 1.0)],
)
def test_distinct_bigrams(tokens: list[int], expected: float | None) -> None:
    assert metrics.distinct_bigrams(tokens) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 48/2 = 24.\n#### 72", "72"),
        ("#### 1,234.50", "1234.5"),
        ("####$ 5", "5"),
        ("#### -3 degrees", "-3"),
        ("#### 70\nThen again: #### 80", "70"),  # what follows the first answer is not the answer
        ("#### seventy, that is 70", "70"),
        ("#### Step 1: add\n2+70\n#### 72", "72"),  # a heading, and then the answer
        ("#### 72 apples.\n#### 5", "72"),
        ("#### Step 1: 2\n#### so it is 70 or so", "70"),
        ("she has 3 left, 10-5", "5"),
        ("The answer is $18.00.", "18"),
        ("about .5", "0.5"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_an_answer_gives(text: str, number: str | None) -> None:
    assert final_answers.answered_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("work 1 + 2\n#### 3", "3"),
        ("$1,000", "1000"),
        ("3 or 4", None),
        ("red", None),
        ("#### red", None),
    ],
)
def test_the_number_of_a_reference(text: str, number: str | None) -> None:
    assert final_answers.reference_number(text) == (None if number is None else Decimal(number))


def test_an_answer_of_blanks_is_read_in_no_time() -> None:
    assert final_answers.answered_number("#### 5" + " " * 100_000 + ",") == Decimal(5)


def test_every_metric_says_which_way_is_better_or_that_neither_is() -> None:
    assert metrics.METRICS[metrics.PRIMARY].better == "lower"
    assert {m.better for m in metrics.METRICS.values()} <= {"lower", "higher", None}
    assert all(m.definition.endswith(".") and m.unit for m in metrics.METRICS.values())


def test_correlation_against_the_textbook() -> None:
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


def test_correlation_of_what_does_not_vary_is_none() -> None:
    assert intervals.bootstrap_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], resamples=100, seed=0) is None
    rare = intervals.bootstrap_correlation([0.0, 0.0, 1.0], [0.0, 1.0, 5.0], resamples=200, seed=0)
    assert rare is not None, "resamples without the third row are left out"
    with pytest.raises(ValueError, match="one length"):
        intervals.bootstrap_correlation([1.0], [1.0, 2.0], resamples=100, seed=0)


def test_a_share_of_things_in_groups() -> None:
    found = intervals.grouped_share([2, 0, 1, 0], [2, 2, 1, 0], resamples=500, seed=0)
    assert (found["value"], found["n"]) == (0.6, 5)
    assert found == intervals.bootstrap_ratio([2, 0, 1], [2, 2, 1], "share", resamples=500, seed=0) | {"n": 5}
    whole = intervals.grouped_share([2, 2], [2, 2], resamples=500, seed=0)
    assert whole == intervals.wilson(2, 2) | {"n": 4}
    with pytest.raises(ValueError, match="non-empty"):
        intervals.grouped_share([0], [0], resamples=10, seed=0)
