"""Conversations of a data set as messages for a chat template.

Decides: the roles and their other names in data sets, and the form of tool calls, tool descriptions and thoughts.
Leaves out: layouts and rows (`formats`), rendering (`models`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spinreg_core.models.messages import THOUGHTS, Extras, Message, ToolCall

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# Nesting of tools and arguments that is accepted; real ones have fewer than ten levels.
_MAX_DEPTH = 50


class RowProblem(Exception):
    """The reason why a record gives no row; it becomes a `formats.Rejected`."""

    def __init__(self, reason: str, detail: str) -> None:
        # The detail may quote a name that is not UTF-8, and the list of rejected rows is a UTF-8 file.
        detail = detail.encode(errors="backslashreplace").decode()
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_turns(turns: object, where: str) -> list[Message]:
    """Return the messages of turns with role/content or from/value, a list or its JSON text. Raises RowProblem."""
    return [message_of(turn, named) for named, turn in turns_of(turns, where)]


def turns_of(turns: object, where: str) -> list[tuple[str, Any]]:
    """Return the turns of a list, or of its JSON text, with their names in messages. Raises RowProblem."""
    turns = parse_json(turns)
    if not isinstance(turns, list):
        kind = "text" if isinstance(turns, str) else type(turns).__name__
        raise RowProblem("wrong_type", f"{where} is {kind}, not a list of turns")
    if not turns:
        raise RowProblem("no_assistant_turn", f"{where} is empty")
    # SlimOrca writes a system turn without a text where there is no system prompt.
    return [(f"turn {i}", turn) for i, turn in enumerate(turns, start=1) if not _is_absent_system(turn)]


def _is_absent_system(turn: object) -> bool:
    return isinstance(turn, dict) and _ROLES.get(str(_role(turn)).lower()) == "system" and _content(turn) is None


def user_turns(turns: object) -> list[object]:
    """Return the contents of the user's turns, even if the conversation has other problems."""
    turns = parse_json(turns)
    found = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [_content(turn) for turn in found if _ROLES.get(str(_role(turn)).lower()) == "user"]


def read_tools(value: object) -> list[Mapping[str, Any]] | None:
    """Return the descriptions of a conversation's tools, or None without any.

    `value` is a list of records, or its JSON text. Each record names a function, either itself or under "function".
    Raises RowProblem.
    """
    tools = _parse_value(value)
    if tools is None or tools in ("", []):
        return None
    if not isinstance(tools, list):
        raise RowProblem("wrong_type", "tools is no list of descriptions")
    for tool in tools:
        _function(tool, "tools")
    _check_texts(tools, "tools")
    return tools


def text_of(value: object, where: str, role: str) -> str:
    """Return the value of a text field. Raises RowProblem."""
    # Parquet and CSV write null for an absent text.
    if value is None:
        reasons = {"assistant": "empty_answer", "user": "empty_prompt"}
        raise RowProblem(reasons.get(role, "wrong_type"), f"{where} is null")
    if not isinstance(value, str):
        raise RowProblem("wrong_type", f"{where} is {type(value).__name__}, not text")
    _check_texts(value, where)
    return value


def message_of(turn: object, where: str) -> Message:
    """Return the message of one turn. Raises RowProblem."""
    if not isinstance(turn, dict):
        raise RowProblem("wrong_type", f"{where} is {type(turn).__name__}")
    named = _role(turn)
    if named is None or named == "":
        raise RowProblem("missing_role", f"{where} has the fields {', '.join(map(str, turn)) or '(none)'}")
    if not isinstance(named, str) or named.lower() not in _ROLES:
        raise RowProblem("unknown_role", f"{where} has role {named!r}")
    role, content = _ROLES[named.lower()], _content(turn)
    calls = parse_json(turn.get("tool_calls") or turn.get("function_call")) if role == "assistant" else None
    # In ShareGPT's layout, the call is the text of a turn of its own.
    if named.lower() == "function_call":
        calls, content = parse_json(content), None
    extras: Extras = {}
    if calls is not None and calls not in ("", []):
        extras["tool_calls"] = _calls(calls, where)
        content = "" if content is None else content
    if role == "assistant":
        for thought in THOUGHTS:
            if turn.get(thought) not in (None, ""):
                extras[thought] = text_of(turn[thought], f"{where}, {thought}", role)
    elif role == "tool":
        for name in ("tool_call_id", "name"):
            if turn.get(name) not in (None, ""):
                extras[name] = text_of(turn[name], f"{where}, {name}", role)
    return {"role": role, "content": text_of(content, where, role), **extras}


def _calls(calls: object, where: str) -> list[ToolCall]:
    """Return calls as chat templates expect them.

    A call may be the bare function. Its arguments may be a JSON text, as in OpenAI's interface, with its nulls kept.
    """
    where = f"{where}, tool_calls"
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise RowProblem("wrong_type", f"{where} is {type(calls).__name__}, not a list of calls")
    found: list[ToolCall] = []
    for call in calls:
        function = _function(call, where)
        arguments = _parse_value(function.get("arguments"))
        arguments = {} if arguments is None or arguments == "" else arguments
        if not isinstance(arguments, dict):
            raise RowProblem("wrong_type", f"{where}: arguments of {function['name']} are no JSON object")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        if isinstance(call.get("id"), str):
            found[-1]["id"] = call["id"]
    _check_texts(found, where)
    return found


def _function(record: Any, where: str) -> Mapping[str, Any]:
    """Return the part of a call or a description that names the function: its "function", or the record itself."""
    found = record.get("function") or record if isinstance(record, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        raise RowProblem("wrong_type", f"{where}: a record without the name of a function")
    return found


def _parse_value(value: object) -> Any:
    """Return the content of a JSON text with its nulls, or a value without the nulls that Arrow added."""
    return parse_json(value) if isinstance(value, str) else _without_nulls(value)


def _without_nulls(value: Any, depth: int = 0) -> Any:
    """Remove keys whose value is null, at any depth: in a column of Arrow records, each row has the keys of all."""
    # Deeper values are refused by `_check_texts`.
    if depth > _MAX_DEPTH:
        return value
    if isinstance(value, dict):
        return {key: _without_nulls(one, depth + 1) for key, one in value.items() if one is not None}
    return [_without_nulls(one, depth + 1) for one in value] if isinstance(value, list) else value


def parse_json(value: object) -> Any:
    """Return the content of a JSON text; any other value, and a text that is not JSON, unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _role(turn: Mapping[str, object]) -> object:
    return turn.get("role") if turn.get("role") is not None else turn.get("from")


def _content(turn: Mapping[str, object]) -> object:
    return turn.get("content") if turn.get("content") is not None else turn.get("value")


def _check_texts(value: object, where: str, depth: int = 0) -> None:
    """Raise RowProblem for a value that JSON cannot hold, is nested too deeply, or has a text that is not UTF-8."""
    if depth > _MAX_DEPTH:
        raise RowProblem("wrong_type", f"{where} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, one in value.items():
            _check_texts(key, where, depth + 1)
            _check_texts(one, where, depth + 1)
    elif isinstance(value, list):
        for one in value:
            _check_texts(one, where, depth + 1)
    elif isinstance(value, str):
        # Files are read with undecodable bytes kept as lone surrogates, so that only their row is lost.
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowProblem("broken_utf8", f"{where}, character {error.start + 1}") from None
    elif not isinstance(value, int | float | None):
        raise RowProblem("wrong_type", f"{where} holds {type(value).__name__}, which JSON has no word for")
