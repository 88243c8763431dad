"""Layouts, turns, bad rows and final answers."""

from __future__ import annotations

import datetime
import hashlib
import json
from typing import Any

import pytest

from spinreg_core.config import DataConfig
from spinreg_core.data.formats import REASONS, Layout, Row, choose_layout, final_answer, read_rows
from spinreg_core.data.messages import RowProblem
from spinreg_core.errors import BadInput

MESSAGES = Layout("messages", ("messages",))
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def rows(record: Any, turns: Any = "last") -> list[Row]:
    layout = choose_layout(set(record), DataConfig(), "dataset")
    return read_rows(record, 1, layout, turns)


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"messages": CHAT[1:3]}, "One?", "1"),
        ({"messages": json.dumps(CHAT[1:3])}, "One?", "1"),
        ({"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]}, "One?", "1"),
        ({"conversations": [{"from": "user", "value": "One?"}, {"from": "chatgpt", "value": "1"}]}, "One?", "1"),
        ({"conversation": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]}, "One?", "1"),
        ({"instruction": "Add.", "input": "1+1", "output": "2"}, "Add.\n\n1+1", "2"),
        ({"instruction": "Say hi.", "input": "", "output": "hi"}, "Say hi.", "hi"),
        ({"instruction": "Say hi.", "input": None, "output": "hi"}, "Say hi.", "hi"),
        ({"instruction": "Say hi.", "output": "hi"}, "Say hi.", "hi"),
        ({"prompt": "One?", "response": "1"}, "One?", "1"),
        ({"prompt": "One?", "answer": "1"}, "One?", "1"),
        ({"question": "One?", "answer": "1"}, "One?", "1"),
        ({"prompt": "One?", "completion": "1"}, "One?", "1"),
        ({"prompt": "ignored", "prompt_id": "x", "messages": CHAT[1:3]}, "One?", "1"),  # ultrachat_200k
    ],
)
def test_choose_layout_finds_every_layout_by_its_columns(record: dict[str, Any], prompt: str, answer: str) -> None:
    (row,) = rows(record)
    assert [dict(m) for m in row.messages] == [{"role": "user", "content": prompt}]
    assert row.answer == answer


def test_choose_layout_prefers_named_columns() -> None:
    config = DataConfig(prompt_column="q", response_column="a")
    layout = choose_layout({"q", "a", "messages"}, config, "dataset")
    assert layout == Layout("prompt_response", ("q", "a"))
    assert read_rows({"q": "One?", "a": "1"}, 3, layout, "last")[0].answer == "1"
    with pytest.raises(BadInput, match=r"has the columns b, q and not a; set data\.prompt_column"):
        choose_layout({"q", "b"}, config, "dataset")


def test_choose_layout_of_unknown_columns_lists_them() -> None:
    with pytest.raises(BadInput, match=r"dataset x has the columns text, url; expected one of these layouts: messages"):
        choose_layout({"url", "text"}, DataConfig(), "dataset x")
    with pytest.raises(BadInput, match=r"expected the columns of data\.format instruction: instruction and output"):
        choose_layout({"prompt", "response"}, DataConfig(format="instruction"), "dataset x")


def test_read_rows_returns_the_configured_turns() -> None:
    assert [(len(r.messages), r.answer) for r in rows({"messages": CHAT}, "last")] == [(4, "2")]
    assert [(len(r.messages), r.answer) for r in rows({"messages": CHAT}, "first")] == [(2, "1")]
    both = rows({"messages": CHAT}, "all")
    assert [(len(r.messages), r.answer) for r in both] == [(2, "1"), (4, "2")]
    assert list(both[1].messages) == CHAT[:4]
    assert both[0].opening_hash == both[1].opening_hash != both[1].prompt_hash
    trailing = [*CHAT, {"role": "user", "content": "Three?"}]
    assert rows({"messages": trailing}, "last")[0].answer == "2"


def turn(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def calling(name: Any, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def answering(**fields: Any) -> dict[str, Any]:
    return {"messages": [turn("user", "x"), turn("assistant", fields.pop("content", "x")) | fields]}


BAD = [
    ("wrong_type", ["not", "a", "record"]),
    ("wrong_type", {"messages": "not a list"}),
    ("wrong_type", {"messages": 7}),
    ("wrong_type", {"messages": ["text"]}),
    ("wrong_type", {"messages": [turn("user", 5), turn("assistant", "x")]}),
    ("wrong_type", {"messages": [turn("user", "x"), turn("assistant", [{"type": "text", "text": "x"}])]}),
    ("missing_column", {"text": "x"}),
    ("missing_role", {"messages": [{"content": "x"}, turn("assistant", "x")]}),
    ("missing_role", {"messages": [turn(None, "x"), turn("assistant", "x")]}),
    ("unknown_role", {"messages": [turn("user", "x"), turn("critic", "x"), turn("assistant", "x")]}),
    ("prompt_not_user", {"messages": [turn("tool", "x"), turn("assistant", "x")]}),
    ("wrong_type", answering(tool_calls=7)),
    ("wrong_type", answering(tool_calls=[{"id": "1"}])),
    ("wrong_type", answering(content=None, tool_calls=[calling("f", "[1]")])),
    ("wrong_type", {"messages": [turn("user", "x"), turn("function_call", "f(1)")]}),
    ("wrong_type", answering() | {"tools": "search"}),
    ("wrong_type", answering() | {"tools": [{"function": "weather"}]}),
    ("wrong_type", answering() | {"tools": [{"type": "function"}]}),
    ("wrong_type", answering(tool_calls=[calling("f", {"day": datetime.date(2026, 1, 1)})])),
    ("empty_answer", answering(content="", tool_calls="[]")),
    ("wrong_type", answering(thinking=["x"])),
    ("broken_utf8", answering(content="", tool_calls=[calling("f", {"a": "\ud83d"})])),
    ("empty_answer", answering(content="", tool_calls=[])),
    ("unknown_role", {"messages": [turn(3, "x")]}),
    ("no_assistant_turn", {"messages": [turn("user", "x")]}),
    ("no_assistant_turn", {"messages": []}),
    ("empty_answer", {"messages": [turn("user", "x"), turn("assistant", " \n")]}),
    ("empty_answer", {"messages": [turn("user", "x"), turn("assistant", None)]}),
    ("empty_prompt", {"messages": [turn("user", "  "), turn("assistant", "x")]}),
    ("prompt_not_user", {"messages": [turn("assistant", "x")]}),
    ("prompt_not_user", {"messages": [turn("system", "x"), turn("assistant", "x")]}),
    ("prompt_not_user", {"messages": [turn("user", "x"), turn("assistant", "x"), turn("assistant", "y")]}),
    ("broken_utf8", {"messages": [turn("user", "x\udcff"), turn("assistant", "x")]}),
    ("broken_utf8", {"messages": [turn("user", "x"), turn("assistant", "\ud83d")]}),
]


@pytest.mark.parametrize(("reason", "record"), BAD)
def test_read_rows_of_a_bad_record_gives_the_reason(reason: str, record: Any) -> None:
    with pytest.raises(RowProblem) as problem:
        read_rows(record, 1, MESSAGES, "last")
    assert problem.value.reason == reason
    assert reason in REASONS
    assert problem.value.detail


def test_read_rows_checks_single_turn_records() -> None:
    for record, reason in [
        ({"prompt": "x", "response": ""}, "empty_answer"),
        ({"prompt": None, "response": "x"}, "empty_prompt"),
        ({"prompt": "x", "response": 4}, "wrong_type"),
        ({"instruction": "x", "input": 4, "output": "y"}, "wrong_type"),
    ]:
        with pytest.raises(RowProblem) as problem:
            rows(record)
        assert problem.value.reason == reason


def test_read_rows_with_one_bad_turn_refuses_the_conversation() -> None:
    broken = [*CHAT, turn("user", "Three?"), turn("assistant", "")]
    with pytest.raises(RowProblem):
        rows({"messages": broken}, "all")
    assert rows({"messages": broken}, "first")[0].answer == "1"


def test_prompt_hash_covers_all_messages() -> None:
    a, b = rows({"prompt": "Ä?", "response": "1"})[0], rows({"prompt": "B?", "response": "1"})[0]
    assert a.prompt_hash == hashlib.sha256('[["user","Ä?"]]'.encode()).hexdigest() != b.prompt_hash
    system = Row(1, ({"role": "system", "content": "x"}, *a.messages), "1")
    assert system.prompt_hash != a.prompt_hash


@pytest.mark.parametrize(
    ("answer", "mode", "expected"),
    [
        ("so 3 + 4 = 7\n#### 7", "auto", "7"),
        ("x\n#### $1,234.50 ", "auto", "$1,234.50"),
        ("x\n#### -3\n", "auto", "-3"),
        ("#### Step one\nDo it.", "auto", None),
        ("Do it.\n#### Paris", "auto", None),
        ("Do it.\n#### Paris", "gsm8k", "Paris"),
        ("x\n#### 7", "none", None),
        ("no mark", "gsm8k", None),
        ("empty\n####", "gsm8k", None),
    ],
)
def test_final_answer_returns_the_marked_text(answer: str, mode: Any, expected: str | None) -> None:
    assert final_answer(answer, mode) == expected
