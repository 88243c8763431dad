"""Token ids of checked rows, and the Parquet files that later stages read.

Decides: the columns of train.parquet and heldout.parquet, and the length limits.
Leaves out: rendering (`models`), the choice of rows (`load`, `split`).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spinreg_core.config import DataConfig
from spinreg_core.data.formats import Rejected, Row, final_answer
from spinreg_core.errors import BadInput
from spinreg_core.models.messages import Message

if TYPE_CHECKING:
    from spinreg_core.models.chat_template import Renderer


# Rows of a row group. Stages read the row groups of their shard, not the whole file.
_GROUP = 1000
ROWS_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source_row", pa.int64()),
        ("messages", pa.string()),
        ("answer", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("answer_truncated", pa.bool_()),
        ("final_answer", pa.string()),
    ]
)


@dataclass(frozen=True)
class EncodedRow:
    """A row as token ids: the columns of ROWS_SCHEMA but `prompt_id`, and how many of its oldest turns were dropped."""

    source_row: int
    messages: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]
    answer_truncated: bool
    final_answer: str | None
    dropped_turns: int


def encode_row(
    row: Row, renderer: Renderer, config: DataConfig, mode: Literal["auto", "gsm8k", "none"]
) -> EncodedRow | Rejected:
    """Return a row as token ids, or the reason why it is refused.

    A row is refused if its prompt is too long or if the template does not render it. With `long_prompts: drop_oldest`,
    a long prompt first loses as many of its oldest turns as it can. A human answer that does not fit `max_length` is
    cut, gets no end-of-turn token, and is marked as truncated.
    """
    messages, dropped = list(row.messages), 0
    try:
        prompt = renderer.prompt_ids(messages, row.tools)
        if len(prompt) > config.max_prompt_tokens and config.long_prompts == "drop_oldest":
            dropped = _turns_to_drop(row, renderer, config.max_prompt_tokens)
            messages = without_oldest_turns(messages, dropped)
            prompt = renderer.prompt_ids(messages, row.tools)
        answer = renderer.answer_ids(messages, row.reply, row.tools)
    except BadInput as error:
        return Rejected(row.source_row, "template", str(error))
    if len(prompt) > config.max_prompt_tokens:
        detail = f"{len(prompt)} tokens; at most {config.max_prompt_tokens}"
        return Rejected(row.source_row, "prompt_too_long", detail)
    room = config.max_length - len(prompt)
    return EncodedRow(
        source_row=row.source_row,
        messages=json.dumps(messages, ensure_ascii=False),
        answer=row.answer,
        prompt_ids=prompt,
        answer_ids=answer[:room],
        answer_truncated=len(answer) > room,
        final_answer=final_answer(row.answer, mode),
        dropped_turns=dropped,
    )


def prompt_ids_of(stems: NDArray[np.bytes_]) -> Iterator[str]:
    """Yield the `prompt_id` of each row: its stem (16 hex digits of the prompt hash), with -2, -3, ... if repeated."""
    _, which, counts = np.unique(stems, return_inverse=True, return_counts=True)
    seen: Counter[bytes] = Counter()
    for stem, repeats in zip(stems, counts[which] > 1, strict=True):
        # Only the few repeated stems are kept in memory.
        if repeats:
            seen[stem] += 1
        yield stem.decode() if seen[stem] < 2 else f"{stem.decode()}-{seen[stem]}"


def without_oldest_turns(messages: Sequence[Message], turns: int) -> list[Message]:
    """Return a conversation without its first `turns` turns. System messages stay, wherever they are.

    A turn is a user's message with all messages up to the next one.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    first = users[turns]
    return [m for i, m in enumerate(messages) if i >= first or i < users[0] or m["role"] == "system"]


def _turns_to_drop(row: Row, renderer: Renderer, limit: int) -> int:
    """Return the smallest number of turns without which the prompt fits, or all but the last turn if none does."""
    most = sum(message["role"] == "user" for message in row.messages) - 1

    def fits(turns: int) -> bool:
        return len(renderer.prompt_ids(without_oldest_turns(row.messages, turns), row.tools)) <= limit

    return min(bisect_left(range(most + 1), True, key=fits), most)


def write_encoded(path: Path, rows: Iterable[EncodedRow]) -> None:
    """Write a Parquet file of ROWS_SCHEMA in which `prompt_id` is null."""
    remaining = iter(rows)
    with pq.ParquetWriter(path, ROWS_SCHEMA) as writer:
        while group := [vars(row) for row in islice(remaining, _GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=ROWS_SCHEMA))


def write_chosen_rows(source: Path, chosen: NDArray[np.int64], prompt_ids: Iterable[str], path: Path) -> None:
    """Write some rows of a file, by their places in it (ascending), to a file of their own with their `prompt_id`."""
    names, first = iter(prompt_ids), 0
    waiting = ROWS_SCHEMA.empty_table()
    with pq.ParquetFile(source) as file, pq.ParquetWriter(path, ROWS_SCHEMA) as writer:
        for batch in file.iter_batches(_GROUP):
            low, high = np.searchsorted(chosen, [first, first + batch.num_rows])
            part = pa.Table.from_batches([batch]).take(pa.array(chosen[low:high] - first))
            own = pa.array(islice(names, part.num_rows), pa.string())
            waiting = pa.concat_tables([waiting, part.set_column(0, "prompt_id", own)])
            while waiting.num_rows >= _GROUP:
                writer.write_table(waiting.slice(0, _GROUP))
                waiting = waiting.slice(_GROUP)
            first += batch.num_rows
        if waiting.num_rows:
            writer.write_table(waiting)


def length_distribution(values: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
    """Return mean, median, 95th percentile (nearest rank) and maximum of lengths."""
    lengths = np.asarray(values, np.int64)
    if not len(lengths):
        return {"mean": 0.0, "median": 0, "p95": 0, "max": 0}
    median, p95, longest = np.percentile(lengths, (50, 95, 100), method="inverted_cdf").tolist()
    return {"mean": round(float(lengths.mean()), 1), "median": median, "p95": p95, "max": longest}
