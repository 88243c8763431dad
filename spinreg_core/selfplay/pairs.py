"""Pairs of a human and a generated answer to one prompt: how they are joined, cut, chosen and stored.

Decides: the columns of `pairs.parquet`, the three ways to treat truncated answers, which pairs of earlier rounds come
back, and which cached score belongs to an answer.
Leaves out: weights and draws (`selfplay.opponent`), scoring (`logprobs`), the loss (`selfplay.loss`). Imports no torch.
"""

from __future__ import annotations

import array
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypedDict

import pyarrow as pa

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.selfplay.opponent import choose, replay_quota

Side = Literal["real", "generated"]
Reference = Literal["previous", "base"]
IdsColumn = Literal["real_ids", "generated_ids"]
ScoreColumn = Literal["previous_real", "previous_generated", "base_real", "base_generated"]


class HumanRow(TypedDict):
    """A row of the training data: a prompt with the human answer, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[int]
    answer_truncated: bool


class GeneratedRow(TypedDict):
    """A row of a round's shards, as far as pairs need it."""

    prompt_id: str
    answer: int
    iterate: int
    geometric: bool
    prompt_ids: list[int]
    answer_ids: list[int]
    finish: str


class Pair(TypedDict):
    """A row of `pairs.parquet`. Scores are sums in nats, None where the loss does not read them."""

    pair_id: str
    round: int
    iterate: int
    answer: int
    geometric: bool
    prompt_id: str
    prompt_ids: list[int]
    real_ids: list[int]
    generated_ids: list[int]
    real_truncated: bool
    generated_truncated: bool
    previous_real: float | None
    previous_generated: float | None
    base_real: float | None
    base_generated: float | None


class PairCounts(TypedDict):
    """Totals of a set of pairs; `by_round` and `by_iterate` map numbers, as text, to pairs."""

    pairs: int
    by_round: dict[str, int]
    by_iterate: dict[str, int]
    generated_truncated: int
    real_truncated: int
    empty_generated: int
    identical: int
    real_tokens: int
    generated_tokens: int


SIDES: tuple[Side, Side] = ("real", "generated")
IDS: dict[Side, IdsColumn] = {"real": "real_ids", "generated": "generated_ids"}
SCORES: dict[Reference, dict[Side, ScoreColumn]] = {
    "previous": {"real": "previous_real", "generated": "previous_generated"},
    "base": {"real": "base_real", "generated": "base_generated"},
}
SCORE_COLUMNS: tuple[ScoreColumn, ...] = ("previous_real", "previous_generated", "base_real", "base_generated")
PAIRS_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("round", pa.int32()),
        ("iterate", pa.int32()),
        ("answer", pa.int32()),  # which of several to the prompt, from 0
        ("geometric", pa.bool_()),  # sampled from the iterate's token-level mixture with the base
        ("prompt_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("real_ids", pa.list_(pa.int32())),
        ("generated_ids", pa.list_(pa.int32())),
        ("real_truncated", pa.bool_()),
        ("generated_truncated", pa.bool_()),
        *((name, pa.float64()) for name in SCORE_COLUMNS),
    ]
)


def make_pairs(generations: Iterable[GeneratedRow], rows: Mapping[str, HumanRow], round_number: int) -> list[Pair]:
    """Join one round's generated answers with the human answers to their prompts.

    `rows` maps a prompt_id to its data row. Pairs keep the order of the generations; their scores are None.

    Raises:
        Damaged: a prompt is unknown, an answer is there twice, or it was given to other prompt tokens.
    """
    pairs: dict[str, Pair] = {}
    for answer in generations:
        prompt_id = answer["prompt_id"]
        name = prompt_id if answer["answer"] == 0 else f"{prompt_id}:{answer['answer']}"
        row = rows.get(prompt_id)
        if row is None or name in pairs:
            found = "an unknown prompt" if row is None else "an answer twice"
            raise Damaged(f"generations of round {round_number}: found {found}, {name}; expected one per data row")
        if list(row["prompt_ids"]) != list(answer["prompt_ids"]):
            raise Damaged(
                f"generations of round {round_number}, prompt {prompt_id}: found other prompt tokens than in the data; "
                "expected the same, or the policy is trained on prompts that it was not sampled with"
            )
        pairs[name] = {
            "pair_id": f"{round_number}:{name}",
            "round": round_number,
            "iterate": answer["iterate"],
            "answer": answer["answer"],
            "geometric": answer["geometric"],
            "prompt_id": prompt_id,
            "prompt_ids": list(answer["prompt_ids"]),
            "real_ids": list(row["answer_ids"]),
            "generated_ids": list(answer["answer_ids"]),
            "real_truncated": bool(row["answer_truncated"]),
            "generated_truncated": answer["finish"] == "length",
            "previous_real": None,
            "previous_generated": None,
            "base_real": None,
            "base_generated": None,
        }
    return list(pairs.values())


def treat_truncated(pairs: Iterable[Pair], treatment: Literal["keep", "drop", "clip_real"]) -> list[Pair]:
    """Return the pairs to train on, given what happens to one whose generated answer was cut off after n tokens.

    keep        Nothing changes.
    drop        The pair is left out.
    clip_real   A longer human answer keeps its first n tokens, without end-of-turn, and counts as truncated. A human
                answer that ends within n tokens stays whole: ending earlier is a real difference of the two answers.

    Pairs with a finished generated answer never change.
    """
    if treatment == "keep":
        return list(pairs)
    if treatment == "drop":
        return [pair for pair in pairs if not pair["generated_truncated"]]
    found = []
    for pair in pairs:
        limit = len(pair["generated_ids"])
        if pair["generated_truncated"] and len(pair["real_ids"]) > limit:
            pair = {**pair, "real_ids": pair["real_ids"][:limit], "real_truncated": True}
        found.append(pair)
    return found


def replay(
    by_round: Sequence[Sequence[Pair]],
    weights: Sequence[float],
    *,
    seed: int,
    round_number: int,
    most: int | None = None,
) -> list[Pair]:
    """Return the pairs of this and earlier rounds (newest first) that make up an opponent with these weights.

    The shares of the rounds are the weights; the scarcest round and `most` limit the total (`opponent.replay_quota`).
    A smaller limit chooses a part of what a larger one does.

    Raises:
        BadInput: a round with a positive weight has no pair.
    """
    available = [len(pairs) for pairs in by_round]
    empty = [round_number - k for k, (w, n) in enumerate(zip(weights, available, strict=True)) if w > 0 and n == 0]
    if empty:
        raise BadInput(
            f"pairs of round {round_number}",
            f"no usable pair of round {', '.join(map(str, empty))}",
            "at least one pair of every round in the opponent's average (see opponent.truncated and "
            "generation.max_new_tokens)",
        )
    found: list[Pair] = []
    for k, (pairs, count) in enumerate(zip(by_round, replay_quota(weights, available, most), strict=True)):
        by_name = {pair["pair_id"].partition(":")[2]: pair for pair in pairs}
        iterate = round_number - 1 - k
        chosen = choose(list(by_name), count, seed=seed, round_index=round_number - 1, iterate=iterate)
        found += [by_name[name] for name in chosen]
    return found


def replay_iterates(
    earlier: Iterable[Sequence[Pair]], wanted: Mapping[int, int], *, seed: int, round_number: int
) -> list[Pair]:
    """Choose `wanted[n]` pairs of each iterate n from earlier rounds, or all of them where there are fewer.

    `earlier` holds the pairs of each round. The choice is without replacement (`opponent.choose`), newest iterate
    first.
    """
    by_iterate: dict[int, dict[str, Pair]] = {}
    for pair in (pair for pairs in earlier for pair in pairs):
        by_iterate.setdefault(pair["iterate"], {})[pair["pair_id"]] = pair
    found: list[Pair] = []
    for iterate, count in sorted(wanted.items(), reverse=True):
        own = by_iterate.get(iterate, {})
        chosen = choose(list(own), min(count, len(own)), seed=seed, round_index=round_number - 1, iterate=iterate)
        found += [own[name] for name in chosen]
    return found


def sequence_key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bytes:
    """Return the SHA-256 of the tokens that a score belongs to. A pair's id would not do: clipping changes answers."""
    head = len(prompt_ids).to_bytes(8, "little")
    return hashlib.sha256(head + array.array("q", [*prompt_ids, *answer_ids]).tobytes()).digest()


def keyed(pair: Pair, side: Side) -> bytes:
    """Return the `sequence_key` of one answer of a pair."""
    return sequence_key(pair["prompt_ids"], pair[IDS[side]])


def known_scores(pairs: Iterable[Pair], policy: Reference) -> dict[bytes, float]:
    """Return the cached log-probabilities (nats) under a policy, by `sequence_key`."""
    return {
        keyed(pair, side): score
        for pair in pairs
        for side in SIDES
        if (score := pair[SCORES[policy][side]]) is not None
    }


def counts(pairs: Sequence[Pair]) -> PairCounts:
    """Count a set of pairs: totals, by round, by iterate, and the unusual ones."""

    def by(column: Literal["round", "iterate"]) -> dict[str, int]:
        return {str(value): n for value, n in sorted(Counter(pair[column] for pair in pairs).items())}

    return {
        "pairs": len(pairs),
        "by_round": by("round"),
        "by_iterate": by("iterate"),
        "generated_truncated": sum(pair["generated_truncated"] for pair in pairs),
        "real_truncated": sum(pair["real_truncated"] for pair in pairs),
        # An empty answer has at most an end-of-turn.
        "empty_generated": sum(len(pair["generated_ids"]) <= (not pair["generated_truncated"]) for pair in pairs),
        # The margin of equal answers is zero under every policy. They teach nothing, and stay to keep the shares.
        "identical": sum(pair["real_ids"] == pair["generated_ids"] for pair in pairs),
        "real_tokens": sum(len(pair["real_ids"]) for pair in pairs),
        "generated_tokens": sum(len(pair["generated_ids"]) for pair in pairs),
    }
