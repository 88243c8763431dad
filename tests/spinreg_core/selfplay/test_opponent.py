"""Weights, draws and quotas of past iterates: exact values, distribution, and draws pinned for ever."""

import itertools
import math
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinreg_core.errors import BadInput
from spinreg_core.selfplay.opponent import choose, draw_iterate, mixture_weights, replay_quota

# 99.9 % points of the chi-square distribution; seeds are fixed, so these tests pass always or never.
CHI_SQUARE_999 = {2: 13.816, 3: 16.266, 4: 18.467, 9: 27.877}


def chi_square(counts: Counter, expected: dict[int, float]) -> float:
    assert set(counts) <= set(expected)
    return sum((counts[k] - n) ** 2 / n for k, n in expected.items())


# --- weights ---


@pytest.mark.parametrize(
    ("round_index", "history", "weights"),
    [
        (0, 1, [1.0]),
        (7, 1, [1.0]),
        (0, 2, [1.0]),
        (1, 2, [0.5, 0.5]),
        (9, 2, [0.5, 0.5]),
        (0, "all", [1.0]),
        (2, "all", [1 / 3, 1 / 3, 1 / 3]),
        (3, 100, [0.25] * 4),
        (4, 3, [1 / 3] * 3),
    ],
)
def test_uniform_weights_are_the_default(round_index: int, history: int | str, weights: list[float]) -> None:
    assert mixture_weights(round_index, history) == weights
    assert mixture_weights(round_index, history, "uniform") == weights


def test_recency_weights_fall_by_the_decay() -> None:
    assert mixture_weights(2, "all", "recency") == [4 / 7, 2 / 7, 1 / 7]
    assert mixture_weights(9, 2, "recency", decay=0.25) == [0.8, 0.2]
    assert mixture_weights(3, "all", "recency", decay=1.0) == [0.25] * 4


def test_explicit_weights_are_cut_to_existing_iterates_and_renormalised() -> None:
    assert mixture_weights(5, 3, [2.0, 1.0, 1.0]) == [0.5, 0.25, 0.25]
    assert mixture_weights(1, 3, [3.0, 1.0, 4.0]) == [0.75, 0.25]
    assert mixture_weights(0, 3, [0.2, 0.3, 0.5]) == [1.0]
    assert mixture_weights(6, "all", [3, 0, 1]) == [0.75, 0.0, 0.25]  # older iterates weigh nothing


@given(
    st.integers(0, 3000),
    st.one_of(st.just("all"), st.integers(1, 50)),
    st.sampled_from(["uniform", "recency"]),
    st.floats(0.01, 1.0),
)
@settings(deadline=None, max_examples=60)
def test_weights_are_probabilities_newest_first(round_index, history, weighting, decay) -> None:
    weights = mixture_weights(round_index, history, weighting, decay=decay)
    assert len(weights) == (round_index + 1 if history == "all" else min(history, round_index + 1))
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
    assert all(newer >= older >= 0 for newer, older in itertools.pairwise(weights))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1, 1), "round_index"),
        ((0, 0), "history"),
        ((0, "every"), "history"),
        ((0, 1, "newest"), "weighting"),
        ((3, 2, [1.0]), "2, one per iterate"),
        ((3, 2, [1.0, 1.0, 1.0]), "2, one per iterate"),
        ((3, "all", []), "weighting"),
        ((3, 2, [0.0, 1.0]), "newest"),
        ((3, 2, [1.0, -1.0]), "weighting"),
        ((3, 2, [1.0, math.nan]), "weighting"),
        ((3, 2, [math.inf, 1.0]), "weighting"),
    ],
)
def test_unusable_weights_are_refused(arguments: tuple, named: str) -> None:
    with pytest.raises(BadInput, match=named):
        mixture_weights(*arguments)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, math.nan])
def test_unusable_decay_is_refused(decay: float) -> None:
    with pytest.raises(BadInput, match="decay"):
        mixture_weights(3, "all", "recency", decay=decay)


# --- draws ---


def test_draws_are_pinned() -> None:
    """These values are part of what a run means: a run resumed after an upgrade must draw the same iterates."""
    quarter = [0.25] * 4
    assert [draw_iterate(quarter, seed=0, round_index=3, prompt_id=f"p{i}") for i in range(16)] == [
        *(0, 3, 0, 1, 1, 2, 3, 1),
        *(0, 0, 0, 2, 1, 3, 3, 0),
    ]
    answers = [draw_iterate(quarter, seed=0, round_index=3, prompt_id="p0", answer_index=i) for i in range(8)]
    assert answers == [0, 3, 1, 1, 2, 2, 3, 3]
    assert [draw_iterate(quarter, seed=7, round_index=3, prompt_id=f"p{i}") for i in range(8)] == [
        *(3, 1, 3, 1, 0, 0, 1, 2)
    ]
    assert [draw_iterate(quarter, seed=0, round_index=4, prompt_id=f"p{i}") for i in range(8)] == [
        *(3, 1, 1, 1, 0, 1, 1, 1)
    ]


@pytest.mark.parametrize(
    "weights", [[0.25] * 4, [0.5, 0.25, 0.125, 0.125], [0.7, 0.2, 0.1], [4 / 7, 2 / 7, 1 / 7], [0.2] * 5]
)
def test_draws_follow_the_weights(weights: list[float]) -> None:
    n = 20_000
    for vary in ("prompt", "answer", "round", "seed"):
        counts = Counter(
            draw_iterate(
                weights,
                seed=i if vary == "seed" else 1,
                round_index=i if vary == "round" else 5,
                prompt_id=f"{i:016x}" if vary == "prompt" else "0123456789abcdef",
                answer_index=i if vary == "answer" else 0,
            )
            for i in range(n)
        )
        statistic = chi_square(counts, {k: n * w for k, w in enumerate(weights)})
        assert statistic < CHI_SQUARE_999[len(weights) - 1], (vary, counts)


def test_draws_of_neighbouring_rounds_seeds_and_answers_are_independent() -> None:
    def draw(i: int, **changed: int) -> int:
        arguments = {"seed": 1, "round_index": 5, "answer_index": 0, **changed}
        return draw_iterate([0.5, 0.5], prompt_id=f"{i:016x}", **arguments)

    n = 8000
    for changed in ({"seed": 2}, {"round_index": 6}, {"answer_index": 1}):
        pairs = Counter(2 * draw(i) + draw(i, **changed) for i in range(n))
        assert chi_square(pairs, dict.fromkeys(range(4), n / 4)) < CHI_SQUARE_999[3], changed


def test_an_iterate_of_weight_zero_is_never_drawn() -> None:
    drawn = {draw_iterate([0.0, 0.5, 0.0, 0.5, 0.0], seed=0, round_index=4, prompt_id=str(i)) for i in range(500)}
    assert drawn == {1, 3}
    assert {draw_iterate([1.0, 0.0], seed=0, round_index=1, prompt_id=str(i)) for i in range(50)} == {0}


@pytest.mark.parametrize("weights", [[], [0.5, 0.4], [1.5, -0.5], [math.nan]])
def test_draw_iterate_of_bad_weights_is_refused(weights: list[float]) -> None:
    with pytest.raises(BadInput, match="weights"):
        draw_iterate(weights, seed=0, round_index=0, prompt_id="p")


# --- replay ---


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 49, 100])
def test_uniform_replay_of_equal_rounds_takes_everything(rounds: int) -> None:
    for pairs in (1, 64, 49_792):
        assert replay_quota(mixture_weights(rounds - 1, "all"), [pairs] * rounds) == [pairs] * rounds


@pytest.mark.parametrize(
    ("weights", "available", "quota"),
    [
        ([0.5, 0.5], [64, 50], [50, 50]),
        ([0.5, 0.5], [10, 64], [10, 10]),
        ([4 / 7, 2 / 7, 1 / 7], [64, 64, 64], [64, 32, 16]),
        ([0.75, 0.25], [64, 64], [64, 21]),
        ([0.2, 0.8], [64, 64], [16, 64]),
        ([1.0, 0.0], [64, 0], [64, 0]),
        ([0.5, 0.0, 0.5], [64, 64, 60], [60, 0, 60]),
        ([2 / 3, 1 / 3], [5, 9], [5, 3]),  # 2.5 goes up
        ([0.5, 0.5], [64, 0], [0, 0]),
        ([1.0], [0], [0]),
    ],
)
def test_replay_quotas_follow_the_weights(weights: list[float], available: list[int], quota: list[int]) -> None:
    assert replay_quota(weights, available) == quota


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50_000)), min_size=1, max_size=12))
@settings(deadline=None)
def test_replay_quota_is_as_large_and_exact_as_possible(parts: list[tuple[int, int]]) -> None:
    if sum(part for part, _ in parts) == 0:
        parts[0] = (1, parts[0][1])
    weights = [part / sum(part for part, _ in parts) for part, _ in parts]
    available = [n for _, n in parts]
    quota = replay_quota(weights, available)
    assert all(0 <= n <= limit for n, limit in zip(quota, available, strict=True))
    bounds = [Fraction(n) / Fraction(w) for w, n in zip(weights, available, strict=True) if w > 0]
    assert all(abs(n - min(bounds) * Fraction(w)) <= Fraction(1, 2) for n, w in zip(quota, weights, strict=True))
    # Nothing is left over: at least one iterate with weight is used up.
    assert any(n == limit for n, limit, w in zip(quota, available, weights, strict=True) if w > 0)


@pytest.mark.parametrize(
    ("weights", "available", "most", "quota"),
    [
        ([0.5, 0.5], [64, 64], 128, [64, 64]),
        ([0.5, 0.5], [64, 64], 127, [64, 63]),  # equal remainders: the newest first
        ([1 / 3] * 3, [64, 64, 64], 64, [22, 21, 21]),
        ([0.5, 0.3, 0.2], [64, 64, 64], 10, [5, 3, 2]),
        ([0.1] * 10, [64] * 10, 3, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
        ([0.75, 0.25], [64, 64], 85, [64, 21]),  # 85.3 without a limit
        ([0.5, 0.5], [2, 1], 1, [1, 0]),
        ([0.5, 0.5], [64, 0], 10, [0, 0]),
    ],
)
def test_replay_quota_of_a_limit_has_the_largest_remainders(
    weights: list[float], available: list[int], most: int, quota: list[int]
) -> None:
    assert replay_quota(weights, available, most) == quota


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99)), min_size=1, max_size=8), st.integers(0, 400))
@settings(deadline=None)
def test_replay_quota_of_a_limit_is_within_one_of_the_shares(parts: list[tuple[int, int]], most: int) -> None:
    weights = [part / sum(part for part, _ in parts) for part, _ in parts]
    available = [n for _, n in parts]
    free, quota = replay_quota(weights, available), replay_quota(weights, available, most)
    total = min(Fraction(n) / Fraction(w) for w, n in zip(weights, available, strict=True))
    assert all(0 <= n <= limit for n, limit in zip(quota, available, strict=True))
    assert quota == free if sum(free) <= most else sum(quota) == min(most, math.floor(total))
    assert all(abs(n - min(total, most) * Fraction(w)) <= 1 for n, w in zip(quota, weights, strict=True))


@pytest.mark.parametrize(
    ("weights", "available"), [([0.5, 0.5], [1]), ([], []), ([0.0], [1]), ([1.5, -0.5], [1, 1]), ([1.0], [-1])]
)
def test_unusable_quotas_are_refused(weights: list[float], available: list[int]) -> None:
    with pytest.raises(BadInput):
        replay_quota(weights, available)


def test_chosen_prompts_are_pinned() -> None:
    ids = [f"p{i}" for i in range(10)]
    assert choose(ids, 4, seed=0, round_index=2, iterate=1) == ["p4", "p8", "p2", "p6"]


@given(st.sets(st.text(min_size=1, max_size=8), max_size=30), st.data())
@settings(deadline=None)
def test_choice_is_a_subset_that_ignores_order_and_grows(ids: set[str], data: st.DataObject) -> None:
    listed = sorted(ids)
    count = data.draw(st.integers(0, len(listed)))
    shuffled = data.draw(st.permutations(listed))
    chosen = choose(listed, count, seed=3, round_index=2, iterate=0)
    assert chosen == choose(shuffled, count, seed=3, round_index=2, iterate=0)
    assert len(set(chosen)) == count
    assert set(chosen) <= ids
    assert chosen == choose(listed, len(listed), seed=3, round_index=2, iterate=0)[:count]


def test_choose_is_uniform_and_independent_across_seeds_and_rounds() -> None:
    ids = [f"{i:016x}" for i in range(10)]
    n = 2000
    for vary in ("seed", "round_index", "iterate"):
        counts: Counter = Counter()
        for i in range(n):
            counts.update(
                ids.index(p) for p in choose(ids, 3, **({"seed": 0, "round_index": 4, "iterate": 1} | {vary: i}))
            )
        # Draws without replacement vary less than the multinomial, by the factor (10 - 3) / (10 - 1).
        statistic = chi_square(counts, dict.fromkeys(range(10), 0.3 * n)) * 9 / 7
        assert statistic < CHI_SQUARE_999[9], (vary, counts)


@pytest.mark.parametrize(("ids", "count"), [(["a"], 2), (["a"], -1), (["a", "a"], 1)])
def test_impossible_choices_are_refused(ids: list[str], count: int) -> None:
    with pytest.raises(BadInput):
        choose(ids, count, seed=0, round_index=0, iterate=0)


def test_opponent_loads_no_heavy_module() -> None:
    code = (
        "import sys, spinreg_core.selfplay.opponent; print(sorted({'torch', 'numpy', 'transformers'} & {*sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
