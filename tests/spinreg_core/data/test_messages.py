"""Conversations with tools and thoughts, in the forms that data sets have them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spinreg_core.config import DataConfig
from spinreg_core.data.formats import Row, choose_layout, read_rows
from spinreg_core.data.load import load_rows

ASKED = {"role": "user", "content": "Rain?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
OPENAI = [
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "dry"},
    {"role": "assistant", "content": "No.", "reasoning_content": "It is dry."},
]  # fmt: skip
SHAREGPT = [
    {"from": "human", "value": "Rain?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
    {"from": "observation", "value": "dry"},
    {"from": "gpt", "value": "No."},
]


def rows(record: dict[str, Any], turns: Any = "last") -> list[Row]:
    return read_rows(record, 1, choose_layout(set(record), DataConfig(), "dataset"), turns)


def test_read_rows_keeps_tool_calls_and_thoughts() -> None:
    (row,) = rows({"messages": OPENAI, "tools": TOOLS})
    said = {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "c1"}]}
    assert row.messages == (ASKED, said, {"role": "tool", "content": "dry", "tool_call_id": "c1"})
    assert row.reply == {"role": "assistant", "content": "No.", "reasoning_content": "It is dry."}
    assert row.tools == TOOLS


def test_read_rows_makes_a_call_an_answer() -> None:
    calling, telling = rows({"messages": OPENAI}, "all")
    assert calling.messages == (ASKED,)
    assert (calling.answer, calling.extras) == ("", {"tool_calls": [CALL | {"id": "c1"}]})
    assert calling.tools is None
    assert telling.answer == "No."
    assert calling.opening_hash == telling.opening_hash


def test_read_rows_parses_calls_of_sharegpt() -> None:
    calling, telling = rows({"conversations": SHAREGPT}, "all")
    assert calling.extras == {"tool_calls": [CALL]}
    assert [m["role"] for m in telling.messages] == ["user", "assistant", "tool"]
    assert rows({"conversations": json.dumps(SHAREGPT), "tools": json.dumps(TOOLS)})[0].tools == TOOLS


@pytest.mark.parametrize("absent", [None, "", [], "[]"])
def test_read_rows_ignores_nulls_of_parquet(absent: Any) -> None:
    """Every turn has every field there, most of them null."""
    empty = {"tool_calls": None, "tool_call_id": None, "reasoning_content": None, "name": ""}
    record = {"messages": [empty | turn for turn in OPENAI], "tools": absent}
    assert rows(record, "all") == rows({"messages": OPENAI}, "all")


def test_load_rows_of_arrow_records_removes_added_nulls(tmp_path: Path) -> None:
    """Two calls in one column get each other's arguments as nulls, and a bare tool beside a wrapped one a null too."""
    calls = [{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "add", "arguments": {"a": 1, "b": 2}}]
    tools = [TOOLS[0], {"name": "add", "parameters": {"type": "object"}}]
    records = [
        {
            "messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}],
            "tools": [tool],
        }
        for call, tool in zip(calls, tools, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    found = load_rows(str(tmp_path / "rows.parquet"), DataConfig())
    assert not found.rejected
    assert [row.extras["tool_calls"][0]["function"] for row in found.rows] == calls
    assert [row.tools for row in found.rows] == [[tool] for tool in tools]
    kept = rows({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "f", "arguments": '{"a": null}'}}]}]})[0]  # fmt: skip
    assert kept.extras["tool_calls"][0]["function"]["arguments"] == {"a": None}, "said, not made up by Arrow"


@pytest.mark.parametrize("none", ["", "[]", "null", None, []])
def test_read_rows_with_empty_calls_gives_a_plain_answer(none: Any) -> None:
    (row,) = rows({"messages": [ASKED, {"role": "assistant", "content": "No.", "tool_calls": none}]})
    assert (row.answer, row.extras) == ("No.", {})


def test_row_hashes_cover_tools_calls_and_thoughts() -> None:
    other = json.loads(json.dumps(OPENAI).replace("Ulm", "Bonn"))
    plain, tools, call = (
        rows(r)[0] for r in ({"messages": OPENAI}, {"messages": OPENAI, "tools": TOOLS}, {"messages": other})
    )
    assert len({plain.prompt_hash, tools.prompt_hash, call.prompt_hash}) == 3
    thought = rows({"messages": [*OPENAI[:-1], OPENAI[-1] | {"reasoning_content": "Hm."}]})[0]
    assert thought.prompt_hash == plain.prompt_hash
    assert thought.content != plain.content
