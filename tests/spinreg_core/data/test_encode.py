"""Rows as token ids: the length limits, and what later stages rely on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_models import TEMPLATES, chat_tokenizer

from spinreg_core.config import DataConfig
from spinreg_core.data.encode import ROWS_SCHEMA, encode_rows, rows_table, spread
from spinreg_core.data.formats import Row
from spinreg_core.render import Renderer


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(chat_tokenizer("byte_bpe", TEMPLATES["no_system"]))


def row(number: int, prompt: str, answer: str, system: str | None = None) -> Row:
    head = [] if system is None else [{"role": "system", "content": system}]
    return Row(number, (*head, {"role": "user", "content": prompt}), answer)


def test_rows_become_the_ids_that_generation_uses(renderer: Renderer) -> None:
    rows = [row(1, "Hello </s>", "Hi <|im_end|>"), row(2, "a", "b\n#### 7"), row(5, "Hello </s>", "Other")]
    encoded, rejected = encode_rows(rows, renderer, DataConfig(), "auto")
    assert not rejected
    table = rows_table(rows, encoded)
    assert table.schema == ROWS_SCHEMA
    for found, source in zip(table.to_pylist(), rows, strict=True):
        messages = json.loads(found["messages"])
        assert messages == list(source.messages)
        assert found["prompt_ids"] == renderer.prompt_ids(messages)
        assert found["answer_ids"].count(renderer.end_of_turn) == 1
        assert renderer.decode(found["answer_ids"]) == source.answer
        assert not found["answer_truncated"]
    assert table["source_row"].to_pylist() == [1, 2, 5]
    assert table["final_answer"].to_pylist() == [None, "7", None]
    names = table["prompt_id"].to_pylist()
    assert names[2] == f"{names[0]}-2"


def test_the_limits(renderer: Renderer) -> None:
    config = DataConfig(max_prompt_tokens=40, max_length=48)
    long = row(1, "x " * 60, "a")
    fits, whole = row(2, "Hello", "word " * 60), row(3, "Hello", "ok")
    encoded, rejected = encode_rows([long, fits, whole, row(4, "Hello", "a", "system")], renderer, config, "none")
    assert [(bad.row, bad.reason) for bad in rejected] == [(1, "prompt_too_long"), (4, "template")]
    assert "at most 40" in rejected[0].detail
    assert "System role not supported" in rejected[1].detail
    (_, cut), (_, kept) = encoded
    assert cut["answer_truncated"]
    assert len(cut["prompt_ids"]) + len(cut["answer_ids"]) == 48
    assert renderer.end_of_turn not in cut["answer_ids"]
    assert cut["answer_ids"] == renderer.answer_ids(list(fits.messages), fits.answer)[: len(cut["answer_ids"])]
    assert not kept["answer_truncated"]
    assert kept["answer_ids"][-1] == renderer.end_of_turn


def test_long_conversations_lose_their_oldest_turns_where_asked() -> None:
    renderer = Renderer(chat_tokenizer("byte_bpe", TEMPLATES["chatml"]))
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": role, "content": f"{role} {i} " + "word " * 4} for i in range(5) for role in ("user", "assistant")
    ]
    conversation = [system, *turns[:-1]]  # ends with the fifth user turn
    source = Row(1, tuple(conversation), "An answer.")
    whole = len(renderer.prompt_ids(conversation))
    limits = {"max_prompt_tokens": whole - 1, "max_length": 1000}
    refused = encode_rows([source], renderer, DataConfig(**limits), "none")
    assert [bad.reason for bad in refused[1]] == ["prompt_too_long"]
    ((_, record),), rejected = encode_rows([source], renderer, DataConfig(long_prompts="drop_oldest", **limits), "none")
    assert not rejected
    assert json.loads(record["messages"]) == [system, *turns[2:-1]], "one turn was enough"
    assert record["prompt_ids"] == renderer.prompt_ids([system, *turns[2:-1]])
    last = len(renderer.prompt_ids([system, turns[-2]]))
    for limit, reasons in ((last, []), (last - 1, ["prompt_too_long"])):
        config = DataConfig(long_prompts="drop_oldest", max_prompt_tokens=limit, max_length=1000)
        encoded, rejected = encode_rows([source], renderer, config, "none")
        assert [bad.reason for bad in rejected] == reasons
        assert all(json.loads(found["messages"]) == [system, turns[-2]] for _, found in encoded)


@pytest.mark.parametrize("room", [0, 1])
def test_an_answer_that_just_fits_is_whole(renderer: Renderer, room: int) -> None:
    source = row(1, "Hello", "word " * 20)
    messages = list(source.messages)
    prompt, answer = len(renderer.prompt_ids(messages)), len(renderer.answer_ids(messages, source.answer))
    config = DataConfig(max_prompt_tokens=prompt, max_length=prompt + answer - 1 + room)
    ((_, found),), _ = encode_rows([source], renderer, config, "none")
    assert found["answer_truncated"] == (room == 0)
    assert len(found["answer_ids"]) == answer - 1 + room
    assert (renderer.end_of_turn in found["answer_ids"]) == (room == 1)


def test_spread() -> None:
    expected: dict[str, Any] = {"mean": 50.5, "median": 50, "p95": 95, "max": 100}
    assert spread(range(100, 0, -1)) == expected
    assert spread([3]) == {"mean": 3.0, "median": 3, "p95": 3, "max": 3}
    assert spread([])["max"] == 0
