"""Pairs of a human and a generated answer to one prompt: how they are joined, cut, chosen and stored.

Decides: the columns of `pairs.parquet`, the three ways to treat answers cut off by the length limit, which pairs
of earlier rounds come back, and which cached scores may stand for a row.
Leaves out: weights and draws (`opponent.py`), scoring (`logprobs/scoring.py`), the loss (`loss.py`).
Imports no torch: a pair is a plain dict with the columns of PAIRS_SCHEMA.
"""

from __future__ import annotations

import array
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.selfplay.opponent import choose, replay_quota

Pair = dict[str, Any]
SCORES = ("previous_real", "previous_generated", "base_real", "base_generated")
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
        *((name, pa.float64()) for name in SCORES),  # sums in nats; null where the loss does not read them
    ]
)


def make_pairs(
    generations: Iterable[Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]], round_number: int
) -> list[Pair]:
    """Pairs of one round's generations (columns of *generations*) with the human answers of their prompts.

    `rows` maps prompt_id to a data row. Pairs keep the order of the generations; their scores are None.
    Raises Damaged where a prompt is unknown, an answer is there twice, or was given to other prompt tokens.
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
            **dict.fromkeys(SCORES),
        }
    return list(pairs.values())


def treat_truncated(pairs: Iterable[Pair], treatment: Literal["keep", "drop", "clip_real"]) -> list[Pair]:
    """The pairs as they are trained on, given what happens where the generated answer was cut off at n tokens.

    keep        nothing changes.
    drop        the pair is left out.
    clip_real   a human answer longer than n keeps its first n tokens, so it has no end-of-turn and counts as
                truncated. One that ends within n tokens stays whole: that the human was done by then is a
                difference between the two answers, not an artefact of the limit.

    Pairs whose generated answer is finished are never changed.
    """
    if treatment == "keep":
        return list(pairs)
    if treatment == "drop":
        return [pair for pair in pairs if not pair["generated_truncated"]]
    found = []
    for pair in pairs:
        limit = len(pair["generated_ids"])
        if pair["generated_truncated"] and len(pair["real_ids"]) > limit:
            pair = pair | {"real_ids": pair["real_ids"][:limit], "real_truncated": True}
        found.append(pair)
    return found


def replay(by_round: Sequence[Sequence[Pair]], weights: Sequence[float], *, seed: int, round_number: int) -> list[Pair]:
    """The pairs of this and earlier rounds (newest first) that make up the opponent with these weights.

    The shares of the rounds are the weights, and the total is what the scarcest round allows
    (`opponent.replay_quota`). Raises BadInput where a round that has weight has no pair.
    """
    available = [len(pairs) for pairs in by_round]
    empty = [round_number - k for k, (w, n) in enumerate(zip(weights, available, strict=True)) if w > 0 and n == 0]
    if empty:
        raise BadInput(
            f"pairs of round {round_number}",
            f"no usable pair of round {', '.join(map(str, empty))}",
            "at least one pair of every round the opponent averages over (see opponent.truncated and "
            "generation.max_new_tokens)",
        )
    found: list[Pair] = []
    for k, (pairs, count) in enumerate(zip(by_round, replay_quota(weights, available), strict=True)):
        by_name = {pair["pair_id"].partition(":")[2]: pair for pair in pairs}
        iterate = round_number - 1 - k
        chosen = choose(list(by_name), count, seed=seed, round_index=round_number - 1, iterate=iterate)
        found += [by_name[name] for name in chosen]
    return found


def replay_iterates(
    earlier: Iterable[Sequence[Pair]], wanted: Mapping[int, int], *, seed: int, round_number: int
) -> list[Pair]:
    """Pairs of earlier rounds by the iterate that answered: `wanted[n]` of iterate n, or all there are of it if less.

    earlier: the pairs of each round. They are chosen without replacement (`opponent.choose`), newest iterate first.
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
    """What a score belongs to: SHA-256 of the tokens. Not the pair's id, because clipping changes an answer."""
    head = len(prompt_ids).to_bytes(8, "little")
    return hashlib.sha256(head + array.array("q", [*prompt_ids, *answer_ids]).tobytes()).digest()


def keyed(pair: Mapping[str, Any], which: str) -> bytes:
    """The key of a pair's `real` or `generated` answer."""
    return sequence_key(pair["prompt_ids"], pair[f"{which}_ids"])


def known_scores(pairs: Iterable[Mapping[str, Any]], policy: Literal["previous", "base"]) -> dict[bytes, float]:
    """The cached log-probabilities of earlier pairs under a policy, by `sequence_key`."""
    return {
        keyed(pair, which): pair[f"{policy}_{which}"]
        for pair in pairs
        for which in ("real", "generated")
        if pair[f"{policy}_{which}"] is not None
    }


def counts(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What is in a set of pairs: totals, by round, by iterate, and the odd ones."""

    def by(column: str) -> dict[str, int]:
        return {str(value): n for value, n in sorted(Counter(pair[column] for pair in pairs).items())}

    return {
        "pairs": len(pairs),
        "by_round": by("round"),
        "by_iterate": by("iterate"),
        "generated_truncated": sum(pair["generated_truncated"] for pair in pairs),
        "real_truncated": sum(pair["real_truncated"] for pair in pairs),
        # Nothing but an end-of-turn, or nothing at all.
        "empty_generated": sum(len(pair["generated_ids"]) <= (not pair["generated_truncated"]) for pair in pairs),
        # Their margin is zero whatever the policy: they teach nothing and are kept, so that shares stay what they are.
        "identical": sum(pair["real_ids"] == pair["generated_ids"] for pair in pairs),
        "real_tokens": sum(len(pair["real_ids"]) for pair in pairs),
        "generated_tokens": sum(len(pair["generated_ids"]) for pair in pairs),
    }
