"""Prefix sharing and packing: the answers that share a prompt's computation, and the sequences of a forward pass.

Decides: groups (one prompt with all its answers), bins of a fixed token budget, and the layout of a packed row.
Leaves out: the attention of a packed row (`logprobs.packed_attention`), log-probabilities (`logprobs.sequence`).

A packed row is one sequence [1, T] without padding: group after group, and in a group the prompt, then the inputs of
each answer. The inputs are all tokens except the last, which is predicted and never conditioned on. In every answer the
positions continue from the end of the prompt. A token attends to its own prompt and to its own answer up to itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptGroup:
    """One prompt and its different answers, as token ids (at least one each)."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Return the number of tokens to compute."""
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


def group(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[list[PromptGroup], list[int]]:
    """Return the groups of rows, in order of first appearance, and the number of each row's answer.

    Numbers run through all groups. An empty answer has nothing to compute, and the number -1.
    """
    found: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer:
            found.setdefault(tuple(prompt), {})[tuple(answer)] = None
    groups = [PromptGroup(prompt, tuple(texts)) for prompt, texts in found.items()]
    numbers = {
        key: number for number, key in enumerate((group.prompt, answer) for group in groups for answer in group.answers)
    }
    rows = zip(prompts, answers, strict=True)
    return groups, [numbers[tuple(prompt), tuple(answer)] if answer else -1 for prompt, answer in rows]


def first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Put items into bins of at most `budget`: largest first, each into the first bin with room (ties by index).

    First-fit decreasing needs at most 11/9 of the fewest bins, plus 6/9 of a bin (Dósa 2007). An item larger than
    the budget has a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = next((b for b, free in enumerate(room) if free >= sizes[i]), None)
        if at is None:
            bins.append([i])
            room.append(budget - sizes[i])
        else:
            bins[at].append(i)
            room[at] -= sizes[i]
    return bins


def units(
    keys: Sequence[Hashable], prompt_sizes: Sequence[int], answer_sizes: Sequence[Mapping[Any, int]], budget: int
) -> tuple[list[list[int]], list[int]]:
    """Join items of one prompt (equal `keys`) into units within the budget.

    `answer_sizes[i]` maps each answer of item i to its tokens to compute. Items of a unit share equal answers, which
    count once.

    Returns:
        The items of each unit, and each unit's tokens.
    """
    found: list[list[int]] = []
    sizes: list[int] = []
    seen: list[set[Hashable]] = []
    newest: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        at = newest.get(key)
        if at is not None:
            more = sum(size for answer, size in answer_sizes[i].items() if answer not in seen[at])
            if sizes[at] + more <= budget:
                found[at].append(i)
                sizes[at] += more
                seen[at] |= set(answer_sizes[i])
                continue
        newest[key] = len(found)
        found.append([i])
        sizes.append(prompt_sizes[i] + sum(answer_sizes[i].values()))
        seen.append(set(answer_sizes[i]))
    return found, sizes


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Distribute items to `hands` lists of about equal total size: largest first, each to the smallest list so far.

    Deterministic, and every item is in exactly one list. The largest total is at most 4/3 of the best possible one
    (Graham 1969).
    """
    found: list[list[int]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = totals.index(min(totals))
        found[at].append(i)
        totals[at] += sizes[i]
    return found


def passes(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    budget: int,
    *,
    shared: bool,
    ranks: int = 1,
) -> list[list[list[int]]]:
    """Return the items of each forward pass, as [rank][pass].

    An item is a prompt with the answers that must be computed together (a pair has two). A pass has at most `budget`
    tokens, or a single longer item. With `shared`, items of one prompt share a pass where they fit, and the prompt
    counts once; without it, once per answer. Ranks get about equally many tokens. The result is deterministic, every
    item is in exactly one pass, and a rank's longest item is in its first.
    """
    if shared:
        keys = [tuple(prompt) for prompt in prompts]
        new = [{tuple(answer): len(answer) - 1 for answer in texts if answer} for texts in answers]
        members, tokens = units(keys, [len(key) for key in keys], new, budget)
    else:
        members = [[i] for i in range(len(prompts))]
        tokens = [sum(len(p) + len(a) for a in texts) for p, texts in zip(prompts, answers, strict=True)]
    return [
        [
            sorted(i for at in chosen for i in members[hand[at]])
            for chosen in first_fit([tokens[unit] for unit in hand], budget)
        ]
        for hand in deal(tokens, ranks)
    ]


@dataclass(frozen=True)
class PackedLayout:
    """A packed row of T tokens.

    tokens, positions   int64 [1, T].
    groups, segments    int32 [T]: the token's group, and within it 0 for the prompt or 1, 2, ... for an answer.
    sizes               for each group the tokens of prompt, answer 1, answer 2, ... in the row.
    predictors          int64 [answer tokens]: where each answer token is predicted from.
    targets             int64 [answer tokens].
    owners              int64 [answer tokens]: the answer's number.
    """

    tokens: Tensor
    positions: Tensor
    groups: Tensor
    segments: Tensor
    sizes: list[list[int]]
    predictors: Tensor
    targets: Tensor
    owners: Tensor

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sequence: a prompt and one answer."""
        # Not from `positions`: reading a number from a GPU waits for all its work.
        return max(prompt + max(answers, default=0) for prompt, *answers in self.sizes)


def layout(groups: Sequence[PromptGroup], device: torch.device | str = "cpu") -> PackedLayout:
    """Return the packed row of at least one group."""
    tokens: list[int] = []
    positions: list[int] = []
    group_of: list[int] = []
    segment_of: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    number = 0
    for g, member in enumerate(groups):
        start, prompt = len(tokens), len(member.prompt)
        tokens += member.prompt
        positions += range(prompt)
        segment_of += [0] * prompt
        for k, answer in enumerate(member.answers):
            # The prompt's last token predicts the first answer token, and each input predicts its successor.
            predictors += [start + prompt - 1, *range(len(tokens), len(tokens) + len(answer) - 1)]
            targets += answer
            owners += [number] * len(answer)
            number += 1
            tokens += answer[:-1]
            positions += range(prompt, prompt + len(answer) - 1)
            segment_of += [k + 1] * (len(answer) - 1)
        group_of += [g] * (len(tokens) - start)

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    return PackedLayout(
        tokens=tensor(tokens)[None],
        positions=tensor(positions)[None],
        groups=tensor(group_of, torch.int32),
        segments=tensor(segment_of, torch.int32),
        sizes=[[len(member.prompt), *(len(answer) - 1 for answer in member.answers)] for member in groups],
        predictors=tensor(predictors),
        targets=tensor(targets),
        owners=tensor(owners),
    )
