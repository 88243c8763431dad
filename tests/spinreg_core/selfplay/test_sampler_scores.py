"""When an engine's log-probabilities may stand for the scorer's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from spinreg_core.selfplay.sampler_scores import CHECKED, TOLERANCE, checked_scores

EXACT = {f"{shard}{i}".encode(): -float(10 * i + ord(shard)) for shard in "abc" for i in range(9)}


def engine(**off: float) -> dict[str, dict[bytes, float]]:
    """What an engine says of three shards, each off by so many nats."""
    return {s: {n: v + off.get(s, 0.0) for n, v in EXACT.items() if chr(n[0]) == s} for s in "abc"}


def scorer(asked: list[bytes]) -> Callable[[Sequence[bytes]], list[float]]:
    """Ours; notes what it is asked."""

    def score(names: Sequence[bytes]) -> list[float]:
        asked.extend(names)
        return [EXACT[name] for name in names]

    return score


def test_shards_that_agree_are_taken_and_others_are_not() -> None:
    asked: list[bytes] = []
    found, figures = checked_scores(engine(a=0.05, b=2 * TOLERANCE, c=-0.02), scorer(asked))
    assert len(asked) == 3 * CHECKED == figures["engine_checked"]
    assert {chr(name[0]) for name in found if name not in asked} == {"a", "c"}
    for name, value in found.items():
        expected = EXACT[name] if name in asked else EXACT[name] + {"a": 0.05, "c": -0.02}[chr(name[0])]
        assert value == pytest.approx(expected)
    assert figures["engine_worst_difference"] == pytest.approx(0.2)
    assert figures["engine_mean_difference"] == pytest.approx((0.05 + 0.2 - 0.02) / 3)
    assert (figures["engine_shards"], figures["engine_shards_refused"]) == (3, 1)


def test_one_wrong_answer_in_the_sample_refuses_its_shard_and_so_does_a_number_that_is_none() -> None:
    for wrong in (5.0, math.nan):
        said = engine()
        asked: list[bytes] = []
        checked_scores(said, scorer(asked))
        said["b"][next(name for name in asked if name[0] == ord("b"))] += wrong
        found, figures = checked_scores(said, scorer([]))
        assert figures["engine_shards_refused"] == 1
        assert {name for name in found if name[0] == ord("b")} == {name for name in asked if name[0] == ord("b")}


def test_nothing_to_check() -> None:
    found, figures = checked_scores({"a": {}}, lambda names: [])
    assert found == {}
    assert figures["engine_checked"] == figures["engine_shards"] == 0
