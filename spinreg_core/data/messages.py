"""One conversation of a data set -> messages as chat templates take them.

Decides: which roles there are and what data sets call them, and what a tool call, a tool's description and a thought
look like. Leaves out: layouts and rows (`formats.py`), what a template makes of them (`models/chat_template.py`).
"""

from __future__ import annotations

import json
from typing import Any

from spinreg_core.models.chat_template import THOUGHTS, Message

_ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_DEEPEST = 50  # of tools and arguments
_EXTRAS = {"assistant": THOUGHTS, "tool": ("tool_call_id", "name")}


class RowProblem(Exception):
    """Why one record gives no row; becomes a `formats.Rejected`."""

    def __init__(self, reason: str, detail: str) -> None:
        detail = detail.encode(errors="backslashreplace").decode()  # it may quote a name that is no UTF-8
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_turns(turns: object, where: str) -> list[Message]:
    """Turns with role/content or from/value; or a JSON text of such a list (CSV, Parquet). Raises RowProblem."""
    turns = _unwrapped(turns)
    if not isinstance(turns, list):
        what = "text" if isinstance(turns, str) else type(turns).__name__
        raise RowProblem("wrong_type", f"{where} is {what}, not a list of turns")
    if not turns:
        raise RowProblem("no_assistant_turn", f"{where} is empty")
    return [_message(turn, f"turn {i}") for i, turn in enumerate(turns, start=1)]


def user_turns(turns: object) -> list[object]:
    """What users say in a conversation, whatever else is wrong with it."""
    turns = _unwrapped(turns)
    said = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [_content(turn) for turn in said if _ROLES.get(str(_role(turn)).lower()) == "user"]


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """Descriptions of the tools that a conversation may use, each with the name of a function (bare, or as "function"):
    a list of records, or a JSON text of it; None without any. Raises RowProblem."""
    found = _as_said(value)
    if found is None or found in ("", []):
        return None
    if not isinstance(found, list):
        raise RowProblem("wrong_type", "tools is no list of descriptions")
    for tool in found:
        _function(tool, "tools")
    _check_texts(found, "tools")
    return found


def text_of(value: object, where: str, role: str) -> str:
    """A text field. Raises RowProblem."""
    if value is None:  # how Parquet and CSV write an absent text
        raise RowProblem("empty_answer" if role == "assistant" else "empty_prompt", f"{where} is null")
    if not isinstance(value, str):
        raise RowProblem("wrong_type", f"{where} is {type(value).__name__}, not text")
    _check_texts(value, where)
    return value


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem("wrong_type", f"{where} is {type(turn).__name__}")
    named = _role(turn)
    if named is None or named == "":
        raise RowProblem("missing_role", f"{where} has the fields {', '.join(map(str, turn)) or '(none)'}")
    if not isinstance(named, str) or named.lower() not in _ROLES:
        raise RowProblem("unknown_role", f"{where} has role {named!r}")
    role, content = _ROLES[named.lower()], _content(turn)
    calls: Any = _unwrapped(turn.get("tool_calls")) if role == "assistant" else None
    if named.lower() == "function_call":  # ShareGPT: the call is the text
        calls, content = _unwrapped(content), None
    extras: Message = {}
    if calls is not None and calls not in ("", []):
        extras["tool_calls"] = _calls(calls, where)
        content = "" if content is None else content
    for name in _EXTRAS.get(role, ()):
        if turn.get(name) not in (None, ""):
            extras[name] = text_of(turn[name], f"{where}, {name}", role)
    return {"role": role, "content": text_of(content, where, role)} | extras


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """As templates expect them: {"type": "function", "function": {"name", "arguments": a mapping}}, "id" if given.

    Arguments may be a JSON text (as OpenAI's interface has them), in which a null stays one; the call may be the bare
    function.
    """
    where = f"{where}, tool_calls"
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise RowProblem("wrong_type", f"{where} is {type(calls).__name__}, not a list of calls")
    found = []
    for call in calls:
        function = _function(call, where)
        arguments = _as_said(function.get("arguments"))
        arguments = {} if arguments is None or arguments == "" else arguments
        if not isinstance(arguments, dict):
            raise RowProblem("wrong_type", f"{where}: arguments of {function['name']} are no JSON object")
        one = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append(one | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    _check_texts(found, where)
    return found


def _function(record: Any, where: str) -> dict[str, Any]:
    """What names a function in a call or a description: the record's "function", or the record itself."""
    found = record.get("function") or record if isinstance(record, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        raise RowProblem("wrong_type", f"{where}: a record without the name of a function")
    return found


def _as_said(value: Any) -> Any:
    """What a JSON text says, its nulls included; of records what is said in them."""
    return _unwrapped(value) if isinstance(value, str) else _without_nulls(value)


def _without_nulls(value: Any, depth: int = 0) -> Any:
    """Less the keys whose value is null, at any depth: in a column of Arrow records every row has all rows' keys."""
    if depth > _DEEPEST:  # `_check_texts` refuses it
        return value
    if isinstance(value, dict):
        return {key: _without_nulls(one, depth + 1) for key, one in value.items() if one is not None}
    return [_without_nulls(one, depth + 1) for one in value] if isinstance(value, list) else value


def _unwrapped(value: Any) -> Any:
    """What a JSON text says; anything else, and a text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _role(turn: dict[str, Any]) -> object:
    return turn.get("role") if turn.get("role") is not None else turn.get("from")


def _content(turn: dict[str, Any]) -> object:
    return turn.get("content") if turn.get("content") is not None else turn.get("value")


def _check_texts(value: Any, where: str, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise RowProblem("wrong_type", f"{where} is nested more than {_DEEPEST} deep")
    if isinstance(value, dict):
        for key, one in value.items():
            _check_texts(key, where, depth + 1)
            _check_texts(one, where, depth + 1)
    elif isinstance(value, list):
        for one in value:
            _check_texts(one, where, depth + 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # files are read with undecodable bytes kept as lone surrogates
            raise RowProblem("broken_utf8", f"{where}, character {error.start + 1}") from None
    elif not isinstance(value, int | float | None):  # bool is an int
        raise RowProblem("wrong_type", f"{where} holds {type(value).__name__}, which JSON has no word for")
