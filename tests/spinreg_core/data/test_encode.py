"""Rows as token ids: the length limits, and what later stages rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinreg_core.config import DataConfig
from spinreg_core.data.encode import (
    ROWS_SCHEMA,
    EncodedRow,
    encode_row,
    length_distribution,
    prompt_ids_of,
    write_chosen_rows,
    write_encoded,
)
from spinreg_core.data.formats import Rejected, Row
from spinreg_core.models.chat_template import Renderer
from tests.support.chat_models import TEMPLATES, chat_tokenizer


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(chat_tokenizer("byte_bpe", TEMPLATES["no_system"]))


def row(number: int, prompt: str, answer: str, system: str | None = None) -> Row:
    head = [] if system is None else [{"role": "system", "content": system}]
    return Row(number, (*head, {"role": "user", "content": prompt}), answer)


def encoded_rows(
    rows: list[Row], renderer: Renderer, config: DataConfig, mode: Any
) -> tuple[list[EncodedRow], list[Rejected]]:
    found = [encode_row(row, renderer, config, mode) for row in rows]
    return [one for one in found if isinstance(one, EncodedRow)], [one for one in found if isinstance(one, Rejected)]


def test_encode_row_gives_the_ids_that_generation_uses(renderer: Renderer, tmp_path: Path) -> None:
    rows = [row(1, "Hello </s>", "Hi <|im_end|>"), row(2, "a", "b\n#### 7"), row(5, "Hello </s>", "Other")]
    encoded, rejected = encoded_rows(rows, renderer, DataConfig(), "auto")
    assert not rejected
    write_encoded(tmp_path / "all.parquet", encoded)
    stems = np.array([row.prompt_hash[:16] for row in rows], "S16")
    write_chosen_rows(tmp_path / "all.parquet", np.arange(3), prompt_ids_of(stems), tmp_path / "part.parquet")
    table = pq.read_table(tmp_path / "part.parquet")
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


def test_encode_row_beyond_limits_refuses_prompts_and_cuts_answers(renderer: Renderer) -> None:
    config = DataConfig(max_prompt_tokens=40, max_length=48)
    long = row(1, "x " * 60, "a")
    fits, whole = row(2, "Hello", "word " * 60), row(3, "Hello", "ok")
    encoded, rejected = encoded_rows([long, fits, whole, row(4, "Hello", "a", "system")], renderer, config, "none")
    assert [(bad.row, bad.reason) for bad in rejected] == [(1, "prompt_too_long"), (4, "template")]
    assert "at most 40" in rejected[0].detail
    assert "System role not supported" in rejected[1].detail
    cut, kept = encoded
    assert cut.answer_truncated
    assert len(cut.prompt_ids) + len(cut.answer_ids) == 48
    assert renderer.end_of_turn not in cut.answer_ids
    assert cut.answer_ids == renderer.answer_ids(list(fits.messages), fits.answer)[: len(cut.answer_ids)]
    assert not kept.answer_truncated
    assert kept.answer_ids[-1] == renderer.end_of_turn


def test_encode_row_with_drop_oldest_drops_the_oldest_turns() -> None:
    renderer = Renderer(chat_tokenizer("byte_bpe", TEMPLATES["chatml"]))
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": role, "content": f"{role} {i} " + "word " * 4} for i in range(5) for role in ("user", "assistant")
    ]
    conversation = [system, *turns[:-1]]  # ends with the fifth user turn
    source = Row(1, tuple(conversation), "An answer.")
    whole = len(renderer.prompt_ids(conversation))
    limits = {"max_prompt_tokens": whole - 1, "max_length": 1000}
    refused = encoded_rows([source], renderer, DataConfig(**limits), "none")
    assert [bad.reason for bad in refused[1]] == ["prompt_too_long"]
    (record,), rejected = encoded_rows([source], renderer, DataConfig(long_prompts="drop_oldest", **limits), "none")
    assert not rejected
    assert json.loads(record.messages) == [system, *turns[2:-1]], "one turn was enough"
    assert record.prompt_ids == renderer.prompt_ids([system, *turns[2:-1]])
    assert record.dropped_turns == 1
    last = len(renderer.prompt_ids([system, turns[-2]]))
    for limit, reasons in ((last, []), (last - 1, ["prompt_too_long"])):
        config = DataConfig(long_prompts="drop_oldest", max_prompt_tokens=limit, max_length=1000)
        encoded, rejected = encoded_rows([source], renderer, config, "none")
        assert [bad.reason for bad in rejected] == reasons
        assert all(json.loads(found.messages) == [system, turns[-2]] for found in encoded)


@given(turns=st.integers(1, 12), limit=st.integers(20, 400), systems=st.sets(st.integers(0, 12)))
@settings(deadline=None, max_examples=40)
def test_encode_row_drops_no_more_turns_than_necessary(turns: int, limit: int, systems: set[int]) -> None:
    """As the obvious version, which drops one turn after the other; system messages stay, wherever they are."""
    renderer = Renderer(chat_tokenizer("byte_bpe", TEMPLATES["chatml"]))
    said: list[dict[str, Any]] = []
    for i in range(turns):
        said += [{"role": "system", "content": f"rule {i}"}] if i in systems else []
        said += [{"role": "user", "content": f"user {i} " + "w " * (i % 5)}, {"role": "assistant", "content": str(i)}]
    source = Row(1, tuple(said[:-1]), "An answer.")
    config = DataConfig(long_prompts="drop_oldest", max_prompt_tokens=limit, max_length=1000)
    expected = list(source.messages)
    while len(renderer.prompt_ids(expected)) > limit:
        users = [i for i, m in enumerate(expected) if m["role"] == "user"]
        if len(users) == 1:
            break
        between = [m for m in expected[users[0] : users[1]] if m["role"] == "system"]
        expected = [*expected[: users[0]], *between, *expected[users[1] :]]
    found = encode_row(source, renderer, config, "none")
    if len(renderer.prompt_ids(expected)) > limit:
        assert isinstance(found, Rejected)
    else:
        assert isinstance(found, EncodedRow)
        assert json.loads(found.messages) == expected


@pytest.mark.parametrize("room", [0, 1])
def test_encode_row_of_an_answer_that_just_fits_keeps_it_whole(renderer: Renderer, room: int) -> None:
    source = row(1, "Hello", "word " * 20)
    messages = list(source.messages)
    prompt, answer = len(renderer.prompt_ids(messages)), len(renderer.answer_ids(messages, source.answer))
    config = DataConfig(max_prompt_tokens=prompt, max_length=prompt + answer - 1 + room)
    (found,), _ = encoded_rows([source], renderer, config, "none")
    assert found.answer_truncated == (room == 0)
    assert len(found.answer_ids) == answer - 1 + room
    assert (renderer.end_of_turn in found.answer_ids) == (room == 1)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_write_part_of_several_groups_keeps_places_and_groups(tmp_path: Path, share: float) -> None:
    rows = [EncodedRow(i, str(i), "", [], [i, i], False, None, 0) for i in range(3500)]
    places = np.flatnonzero(np.random.default_rng(0).random(len(rows)) < share)
    write_encoded(tmp_path / "all", iter(rows))
    write_chosen_rows(tmp_path / "all", places, (f"p{i}" for i in places), tmp_path / "part")
    found = pq.read_table(tmp_path / "part").to_pylist()
    assert [(r["prompt_id"], r["source_row"], r["answer_ids"]) for r in found] == [(f"p{i}", i, [i, i]) for i in places]
    groups = pq.ParquetFile(tmp_path / "part").metadata
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    assert sum(sizes) == len(places)
    assert all(size == 1000 for size in sizes[:-1]), "stages read the rows of a shard, not the file"


def test_prompt_ids_of_repeated_prompts_are_numbered() -> None:
    stems = np.array(["a" * 16, "b" * 16, "a" * 16, "a" * 16], "S16")
    assert list(prompt_ids_of(stems)) == ["a" * 16, "b" * 16, "a" * 16 + "-2", "a" * 16 + "-3"]


def test_encode_row_trains_on_tools_and_thoughts() -> None:
    renderer = Renderer(chat_tokenizer("byte_bpe", TEMPLATES["tools"]))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "<|im_end|> Ulm"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    asked = {"role": "user", "content": "Rain?"}
    calling = Row(1, (asked,), "", {"tool_calls": [call], "reasoning_content": "Ask."}, tools)
    said = (asked, calling.reply, {"role": "tool", "content": "dry", "name": "weather"})
    telling = Row(2, said, "No.", {}, tools)
    lacks = Row(3, (asked,), "", {"tool_calls": [{"type": "function", "function": {"name": "none", "arguments": {}}}]})
    encoded, rejected = encoded_rows([calling, telling, lacks], renderer, DataConfig(), "none")
    assert not rejected
    answer = renderer.text(encoded[0].answer_ids)
    assert answer.startswith(
        '<think>Ask.</think><call>{"name": "weather", "arguments": {"city": "<|im_end|> Ulm"}}</call>'
    )
    assert encoded[0].answer_ids.count(renderer.end_of_turn) == 1, "text that spells a special token stays text"
    assert '{"name": "weather", "parameters": {}}' in renderer.text(encoded[0].prompt_ids)
    assert "<|im_start|>tool\ndry<|im_end|>" in renderer.text(encoded[1].prompt_ids)
    assert encoded[1].prompt_ids[: len(encoded[0].prompt_ids)] == encoded[0].prompt_ids
    plain = Renderer(chat_tokenizer("byte_bpe", TEMPLATES["chatml"]))
    _, rejected = encoded_rows(
        [calling, telling, Row(4, (asked,), "No.", {"thinking": "Dry."})], plain, DataConfig(), "none"
    )
    assert [bad.reason for bad in rejected] == ["template"] * 3, "a template that knows no tools drops them in silence"
    assert ["write 'weather'" in bad.detail or "write 'Dry.'" in bad.detail for bad in rejected] == [True] * 3


def test_encode_row_refuses_rows_that_the_template_leaves_out() -> None:
    """Names alone do not tell: they may stand in the tool list, or in what the user says."""
    asked = {"role": "user", "content": "Please get it."}
    call = {"type": "function", "function": {"name": "get", "arguments": {"what": "it"}}}
    calling = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    tools = [{"name": "get"}]
    told = Row(1, (asked, calling, {"role": "tool", "content": "dry"}), "It is dry.")
    answers = Row(2, (asked,), "I look.", {"tool_calls": [call]}, tools)
    whole = TEMPLATES["tools"].replace("t.function", "(t.function or t)")
    _, rejected = encoded_rows([told, answers], Renderer(chat_tokenizer("byte_bpe", whole)), DataConfig(), "none")
    assert not rejected
    for without, replaced, bad in (
        ("what tools say", ("{{ m['content'] }}", "{{ m['content'] if m.role != 'tool' }}"), [1]),
        ("calls", ("{{ c.function | tojson }}", ""), [1, 2]),
        ("arguments", ("{{ c.function | tojson }}", "{{ c.function.name }}"), [1, 2]),
        ("texts beside calls", ("{{ m['content'] }}", "{{ m['content'] if not m.tool_calls }}"), [2]),
        ("tools", ("{% if tools %}", "{% if false %}"), [2]),
    ):
        assert replaced[0] in whole, without
        renderer = Renderer(chat_tokenizer("byte_bpe", whole.replace(*replaced)))
        _, rejected = encoded_rows([told, answers], renderer, DataConfig(), "none")
        assert [one.row for one in rejected] == bad, without
        assert all("chat template does not write" in one.detail for one in rejected)


def test_length_distribution_gives_nearest_ranks() -> None:
    expected: dict[str, Any] = {"mean": 50.5, "median": 50, "p95": 95, "max": 100}
    assert length_distribution(range(100, 0, -1)) == expected
    assert length_distribution([3]) == {"mean": 3.0, "median": 3, "p95": 3, "max": 3}
    assert length_distribution([])["max"] == 0
