"""The answers of a round, assigned to policies and cut into shards.

Decides: the policy behind each (prompt, answer), the seed of each answer, which answers form a shard, and the columns
of a shard's file. Every choice is a function of the run's seed and of names, so that a restart, another machine or
another order gives the same result.
Leaves out: decoding (`generation.engine`), committing (`generation.worker`), weights (`selfplay.opponent`).

Prompts are not held in memory: an answer takes a few bytes here, and a shard's prompts are read when it begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spinreg_core.data.split import IntArray, seeded_order
from spinreg_core.generation.engine import Answer
from spinreg_core.selfplay.opponent import draw_iterate, draws_mixture, draws_replay

SHARD_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("answer", pa.int32()),  # number of the answer to its prompt, from 0
        ("iterate", pa.int32()),
        ("geometric", pa.bool_()),  # sampled from the iterate's token-level mixture with the base
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),  # nats, of each sampled token; see `engine.Answer`
        ("text", pa.string()),
        ("finish", pa.string()),
        ("policy", pa.string()),  # object id
        ("seed", pa.int64()),
    ]
)


class ShardMeta(TypedDict):
    """The `meta` of a committed shard.

    drawn           SHA-256 of the sampled tokens, without log-probabilities: their last digits depend on the batch
    prompts         answers (a prompt may have several)
    tokens          sampled tokens
    truncated       answers cut off by the length limit
    empty           answers without text other than blanks
    invalid_text    answers that are not valid UTF-8
    iterate, geometric          their source
    seconds, startup_seconds    of answering, and of loading policies
    """

    drawn: str
    prompts: int
    tokens: int
    truncated: int
    empty: int
    invalid_text: int
    iterate: int
    geometric: bool
    seconds: float
    startup_seconds: float


@dataclass(frozen=True, order=True)
class Source:
    """The sampler of an answer: an iterate, or its geometric mixture with the base."""

    iterate: int
    geometric: bool


@dataclass(frozen=True)
class Shard:
    """Answers of one source that are sampled and committed together."""

    number: int
    source: Source
    # Indices into the rows file, ascending; a prompt with several answers repeats.
    rows: NDArray[np.int64]
    answers: NDArray[np.int64]

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"


def answer_seed(*, seed: int, round_number: int, kind: str, prompt_id: str, answer: int) -> int:
    """Return the seed of one answer, in [0, 2**63). It leaves the policy out, so equal policies give equal answers."""
    text = json.dumps(["spinreg answer", seed, round_number, kind, prompt_id, answer])
    # The column `seed` of a shard is a signed 64-bit integer.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def drawn_sources(
    prompt_ids: Sequence[str],
    answers: int,
    weights: Sequence[float],
    *,
    geometric_share: float,
    replay_share: float,
    round_number: int,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw the sources of a round's answers. Rounds count from 1.

    Iterate round - 1 - k has probability weights[k]. The base's mixture with itself is the base.

    Returns:
        Three arrays [prompts, answers]: iterate; geometric; and replayed, true where a pair of an earlier round
        replaces the answer.
    """
    t = round_number - 1
    iterates = np.empty((len(prompt_ids), answers), np.int64)
    geometric, replayed = np.zeros((2, len(prompt_ids), answers), bool)
    for i, name in enumerate(prompt_ids):
        for k in range(answers):
            of: dict[str, Any] = {"seed": seed, "round_index": t, "prompt_id": name, "answer_index": k}
            age = draw_iterate(weights, **of)
            iterates[i, k] = t - age
            geometric[i, k] = age < t and draws_mixture(geometric_share, **of)
            replayed[i, k] = age > 0 and draws_replay(replay_share, **of)
    return iterates, geometric, replayed


def make_shards(
    rows: NDArray[np.int64],
    iterates: NDArray[np.int64],
    geometric: NDArray[np.bool_],
    size: int,
    replayed: NDArray[np.bool_] | None = None,
) -> list[Shard]:
    """Cut the answers into shards of at most `size`, each of one source: sources ascending, rows ascending.

    rows: [prompts]. iterates, geometric, replayed: [prompts, answers]; replayed answers are in no shard.
    """
    count, answers = iterates.shape
    which = np.repeat(rows, answers), np.tile(np.arange(answers), count), iterates.ravel(), geometric.ravel()
    if replayed is not None:
        which = tuple(x[~replayed.ravel()] for x in which)  # type: ignore[assignment]
    order = np.lexsort((which[1], which[0], which[3], which[2]))
    row, answer, iterate, mixed = (x[order] for x in which)
    shards: list[Shard] = []
    edges = np.flatnonzero((np.diff(iterate) != 0) | (np.diff(mixed) != 0)) + 1
    for begin, end in zip([0, *edges], [*edges, len(order)], strict=True):
        for start in range(begin, end, size):
            part = slice(start, min(start + size, end))
            source = Source(int(iterate[begin]), bool(mixed[begin]))
            shards.append(Shard(len(shards), source, row[part], answer[part]))
    return shards


class Rows:
    """Reads the prompts of shards from a rows file. Holds one row group of the file in memory."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        groups = self._file.metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._held: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def names(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the prompt_id of each row, in the given order."""
        table = self._file.read(columns=["prompt_id"])
        return list(table["prompt_id"].take(pa.array(rows)).to_pylist())

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Return prompt_id and prompt_ids of rows, which must ascend."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        parts = []
        for number in np.unique(groups):
            if self._held is None or self._held[0] != number:
                self._held = (int(number), self._file.read_row_group(number, columns=["prompt_id", "prompt_ids"]))
            parts.append(self._held[1].take(pa.array(rows[groups == number] - self._starts[number])))
        return pa.concat_tables(parts)


def write_shard(
    path: Path,
    shard: Shard,
    rows: pa.Table,
    answers: list[Answer],
    texts: list[str],
    seeds: list[int],
    *,
    policy: str,
    settings: dict[str, Any],
) -> None:
    """Write a shard's file: SHARD_SCHEMA, with the sampler's settings as JSON under `spinreg` in its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(answers)
    columns = {
        "prompt_id": rows["prompt_id"],
        "answer": shard.answers,
        "iterate": [shard.source.iterate] * count,
        "geometric": [shard.source.geometric] * count,
        "prompt_ids": rows["prompt_ids"],
        "answer_ids": [a.token_ids for a in answers],
        "logprobs": [a.logprobs for a in answers],
        "text": texts,
        "finish": [a.finish for a in answers],
        "policy": [policy] * count,
        "seed": seeds,
    }
    pq.write_table(pa.table(columns, SHARD_SCHEMA.with_metadata({"spinreg": json.dumps(settings)})), path)


def shard_meta(
    source: Source, answers: list[Answer], texts: list[str], *, seconds: float, startup_seconds: float
) -> ShardMeta:
    drawn = json.dumps([[a.token_ids, a.finish] for a in answers]).encode()
    return {
        "drawn": hashlib.sha256(drawn).hexdigest(),
        "prompts": len(answers),
        "tokens": sum(len(a.token_ids) for a in answers),
        "truncated": sum(a.finish == "length" for a in answers),
        "empty": sum(not text.strip() for text in texts),
        "invalid_text": sum("\ufffd" in text for text in texts),
        "iterate": source.iterate,
        "geometric": source.geometric,
        "seconds": round(seconds, 3),
        "startup_seconds": round(startup_seconds, 3),
    }


def round_prompts(
    n: int, prompts_per_round: int | None, round_number: int, mode: Literal["fresh", "same"], seed: int
) -> IntArray:
    """Return the indices of a round's prompts among the n training rows, int64. Rounds count from 1.

    fresh   Consecutive pieces of one seeded permutation after another, each a full pass over the rows. A round that
            spans two passes takes no row twice: the next pass moves the rows of that round to its end.
    same    The first piece, in every round.

    `prompts_per_round` of None, or of n and more, gives all n rows.
    """
    if prompts_per_round is None or prompts_per_round >= n:
        return np.arange(n)
    m = prompts_per_round
    begin = 0 if mode == "same" else (round_number - 1) * m
    taken: list[IntArray] = []
    # The rows that a round across two passes took from the first of them.
    straddling = np.zeros(n, bool)
    for number in range((begin + m - 1) // n + 1):
        ranks = np.fromiter((int.from_bytes(seeded_order(seed, number, i)[:8]) for i in range(n)), np.uint64, n)
        order = np.lexsort((ranks, straddling))
        low = begin - number * n
        taken.append(order[max(low, 0) : max(low + m, 0)])
        straddling = np.zeros(n, bool)
        straddling[order[n - (number + 1) * n % m :]] = bool((number + 1) * n % m)
    return np.concatenate(taken)
