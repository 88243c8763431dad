"""Groups, bins and the layout of a packed row: what is in them, by hand and by properties."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from spinreg_core.logprobs.packing import PromptGroup, deal, first_fit, group, layout, passes, units

ids = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def test_rows_share_prompts_and_equal_answers() -> None:
    prompts = [[1, 2], [3], [1, 2], [1, 2], [3]]
    answers = [[5, 6], [7], [5, 6], [8], []]
    groups, numbers = group(prompts, answers)
    assert groups == [PromptGroup((1, 2), ((5, 6), (8,))), PromptGroup((3,), ((7,),))]
    assert numbers == [0, 2, 0, 1, -1]
    assert [g.tokens for g in groups] == [3, 1]


@given(st.lists(st.tuples(st.sampled_from([(1,), (1, 2), (3, 4, 5)]), st.lists(st.integers(0, 2), max_size=3))))
def test_every_row_finds_its_own_answer(rows: list[tuple[tuple[int, ...], list[int]]]) -> None:
    groups, numbers = group([list(p) for p, _ in rows], [a for _, a in rows])
    answers = [(g.prompt, a) for g in groups for a in g.answers]
    assert len(set(answers)) == len(answers)
    assert len({g.prompt for g in groups}) == len(groups)
    for (prompt, answer), number in zip(rows, numbers, strict=True):
        assert (number == -1 and not answer) or answers[number] == (prompt, tuple(answer))


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(10, 60))
def test_first_fit_is_a_partition_near_the_optimum(sizes: list[int], budget: int) -> None:
    found = first_fit(sizes, budget)
    assert sorted(i for chosen in found for i in chosen) == list(range(len(sizes)))
    for chosen in found:
        assert sum(sizes[i] for i in chosen) <= budget or len(chosen) == 1
    fitting = [size for size in sizes if size <= budget]
    fewest = len(sizes) - len(fitting) + math.ceil(sum(fitting) / budget)  # no packing has fewer bins
    # The bound 11/9 holds against the optimum; two bins can never both be at most half full.
    half_empty = [c for c in found if 2 * sum(sizes[i] for i in c) <= budget]
    assert len(half_empty) <= 1
    assert fewest <= len(found) <= 2 * fewest
    assert found == first_fit(sizes, budget)
    if sizes:
        assert max(sizes) == sizes[found[0][0]]


def test_first_fit_equals_bins_by_hand() -> None:
    assert first_fit([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert first_fit([30, 3], 10) == [[0], [1]]
    assert first_fit([], 10) == []


def test_units_keep_a_prompt_together_while_it_fits() -> None:
    members, sizes = units(
        ["p", "q", "p", "p"], [4, 4, 4, 4], [{"r": 2, "a": 3}, {"r": 1}, {"r": 2, "b": 3}, {"r": 2, "c": 3}], 12
    )
    assert members == [[0, 2], [1], [3]], "prompt 4 + real 2 + two answers of 3 is 12; the third would be 15"
    assert sizes == [12, 5, 9]


@given(st.lists(st.tuples(st.sampled_from([(1,), (1, 2), (3, 4, 5)]), ids, ids), max_size=20), st.integers(1, 30))
def test_passes_hold_every_pair_once_and_at_most_the_budget(
    pairs: list[tuple[tuple[int, ...], list[int], list[int]]], budget: int
) -> None:
    prompts, answers = [list(p) for p, _, _ in pairs], [[r, g] for _, r, g in pairs]
    for shared, ranks in ((True, 1), (False, 1), (True, 3), (False, 2)):
        shares = passes(prompts, answers, budget, shared=shared, ranks=ranks)
        assert len(shares) == ranks
        found = [chosen for share in shares for chosen in share]
        assert sorted(i for chosen in found for i in chosen) == list(range(len(pairs)))
        for chosen in found:
            if shared:
                rows = [(prompts[i], answer) for i in chosen for answer in answers[i]]
                size = sum(g.tokens for g in group([p for p, _ in rows], [a for _, a in rows])[0])
            else:
                size = sum(len(prompts[i]) + len(answer) for i in chosen for answer in answers[i])
            assert size <= budget or len(chosen) == 1


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6))
def test_items_are_dealt_once_and_evenly(sizes: list[int], hands: int) -> None:
    found = deal(sizes, hands)
    assert sorted(i for hand in found for i in hand) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in hand) for hand in found]
    assert max(totals) - min(totals) <= max(sizes, default=0)
    assert found == deal(sizes, hands)


def test_deal_equals_hands_by_hand() -> None:
    assert deal([3, 9, 4, 4], 2) == [[1], [2, 3, 0]]
    assert deal([], 2) == [[], []]


def test_layout_equals_a_row_by_hand() -> None:
    row = layout([PromptGroup((1, 2, 3), ((4, 5), (6,), (7, 8, 9))), PromptGroup((10,), ((11, 12),))])
    #                              prompt   4  7  8   10 11
    assert row.tokens.tolist() == [[1, 2, 3, 4, 7, 8, 10, 11]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert row.groups.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert row.segments.tolist() == [0, 0, 0, 1, 3, 3, 0, 1]
    assert row.sizes == [[3, 1, 0, 2], [1, 1]]
    assert row.targets.tolist() == [4, 5, 6, 7, 8, 9, 11, 12]
    assert row.predictors.tolist() == [2, 3, 2, 2, 4, 5, 6, 7]
    assert row.owners.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert row.longest == 5


@given(st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_each_token_is_predicted_from_the_one_before_it(rows: list[tuple[list[int], list[list[int]]]]) -> None:
    groups, _ = group([p for p, many in rows for _ in many], [a for _, many in rows for a in many])
    row = layout(groups)
    assert row.tokens.shape == row.positions.shape == (1, sum(g.tokens for g in groups))
    assert torch.equal(row.groups.sort().values, row.groups)
    answers = [(g.prompt, answer) for g in groups for answer in g.answers]
    for number, (prompt, answer) in enumerate(answers):
        mine = row.owners == number
        assert row.targets[mine].tolist() == list(answer)
        before = row.predictors[mine]
        assert row.tokens[0, before].tolist() == [prompt[-1], *answer[:-1]]
        assert row.positions[0, before].tolist() == [len(prompt) - 1 + k for k in range(len(answer))]
