"""Paired differences against closed forms, and claims of differences against simulations in which there is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from spinreg_core.evaluation.intervals import hall_transform, ratio_estimate, student_p, wilson
from spinreg_core.evaluation.paired import (
    Scores,
    apply_holm,
    difference,
    estimate,
    holm,
    sign_p,
)


def scores(num: Any, den: Any = None, block: str = "b", prefix: str = "q") -> Scores:
    num = np.asarray(num, np.float64)
    den = np.ones_like(num) if den is None else np.asarray(den, np.float64)
    return Scores(block, tuple(f"{prefix}{i:05d}" for i in range(len(num))), num, den)


def compared(a: Scores, b: Scores) -> dict[str, Any]:
    found = difference([a], [b], "x")
    assert found is not None
    return found


def test_difference_of_means_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    found = compared(scores(a), scores(b))
    d = a - b
    assert found["value"] == pytest.approx(d.mean())
    assert found["se"] == pytest.approx(d.std(ddof=1) / math.sqrt(40))
    assert found["n"] == 40
    t = d.mean() / found["se"]
    assert found["skew"] == pytest.approx(np.mean((d - d.mean()) ** 3) / d.std() ** 3)
    assert found["p"] == pytest.approx(max(student_p(t, 39), student_p(hall_transform(t, found["skew"], 40), 39)))
    assert found["p"] == pytest.approx(student_p(t, 39), rel=0.02), "hardly skewed"
    assert (found["low"], found["high"]) == pytest.approx(ttest_1samp(d, 0).confidence_interval(), abs=0.02)


def test_difference_of_equal_denominators_has_the_runs_own_interval() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 90, 64)
    a, b = tokens * rng.normal(1, 0.3, 64), tokens * rng.normal(1, 0.3, 64)
    found = compared(scores(a, tokens), scores(b, tokens))
    other = ratio_estimate(a - b, tokens, "x")
    assert [found[name] for name in other] == pytest.approx(list(other.values()))


def test_difference_of_hard_questions_is_seen_only_in_pairs() -> None:
    """Policies that differ by a little on questions that differ by a lot: only pairing sees it."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 10, 50)
    a, b = scores(hard + 0.2 + rng.normal(0, 0.1, 50)), scores(hard)
    found, own = compared(a, b), estimate([a], "x")
    assert found["p"] < 1e-6
    assert 0 < found["low"] < 0.2 < found["high"] + 0.05
    assert own["high"] - own["low"] > 20 * (found["high"] - found["low"])


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (4, 0, 0.125), (8, 1, 2 * (1 + 9) / 512), (3, 3, 1.0), (12, 0, 2 / 4096), (0, 0, 1.0),
        (11, 2, 2 * (1 + 13 + 78) / 2**13), (10, 3, 0.0922852), (14, 5, 0.0635681), (20, 20, 1.0),
    ],
)  # fmt: skip
def test_difference_of_changed_answers_is_mcnemars_exact_test(gained: int, lost: int, p: float) -> None:
    b = np.zeros(60)
    b[gained : gained + lost] = 1
    a = np.zeros(60)
    a[:gained] = 1
    assert compared(scores(a), scores(b))["p"] == pytest.approx(p)


def test_sign_p_of_many_questions_approaches_the_normal() -> None:
    assert sign_p(5000, 10_000) == 1
    z = (5150 - 0.5 - 5000) / 50  # with the correction for continuity
    assert sign_p(5150, 10_000) == sign_p(4850, 10_000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_holm_of_small_families_equals_hand_computation() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []


def test_apply_holm_corrected_interval_excludes_zero_where_rejected() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        family = []
        for _ in range(8):
            value, n, skew = rng.normal(0, 2.5), 60, rng.choice([-1.5, 0, 1.5])
            p = max(student_p(value, n - 1), student_p(hall_transform(value, skew, n), n - 1))
            bounds = {"low": value - 0.1, "high": value + 0.1}
            family.append({"value": value, "se": 1.0, "skew": skew, "p": p, "n": n, "same": False} | bounds)
        apply_holm(family)
        for one in family:
            excluded = one["corrected_low"] > 0 or one["corrected_high"] < 0
            assert excluded == (one["p_holm"] <= 0.05) == (one["supported"] != 0)
            assert one["supported"] in (0, np.sign(one["value"]))


def test_apply_holm_of_a_policy_against_itself_is_no_test() -> None:
    a = scores(np.arange(30.0))
    same = compared(a, a) | {"same": True}
    real = {"value": 3.0, "se": 1.0, "skew": 0.0, "low": 1.0, "high": 5.0, "p": 0.004, "n": 60,
            "same": False}  # fmt: skip
    apply_holm([same, same | {}, real])
    assert (same["value"], same["p"], same["supported"]) == (0.0, 1.0, 0)
    assert real["p_holm"] == 0.004, "a family of one"


def test_apply_holm_of_one_common_question_supports_nothing() -> None:
    one = compared(scores([1.0]), scores([0.0])) | {"same": False}
    apply_holm([one])
    assert (one["low"], one["p"], one["supported"]) == (None, 1.0, 0)
    a, b = scores([1.0, 2.0]), scores([0.0, 1.0], block="other")
    assert difference([a], [b], "x") is None


def test_difference_over_seeds_averages_them_and_shows_spread() -> None:
    """Two seeds, each with its own held-out set: the mean of the blocks' differences, standard error as of halves."""
    rng = np.random.default_rng(6)
    ours = [scores(rng.normal(m, 1, 200), block=k, prefix=k) for m, k in ((1.0, "s"), (3.0, "t"))]
    theirs = [scores(rng.normal(0, 1, 200), block=k, prefix=k) for k in "st"]
    found = difference(ours, theirs, "x")
    assert found is not None
    halves = [a.num - b.num for a, b in zip(ours, theirs, strict=True)]
    assert found["value"] == pytest.approx(np.mean([h.mean() for h in halves]))
    assert found["values"] == pytest.approx([h.mean() for h in halves])
    expected = math.sqrt(sum(h.var(ddof=1) / 200 for h in halves)) / 2
    assert found["se"] == pytest.approx(expected, rel=0.01)
    assert (found["high"] - found["low"]) / (2 * 1.96 * expected) == pytest.approx(1, abs=0.08)
    assert found["n"] == 400
    mean = estimate(ours, "x")
    assert mean["value"] == pytest.approx((ours[0].value + ours[1].value) / 2)
    assert mean["spread"] == pytest.approx(np.std([o.value for o in ours], ddof=1))


def test_difference_over_seeds_counts_shared_questions_once() -> None:
    rng = np.random.default_rng(7)
    d = rng.normal(0.2, 1, 100)
    ours, theirs = [scores(d, block=k) for k in "st"], [scores(np.zeros(100), block=k) for k in "st"]
    found = difference(ours, theirs, "x")
    one = compared(ours[0], theirs[0])
    assert found is not None
    assert (found["n"], found["se"]) == (100, pytest.approx(one["se"]))
    assert (found["low"], found["high"]) == pytest.approx((one["low"], one["high"]))


def test_estimate_leaves_out_questions_without_a_value() -> None:
    a = Scores("b", ("p", "q", "r"), np.array([1.0, 0.0, 3.0]), np.array([1.0, 0.0, 1.0]))
    found = estimate([a], "x")
    assert (found["value"], found["n"]) == (2.0, 2)


def test_difference_leaves_out_questions_one_side_lacks() -> None:
    """The other side has no value for the questions that are easy for both: their means differ, they do not."""
    ids = tuple(f"q{i}" for i in range(40))
    num = np.array([1.0] * 20 + [0.0] * 20)
    whole = Scores("b", ids, num, np.ones(40))
    absent = Scores("b", ids[15:], num[15:], np.ones(25))
    undefined = Scores("b", ids, np.where(np.arange(40) < 15, 0, num), (np.arange(40) >= 15).astype(np.float64))
    for other in (absent, undefined):
        found = compared(whole, other)
        assert (found["value"], found["n"], found["p"], found["low"], found["high"]) == (0.0, 25, 1.0, 0.0, 0.0)
    nowhere = Scores("b", ids, np.zeros(40), np.zeros(40))
    assert difference([undefined], [nowhere], "x") is None


def test_estimate_of_a_share_of_nothing_has_wilsons_interval() -> None:
    for share in (0.0, 1.0):
        one = scores([share] * 50)
        found = estimate([one], "share")
        assert (found["low"], found["high"]) == (wilson(50 * share, 50)["low"], wilson(50 * share, 50)["high"])
        assert found["high"] - found["low"] == pytest.approx(0.0714, abs=1e-4)
        two = [scores([share] * 25, block=k, prefix=k) for k in "st"]
        several = estimate(two, "share")
        assert (several["low"], several["high"], several["n"]) == (found["low"], found["high"], 50)
    some = scores([1.0] * 3 + [0.0] * 47)
    assert estimate([some], "share")["low"] == wilson(3, 50)["low"]
    numbers = scores([0.0] * 49 + [7.0])
    assert estimate([numbers], "x")["high"] > 0.1, "no share"
    nothing = scores([0.0] * 50)
    found = estimate([nothing], "nats/answer")
    assert (found["low"], found["high"]) == (0.0, 0.0), "the base's KL to itself is none, and no share"


@pytest.mark.parametrize("kind", ["normal", "skewed", "binary", "tokens", "carried by few"])
def test_apply_holm_of_equal_variants_rarely_claims_a_difference(kind: str) -> None:
    """200 families of three variants that are all the same, against a reference: any claim in one is a false one.

    `carried by few`: against a base that does not vary, with differences whose mean is zero and a few of which are
    large, all to one side. Student's test by itself makes 50 false claims there.
    """
    rng, n, false = np.random.default_rng(11), 50, 0
    for _ in range(200):
        den = rng.integers(5, 80, n) if kind == "tokens" else None
        prompts = rng.normal(0, 3, n)

        def policy(prompts: Any = prompts, den: Any = den) -> Scores:
            if kind == "binary":
                return scores(rng.random(n) < 1 / (1 + np.exp(-prompts)))
            noise = rng.exponential(1, n) if kind == "skewed" else rng.normal(0, 1, n)
            return scores((prompts + noise) * (1 if den is None else den), den)

        reference, variants = policy(), [policy() for _ in range(3)]
        if kind == "carried by few":
            reference = scores(prompts)
            variants = [scores(prompts + rng.exponential(1, n) ** 2 - 2) for _ in range(3)]
        family = [compared(v, reference) | {"same": False} for v in variants]
        apply_holm(family)
        false += any(one["supported"] for one in family)
    assert false <= 18, "5 % of 200 is 10; 18 is two and a half standard deviations more"


def test_apply_holm_of_a_real_difference_supports_it() -> None:
    rng, found = np.random.default_rng(12), 0
    for _ in range(50):
        prompts = rng.normal(0, 3, 60)
        reference = scores(prompts + rng.normal(0, 1, 60))
        variants = [scores(prompts + shift + rng.normal(0, 1, 60)) for shift in (-1.2, 0, 0)]
        family = [compared(v, reference) | {"same": False} for v in variants]
        apply_holm(family)
        found += family[0]["supported"] == -1
    assert found >= 48
