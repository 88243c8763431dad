"""Fields in addition to a layout's columns are used, refused by name or listed, and never dropped silently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import DataConfig
from spinreg_core.data.fields import known_fields
from spinreg_core.data.formats import Row
from spinreg_core.data.load import Loaded, load_rows
from tests.support.builders import make_config

PAIR = {"prompt": "And twice that?", "response": "4"}
ALPACA = {"instruction": "And twice that?", "output": "4"}
TURNS = [{"role": "user", "content": "And twice that?"}, {"role": "assistant", "content": "4"}]
CHAT = {"messages": TURNS}
SHAREGPT = {"conversations": [{"from": "human", "value": "And twice that?"}, {"from": "gpt", "value": "4"}]}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def load(tmp_path: Path, *records: dict[str, Any], turns: str = "last") -> Loaded:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows(str(file), DataConfig.model_validate({"turns": turns}))


def only(loaded: Loaded) -> Row:
    assert loaded.rejected == []
    (row,) = loaded.rows
    return row


def problem(loaded: Loaded) -> tuple[str, str]:
    (bad,) = loaded.rejected
    assert not loaded.rows
    return bad.reason, bad.detail


@pytest.mark.parametrize("record", [PAIR, ALPACA, CHAT, SHAREGPT], ids=["pair", "alpaca", "messages", "sharegpt"])
@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_system_prompt_in_a_column_comes_first(tmp_path: Path, record: dict[str, Any], name: str) -> None:
    row = only(load(tmp_path, record | {name: "Be brief."}))
    assert list(row.messages) == [SYSTEM, TURNS[0]]
    for empty in (None, "", " "):
        assert list(only(load(tmp_path, record | {name: empty})).messages) == TURNS[:1]


def test_system_prompt_in_column_and_turns_must_agree(tmp_path: Path) -> None:
    both = {"messages": [SYSTEM, *TURNS]}
    assert list(only(load(tmp_path, both | {"system": "Be brief. "})).messages) == [SYSTEM, TURNS[0]]
    assert problem(load(tmp_path, both | {"system": "Be long."}))[0] == "two_system_prompts"
    assert problem(load(tmp_path, PAIR | {"system": "A", "system_prompt": "B"}))[0] == "two_system_prompts"


@pytest.mark.parametrize("history", [[["1 + 1?", "2"]], EARLIER, json.dumps([["1 + 1?", "2"]])])
@pytest.mark.parametrize("record", [PAIR, ALPACA], ids=["pair", "alpaca"])
def test_history_gives_earlier_turns(tmp_path: Path, record: dict[str, Any], history: object) -> None:
    row = only(load(tmp_path, record | {"history": history, "system": "Be brief."}))
    assert list(row.messages) == [SYSTEM, *EARLIER, TURNS[0]]
    assert list(only(load(tmp_path, record | {"history": []})).messages) == TURNS[:1]


def test_history_of_another_form_is_a_bad_row(tmp_path: Path) -> None:
    for history in ("as above", [["only one"]], [1]):
        assert problem(load(tmp_path, PAIR | {"history": history}))[0] == "wrong_type"


def test_masked_answers_are_no_answers_to_train_on(tmp_path: Path) -> None:
    masked = {"messages": [*EARLIER[:1], EARLIER[1] | {"masked": False}, TURNS[0], TURNS[1] | {"masked": True}]}
    (row,) = load(tmp_path, masked, turns="all").rows
    assert (list(row.messages), row.answer) == (EARLIER[:1], EARLIER[1]["content"])


@pytest.mark.parametrize("name", ["weight", "training", "train", "loss", "loss_scale", "loss_mask", "trainable"])
def test_answers_with_weight_zero_are_no_answers_to_train_on(tmp_path: Path, name: str) -> None:
    turns = [*EARLIER, TURNS[0], TURNS[1] | {name: 0}]
    assert only(load(tmp_path, {"messages": turns})).answer == "2"
    turns = [EARLIER[0], EARLIER[1] | {name: False}, TURNS[0], TURNS[1] | {name: True}]
    assert [row.answer for row in load(tmp_path, {"messages": turns}, turns="all").rows] == ["4"]
    assert problem(load(tmp_path, {"messages": [TURNS[0], TURNS[1] | {name: 0}]}))[0] == "no_assistant_turn"
    assert problem(load(tmp_path, {"messages": [TURNS[0], TURNS[1] | {name: 0.5}]}))[0] == "unused_field"


def test_functions_of_openai_are_tools_and_calls(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    row = only(load(tmp_path, {"messages": [TURNS[0], call], "functions": [{"name": "add"}]}))
    assert row.tools == [{"name": "add"}]
    assert row.extras["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


REFUSED = [
    *((record, name, ["a.png"]) for record in (PAIR, CHAT) for name in ("image", "images", "videos", "audios")),
    *((record, "documents", [{"text": "x"}]) for record in (PAIR, CHAT)),
    *((record, "chat_template_kwargs", {"enable_thinking": False}) for record in (PAIR, CHAT)),
    *((PAIR, name, "It was in 1789.") for name in ("context", "passage", "article", "choices", "options")),
    (CHAT, "history", [["1 + 1?", "2"]]),
    (CHAT, "loss_mask", [0, 1]),
    (PAIR, "label", False),
    (CHAT, "kto_tag", False),
    (SHAREGPT | {"conversations": SHAREGPT["conversations"][:1]}, "chosen", {"from": "gpt", "value": "4"}),
]


@pytest.mark.parametrize(("record", "name", "value"), REFUSED)
def test_field_that_cannot_be_used_is_a_bad_row(
    tmp_path: Path, record: dict[str, Any], name: str, value: object
) -> None:
    reason, detail = problem(load(tmp_path, record | {name: value}))
    assert reason == "unused_field"
    assert repr(name) in detail
    if name not in ("label", "kto_tag", "chosen"):
        assert only(load(tmp_path, record | {name: None})).answer == "4"


@pytest.mark.parametrize("name", ["images", "train_detail", "training_detail", "prefix"])
def test_field_of_a_turn_that_cannot_be_used_is_a_bad_row(tmp_path: Path, name: str) -> None:
    reason, detail = problem(load(tmp_path, {"messages": [TURNS[0] | {name: ["x"]}, TURNS[1]]}))
    assert (reason, detail.split(":")[0]) == ("unused_field", "turn 1")


def test_other_fields_are_listed_once(tmp_path: Path) -> None:
    turn = TURNS[0] | {"lang": "en", "eot": None}
    loaded = load(tmp_path, {"messages": [turn, TURNS[1]], "id": 1, "context": "x"}, {"messages": TURNS, "source": "y"})
    assert loaded.unused == ["context", "id", "source", "turn: lang"]
    assert load(tmp_path, CHAT, PAIR | CHAT).unused == ["prompt", "response"]


def test_system_turn_without_a_text_is_left_out(tmp_path: Path) -> None:
    assert list(only(load(tmp_path, {"messages": [{"role": "system", "content": None}, *TURNS]})).messages) == TURNS[:1]
    turns = [{"role": "developer", "content": "Be brief."}, *TURNS]
    assert list(only(load(tmp_path, {"messages": turns})).messages) == [SYSTEM, TURNS[0]]


def test_page_has_every_known_field() -> None:
    page = (Path(__file__).parents[3] / "docs/data.md").read_text()
    table = page[page.index("## Other fields of a row") :]
    missing = {name for kind in (True, False) for name in known_fields(of_turns=kind)} - set(
        re.findall(r"`(\w+)`", table)
    )
    assert not missing


def test_inspect_lists_unused_fields(tmp_path: Path) -> None:
    from spinreg_core.data.inspect import inspect

    load(tmp_path, *(PAIR | {"prompt": f"{i}?", "id": i} for i in range(4)))
    text, document = inspect(make_config(dataset=str(tmp_path / "rows.jsonl"), model="random:tiny"))
    assert "fields that rows do not use: id" in text
    assert document["train"]["unused_fields"] == ["id"]
