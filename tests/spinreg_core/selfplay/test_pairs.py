"""Pairs: every treatment of truncated answers, replay by weights, and which cached score belongs to which tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.selfplay.pairs import (
    PAIRS_SCHEMA,
    Pair,
    counts,
    keyed,
    known_scores,
    make_pairs,
    replay,
    sequence_key,
    treat_truncated,
)

END = 1


def data(lengths: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Rows whose answers have so many tokens, end-of-turn included."""
    return {
        name: {
            "prompt_id": name,
            "prompt_ids": [7, 8],
            "answer_ids": [*range(10, 9 + n), END],
            "answer_truncated": False,
        }
        for name, n in lengths.items()
    }


def answer(name: str, ids: list[int], finish: str, iterate: int = 0) -> dict[str, Any]:
    return {
        "prompt_id": name, "answer": 0, "iterate": iterate, "geometric": False, "prompt_ids": [7, 8], "answer_ids": ids,
        "finish": finish,
    }  # fmt: skip


@pytest.fixture(name="pairs")
def _pairs() -> list[Pair]:
    """Limit 4 tokens. a: cut off, human longer. b: cut off, human shorter. c: cut off, human exactly 4 tokens and
    finished. d: finished, human longer. e: cut off, human longer and already cut by max_length."""
    rows = data({"a": 6, "b": 3, "c": 4, "d": 9, "e": 8})
    rows["e"] |= {"answer_ids": [*range(10, 18)], "answer_truncated": True}
    full = [20, 21, 22, 23]
    return make_pairs(
        [answer(n, [20, END] if n == "d" else full, "stop" if n == "d" else "length") for n in "abcde"], rows, 3
    )


def test_join_keeps_sampled_ids_and_names_pairs(pairs: list[Pair]) -> None:
    first, finished = pairs[0], pairs[3]
    assert first["pair_id"] == "3:a"
    assert (first["round"], first["iterate"], first["prompt_id"]) == (3, 0, "a")
    assert first["real_ids"] == [10, 11, 12, 13, 14, END]
    assert first["generated_ids"] == [20, 21, 22, 23]
    assert (first["generated_truncated"], finished["generated_truncated"]) == (True, False)
    assert pa.Table.from_pylist(pairs, schema=PAIRS_SCHEMA).to_pylist() == pairs


def test_several_answers_to_a_prompt_make_several_pairs() -> None:
    given = [answer("a", [20 + k, END], "stop") | {"answer": k, "geometric": k == 2} for k in range(3)]
    pairs = make_pairs(given, data({"a": 6}), 3)
    assert [pair["pair_id"] for pair in pairs] == ["3:a", "3:a:1", "3:a:2"]
    assert [pair["geometric"] for pair in pairs] == [False, False, True]
    assert {tuple(pair["real_ids"]) for pair in pairs} == {tuple(pairs[0]["real_ids"])}
    with pytest.raises(Damaged, match="found an answer twice, a:2;"):
        make_pairs([*given, given[2]], data({"a": 6}), 3)
    chosen = replay([pairs], [1.0], seed=0, round_number=3)
    assert sorted(pair["pair_id"] for pair in chosen) == ["3:a", "3:a:1", "3:a:2"]


def test_treat_truncated_keep_and_drop(pairs: list[Pair]) -> None:
    assert treat_truncated(pairs, "keep") == pairs
    assert [pair["prompt_id"] for pair in treat_truncated(pairs, "drop")] == ["d"]


def test_treat_truncated_clip_real_cuts_longer_human_answers(pairs: list[Pair]) -> None:
    before = [dict(pair) for pair in pairs]
    a, b, c, d, e = treat_truncated(pairs, "clip_real")
    assert a["real_ids"] == [10, 11, 12, 13]  # first 4 tokens, no end-of-turn
    assert a["real_truncated"]
    assert b == before[1]  # the human was done before the limit: whole, with its end-of-turn
    assert c == before[2]
    assert c["real_ids"][-1] == END
    assert not c["real_truncated"]
    assert d == before[3]  # the generated answer is finished: nothing changes
    assert e["real_ids"] == [10, 11, 12, 13]
    assert e["real_truncated"]
    assert pairs == before  # the rows handed in are not changed


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=8), st.integers(1, 6))
def test_clipped_answers_are_never_longer_than_a_cut_off_one(shapes: list[tuple[int, bool]], limit: int) -> None:
    rows = data({str(i): n for i, (n, _) in enumerate(shapes)})
    pairs = make_pairs(
        [answer(str(i), [20] * limit, "length" if cut else "stop") for i, (_, cut) in enumerate(shapes)], rows, 1
    )
    for old, new, (n, cut) in zip(pairs, treat_truncated(pairs, "clip_real"), shapes, strict=True):
        assert new["real_ids"] == old["real_ids"][: limit if cut else None]
        assert new["real_truncated"] == (cut and n > limit)
        assert (new["real_ids"][-1] == END) != new["real_truncated"]


def test_make_pairs_of_foreign_rows_is_refused() -> None:
    rows = data({"a": 3})
    with pytest.raises(Damaged, match="unknown prompt, b"):
        make_pairs([answer("b", [END], "stop")], rows, 1)
    with pytest.raises(Damaged, match="an answer twice, a"):
        make_pairs([answer("a", [END], "stop")] * 2, rows, 1)
    with pytest.raises(Damaged, match="other prompt tokens"):
        make_pairs([answer("a", [END], "stop") | {"prompt_ids": [7, 9]}], rows, 1)


def of_round(number: int, count: int) -> list[Pair]:
    names = [f"r{number}-{i}" for i in range(count)]
    return make_pairs([answer(n, [5, END], "stop", number - 1) for n in names], data(dict.fromkeys(names, 3)), number)


def test_replay_has_the_shares_of_the_weights() -> None:
    by_round = [of_round(3, 40), of_round(2, 40), of_round(1, 40)]
    found = replay(by_round, [0.5, 0.25, 0.25], seed=1, round_number=3)
    assert counts(found)["by_round"] == {"1": 20, "2": 20, "3": 40}
    assert counts(found)["by_iterate"] == {"0": 20, "1": 20, "2": 40}
    assert len({pair["pair_id"] for pair in found}) == 80
    assert found == replay([list(reversed(p)) for p in by_round], [0.5, 0.25, 0.25], seed=1, round_number=3)
    assert found != replay(by_round, [0.5, 0.25, 0.25], seed=2, round_number=3)
    everything = replay(by_round, [1 / 3] * 3, seed=1, round_number=3)
    assert counts(everything)["by_round"] == {"1": 40, "2": 40, "3": 40}


def test_replay_of_a_smaller_limit_takes_a_part_of_a_larger_ones() -> None:
    by_round = [of_round(3, 40), of_round(2, 40), of_round(1, 40)]
    taken = [replay(by_round, [1 / 3] * 3, seed=1, round_number=3, most=most) for most in (7, 40, 119, 200, None)]
    assert [len(pairs) for pairs in taken] == [7, 40, 119, 120, 120]
    names = [{pair["pair_id"] for pair in pairs} for pairs in taken]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(names))
    assert counts(taken[1])["by_round"] == {"1": 13, "2": 13, "3": 14}


def test_replay_of_a_weighted_round_without_pairs_is_refused() -> None:
    with pytest.raises(BadInput, match="no usable pair of round 2"):
        replay([of_round(3, 4), []], [0.5, 0.5], seed=0, round_number=3)
    assert len(replay([of_round(3, 4), []], [1.0, 0.0], seed=0, round_number=3)) == 4


def test_scores_belong_to_tokens_not_to_names(pairs: list[Pair]) -> None:
    clipped = treat_truncated(pairs, "clip_real")
    assert keyed(pairs[0], "real") != keyed(clipped[0], "real")
    assert keyed(pairs[1], "real") == keyed(clipped[1], "real")
    assert sequence_key([1, 2], [3]) != sequence_key([1], [2, 3])  # the same tokens, another border
    assert keyed(pairs[0], "generated") == keyed(pairs[1], "generated")  # same prompt tokens, same answer
    scored = clipped[0] | {"base_real": -3.0, "base_generated": -4.0, "previous_real": -5.0}
    assert known_scores([scored, pairs[1]], "base") == {
        keyed(clipped[0], "real"): -3.0,
        keyed(clipped[0], "generated"): -4.0,
    }
    assert list(known_scores([scored], "previous").values()) == [-5.0]


def test_summary_counts_odd_pairs() -> None:
    rows = data({"a": 2, "b": 3, "c": 3})
    generations = [answer("a", [10, END], "stop"), answer("b", [END], "stop"), answer("c", [9], "length", 2)]
    found = counts(make_pairs(generations, rows, 5))
    assert found == {
        "pairs": 3, "by_round": {"5": 3}, "by_iterate": {"0": 2, "2": 1}, "generated_truncated": 1, "real_truncated": 0,
        "empty_generated": 1, "identical": 1, "real_tokens": 8, "generated_tokens": 4,
    }  # fmt: skip
