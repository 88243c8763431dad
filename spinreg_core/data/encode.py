"""Checked rows -> token ids, and the table that the later stages read.

Decides: the columns of train.parquet and heldout.parquet, and the length limits. Leaves out: rendering
(`render.py`), which rows there are (`load.py`, `split.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from spinreg_core.config import DataConfig
from spinreg_core.data.formats import Message, Rejected, Row, final_answer, prompt_ids_of
from spinreg_core.errors import BadInput
from spinreg_core.progress import Progress

if TYPE_CHECKING:
    from spinreg_core.render import Renderer

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


def encode_rows(
    rows: Sequence[Row],
    renderer: Renderer,
    config: DataConfig,
    mode: Literal["auto", "gsm8k", "none"],
    progress: Progress | None = None,
) -> tuple[list[tuple[Row, dict[str, Any]]], list[Rejected]]:
    """Each usable row with its record (columns of ROWS_SCHEMA but `prompt_id`), and the rows refused.

    Refused are rows whose prompt is too long (with `long_prompts: drop_oldest` only where no turn is left to drop; the
    record's `messages` are those that stayed) or which the template does not render. A human answer that does not fit
    `max_length` is cut, without an end-of-turn, and marked as truncated.
    """
    encoded: list[tuple[Row, dict[str, Any]]] = []
    rejected: list[Rejected] = []
    for row in rows:
        if progress is not None:
            progress.update()
        messages = list(row.messages)
        try:
            prompt = renderer.prompt_ids(messages)
            while len(prompt) > config.max_prompt_tokens and config.long_prompts == "drop_oldest":
                shorter = without_oldest_turn(messages)
                if shorter is None:
                    break
                messages, prompt = shorter, renderer.prompt_ids(shorter)
            answer = renderer.answer_ids(messages, row.answer)
        except BadInput as error:
            rejected.append(Rejected(row.source_row, "template", str(error)))
            continue
        if len(prompt) > config.max_prompt_tokens:
            detail = f"{len(prompt)} tokens; at most {config.max_prompt_tokens}"
            rejected.append(Rejected(row.source_row, "prompt_too_long", detail))
            continue
        room = config.max_length - len(prompt)
        record = {
            "source_row": row.source_row,
            "messages": json.dumps(messages, ensure_ascii=False),
            "answer": row.answer,
            "prompt_ids": prompt,
            "answer_ids": answer[:room],
            "answer_truncated": len(answer) > room,
            "final_answer": final_answer(row.answer, mode),
        }
        encoded.append((row, record))
    return encoded, rejected


def without_oldest_turn(messages: Sequence[Message]) -> list[Message] | None:
    """The conversation less its first user message and all up to the next one; system messages before it
    stay. None where only one user message is left."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return None if len(users) < 2 else [*messages[: users[0]], *messages[users[1] :]]


def rows_table(rows: Sequence[Row], encoded: Sequence[tuple[Row, dict[str, Any]]]) -> pa.Table:
    """Some of the encoded rows as a table of ROWS_SCHEMA, prompt ids included."""
    records = {id(row): record for row, record in encoded}
    listed = [records[id(row)] | {"prompt_id": name} for row, name in zip(rows, prompt_ids_of(rows), strict=True)]
    return pa.Table.from_pylist(listed, schema=ROWS_SCHEMA)


def spread(values: Sequence[int]) -> dict[str, float]:
    """Mean, median, 95th percentile (nearest rank) and largest of some lengths."""
    if not values:
        return {"mean": 0.0, "median": 0, "p95": 0, "max": 0}
    ordered = sorted(values)
    rank = -(-95 * len(ordered) // 100) - 1
    mean = round(sum(ordered) / len(ordered), 1)
    return {"mean": mean, "median": ordered[(len(ordered) - 1) // 2], "p95": ordered[rank], "max": ordered[-1]}
