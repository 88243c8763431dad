"""The split and the prompts of a round: properties that hold for any data."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinreg_core.data.formats import Row
from spinreg_core.data.split import any_share_openings, given_heldout, split_rows
from spinreg_core.errors import BadInput
from spinreg_core.generation.shards import round_prompts


def row(number: int, *texts: str) -> Row:
    """A row whose prompt is a conversation of these texts, user first; its answer says its number."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))
    return Row(number, messages, f"answer {number}")


def sides(rows: list[Row], heldout: int, seed: int) -> tuple[list[Row], list[Row]]:
    train, held = split_rows(rows, heldout, seed)
    return [rows[i] for i in train], [rows[i] for i in held]


def first(rows: list[Row], seed: int) -> Row:
    return min(rows, key=lambda r: hashlib.sha256(f"{seed}:{json.dumps(r.content, sort_keys=True)}".encode()).digest())


def split_plainly(rows: list[Row], heldout: int, seed: int) -> tuple[list[Row], list[Row]]:
    """The obvious version: groups in a dict."""
    groups: dict[str, list[Row]] = {}
    for r in rows:
        groups.setdefault(r.opening_hash, []).append(r)
    chosen = sorted(groups, key=lambda opening: hashlib.sha256(f"{seed}:{opening}".encode()).digest())[:heldout]
    held = [first(groups[opening], seed) for opening in chosen]
    return [r for r in rows if r.opening_hash not in chosen], [r for r in rows if r in held]


openings = st.lists(st.integers(0, 30), min_size=2, max_size=60)


@settings(deadline=None)
@given(openings=openings, heldout=st.integers(1, 20), seed=st.integers(0, 5))
def test_split_rows_equals_the_plain_version(openings: list[int], heldout: int, seed: int) -> None:
    rows = [row(i, f"prompt {o}") for i, o in enumerate(openings)]
    if len(set(openings)) <= heldout:
        with pytest.raises(BadInput, match=f"only {len(set(openings))} different openings"):
            sides(rows, heldout, seed)
        return
    train, held = sides(rows, heldout, seed)
    assert (train, held) == split_plainly(rows, heldout, seed)
    assert len(held) == len({r.opening_hash for r in held}) == heldout, "independent of each other"
    assert not {r.opening_hash for r in train} & {r.opening_hash for r in held}
    shuffled = list(rows)
    random.Random(1).shuffle(shuffled)
    again = sides(shuffled, heldout, seed)
    assert {r.source_row for r in again[1]} == {r.source_row for r in held}


def test_split_rows_with_another_seed_holds_out_others() -> None:
    rows = [row(i, f"prompt {i}") for i in range(100)]
    held = [frozenset(r.source_row for r in sides(rows, 20, seed)[1]) for seed in range(5)]
    assert len(set(held)) == 5
    assert sides(rows, 20, 0) == sides(rows, 20, 0)


def test_split_rows_keeps_a_conversation_on_one_side() -> None:
    rows = [r for i in range(40) for r in (row(2 * i, f"a{i}"), row(2 * i + 1, f"a{i}", "x", "more"))]
    train, held = sides(rows, 11, 0)
    assert len(held) == 11
    assert len(train) == 2 * (40 - 11), "the other turns of these are on neither side"
    assert not {r.messages[0]["content"] for r in train} & {r.messages[0]["content"] for r in held}
    assert {len(r.messages) for r in held} == {1, 3}, "a first turn of some and a second of others"


def test_split_rows_with_nothing_to_train_on_raises() -> None:
    rows = [row(i, f"prompt {i}") for i in range(5)]
    with pytest.raises(BadInput, match=r"data\.heldout_rows"):
        split_rows(rows, 5, 0)
    assert len(split_rows(rows, 4, 0)[0]) == 1


def test_given_heldout_leaves_out_training_rows_with_its_openings() -> None:
    rows = [row(i, f"prompt {i}") for i in range(50)]
    other = [row(i, f"prompt {i}") for i in range(40, 60)]
    twice = [*other, *(row(100 + i, f"prompt {i}", "and", "then?") for i in range(40, 60))]
    kept, places = given_heldout(rows, other, 15, 3)
    assert places.tolist() == sorted(places)
    held = [other[i] for i in places]
    order = sorted(other, key=lambda r: hashlib.sha256(f"3:{r.opening_hash}".encode()).digest())
    assert sorted(r.source_row for r in held) == sorted(r.source_row for r in order[:15])
    chosen = {r.prompt_hash for r in held}
    assert [rows[i] for i in kept] == [r for r in rows if r.prompt_hash not in chosen]
    assert len(kept) < len(rows)
    assert given_heldout(rows, other, 100, 3)[1].tolist() == list(range(20))
    assert len({twice[i].opening_hash for i in given_heldout(rows, twice, 15, 3)[1]}) == 15
    assert len(given_heldout(rows, twice, 100, 3)[1]) == 20
    with pytest.raises(BadInput, match=r"data\.heldout_dataset"):
        given_heldout(rows, rows, 100, 3)


@settings(deadline=None)
@given(n=st.integers(1, 40), m=st.integers(1, 45), seed=st.integers(0, 3))
def test_round_prompts_fresh_passes_through_all_rows(n: int, m: int, seed: int) -> None:
    rounds = [round_prompts(n, m, r, "fresh", seed).tolist() for r in range(1, 12)]
    if m >= n:
        assert all(found == list(range(n)) for found in rounds)
        return
    for found in rounds:
        assert len(found) == m == len(set(found))  # never the same row twice in a round
    stream = [i for found in rounds for i in found]
    for start in range(0, len(stream) - n + 1, n):  # every pass is a permutation
        assert sorted(stream[start : start + n]) == list(range(n))
    # A round is the same whether or not the ones before it were asked for.
    assert round_prompts(n, m, 7, "fresh", seed).tolist() == rounds[6]


def test_round_prompts_same_repeats_the_first_round() -> None:
    first = round_prompts(100, 30, 1, "fresh", 0).tolist()
    assert [round_prompts(100, 30, r, "same", 0).tolist() for r in (1, 2, 9)] == [first] * 3
    assert first != round_prompts(100, 30, 1, "fresh", 1).tolist()
    assert first != sorted(first)


def test_round_prompts_unset_takes_all_rows() -> None:
    assert round_prompts(7, None, 3, "fresh", 0).tolist() == list(range(7))


def test_round_prompts_fresh_shuffles_every_pass() -> None:
    rounds = [round_prompts(20, 10, r, "fresh", 0).tolist() for r in range(1, 5)]
    assert rounds[0] + rounds[1] != rounds[2] + rounds[3]


def test_any_share_openings_of_single_turns_is_false() -> None:
    """Only where the split differs from that of earlier versions are they others."""
    plain = [row(i, f"prompt {i}") for i in range(5)]
    assert not any_share_openings(plain)
    assert any_share_openings([*plain, row(5, "prompt 0")])
    assert any_share_openings([*plain, row(5, "prompt 5", "and", "then?")])
