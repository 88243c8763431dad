"""Rows of the records of a data set.

Decides: the four layouts, the choice of `auto`, the assistant turns that give a row, the reasons for a bad row, and the
form of a final answer.
Leaves out: the content of turns (`messages`), the source of records (`sources`), tokens (`encode`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spinreg_core.config import DataConfig
from spinreg_core.data.fields import (
    USED_IN_TURNS,
    history_of,
    known_fields,
    read_conversation,
    require_usable_fields,
    tools_of,
    with_system,
)
from spinreg_core.data.messages import RowProblem, parse_json, text_of, user_turns
from spinreg_core.errors import BadInput
from spinreg_core.models.messages import THOUGHTS, Extras, Message

# Every reason for which a row can be refused. docs/data.md explains each.
REASONS = {
    "broken_json": "the line is not valid JSON",
    "broken_utf8": "the text is not valid UTF-8",
    "wrong_type": "a field is not text, or the row is not a record",
    "missing_column": "the row lacks a column of its format",
    "missing_role": "a turn has no role",
    "unknown_role": "a turn's role is not system, user, assistant, tool or another name of these",
    "empty_prompt": "the user's turn before the answer is empty",
    "empty_answer": "the assistant's turn is empty and calls no tool",
    "no_assistant_turn": "the conversation has no assistant turn, or none to train on (weight 0)",
    "two_system_prompts": "the row has different system prompts in its columns and turns",
    "unused_field": "a field changes the meaning of the row, and spinreg cannot use it (docs/data.md has a table)",
    "prompt_not_user": "the turn before the answer is not a user's or a tool's, or no user has spoken",
    "prompt_too_long": "the prompt alone exceeds data.max_prompt_tokens",
    "template": "the model's chat template refuses the conversation, or leaves out tools or a part of a text",
}
_CONVERSATION_COLUMNS = ("conversations", "conversation")
_PAIR_COLUMNS = (("prompt", "response"), ("prompt", "answer"), ("question", "answer"), ("prompt", "completion"))
_FORMAT_COLUMNS = {
    "messages": "messages",
    "conversations": "conversations",
    "instruction": "instruction and output (input if there is one)",
    "prompt_response": "prompt/response, prompt/answer, question/answer or prompt/completion, "
    "or the columns named in prompt_column and response_column",
}


@dataclass(frozen=True)
class Row:
    """A prompt with its human answer.

    `source_row` is the number of its record, from 1. `answer` is the text of the answer, `extras` its tool calls and
    thought. `tools` are the descriptions of tools in the record.
    """

    source_row: int
    messages: tuple[Message, ...]
    answer: str
    extras: Extras = field(default_factory=Extras)
    tools: list[Mapping[str, Any]] | None = None

    @property
    def prompt_hash(self) -> str:
        """SHA-256 (hex) of the prompt messages in canonical form; `prompt_id` starts with its first 16 digits."""
        return _sha256(self.messages, self.tools)

    @property
    def reply(self) -> Message:
        """The answer as a message."""
        return {"role": "assistant", "content": self.answer, **self.extras}

    @property
    def content(self) -> list[Any]:
        """Prompt and answer, for hashes; extras and tools only where there are any."""
        return [self.messages, self.answer, *([[self.extras, self.tools]] if self.extras or self.tools else [])]

    @property
    def opening_hash(self) -> str:
        """SHA-256 (hex) of the messages up to the first user turn. The split keeps equal openings on one side."""
        first_user = next(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return _sha256(self.messages[: first_user + 1], None)


@dataclass(frozen=True)
class Rejected:
    """A row that is refused or left out: the number of its record (from 1), the reason, and the details."""

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Layout:
    """A format and its columns: (conversation,), (instruction, input, output) or (prompt, response)."""

    format: Literal["messages", "conversations", "instruction", "prompt_response"]
    columns: tuple[str, ...]

    @property
    def of_turns(self) -> bool:
        return self.format in ("messages", "conversations")


def _sha256(messages: Iterable[Message], tools: list[Mapping[str, Any]] | None) -> str:
    # Messages of text alone are hashed as [role, content], so that fields added later leave known hashes as they are.
    hashed: list[Any] = []
    for message in messages:
        more = {name: value for name, value in message.items() if name not in ("role", "content")}
        hashed.append([message["role"], message["content"], *([more] if more else [])])
    hashed += [{"tools": tools}] if tools else []
    return hashlib.sha256(json.dumps(hashed, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def _layouts() -> list[Layout]:
    return [
        Layout("messages", ("messages",)),
        *(Layout("conversations", (name,)) for name in _CONVERSATION_COLUMNS),
        Layout("instruction", ("instruction", "input", "output")),
        *(Layout("prompt_response", pair) for pair in _PAIR_COLUMNS),
    ]


def choose_layout(columns: set[str], config: DataConfig, where: str, *, prompts_only: bool = False) -> Layout:
    """Return the layout of a data set with these columns.

    With `prompts_only`, the column of the answers may be absent. Raises BadInput that lists the columns.
    """
    listed = ", ".join(sorted(columns)) or "(none)"
    if config.prompt_column is not None and config.response_column is not None:
        missing = [name for name in (config.prompt_column, config.response_column) if name not in columns]
        if missing:
            raise BadInput(
                where, f"has the columns {listed} and not {' and '.join(missing)}",
                "set data.prompt_column and data.response_column to columns of the data set",
            )  # fmt: skip
        return Layout("prompt_response", (config.prompt_column, config.response_column))
    for layout in _layouts():
        needed = {name for name in layout.columns if name != "input" or layout.format != "instruction"}
        if prompts_only:
            needed = set(layout.columns[:1])
        if config.format in ("auto", layout.format) and needed <= columns:
            return layout
    expected = "one of these layouts: " + "; ".join(f"{name} ({names})" for name, names in _FORMAT_COLUMNS.items())
    if config.format != "auto":
        expected = f"the columns of data.format {config.format}: {_FORMAT_COLUMNS[config.format]}"
    raise BadInput(where, f"has the columns {listed}", expected)


def usable_columns(config: DataConfig) -> frozenset[str]:
    """Return every column of a data set that a row may use, in any layout."""
    columns = {name for layout in _layouts() for name in layout.columns} | {
        config.prompt_column,
        config.response_column,
    }
    columns |= known_fields(of_turns=True) | known_fields(of_turns=False)
    return frozenset(name for name in columns if name is not None)


def read_rows(record: object, number: int, layout: Layout, turns: Literal["last", "first", "all"]) -> list[Row]:
    """Return the rows of one record, in the order of its turns. Raises RowProblem."""
    if not isinstance(record, dict):
        raise RowProblem("wrong_type", f"{type(record).__name__} instead of a record")
    of_turns = layout.of_turns
    if of_turns:
        messages, trained = read_conversation(_field(record, layout.columns[0]), layout.columns[0])
    else:
        messages = [*history_of(record), *_single_turn(record, layout)]
        trained = [len(messages) - 1]
    require_usable_fields(record, messages, of_turns=of_turns)
    if not trained:
        raise RowProblem("no_assistant_turn", f"roles: {', '.join(m['role'] for m in messages)}")
    told = with_system(record, messages)
    answers = [at + len(told) - len(messages) for at in trained]
    tools = tools_of(record) if of_turns else None
    chosen = {"last": answers[-1:], "first": answers[:1], "all": answers}[turns]
    return [_row(told, at, number, tools) for at in chosen]


def unused_fields(record: object, layout: Layout) -> set[str]:
    """Return the fields of a record, and of its turns (`turn: NAME`), that spinreg does not use."""
    if not isinstance(record, dict):
        return set()
    names = {str(name) for name in record} - {*layout.columns} - known_fields(of_turns=layout.of_turns)
    turns = parse_json(record.get(layout.columns[0])) if layout.of_turns else None
    for turn in turns if isinstance(turns, list) else ():
        said = turn.items() if isinstance(turn, dict) else ()
        names |= {f"turn: {name}" for name, value in said if value is not None and name not in USED_IN_TURNS}
    return names


def user_texts(record: object, layout: Layout) -> list[str]:
    """Return the texts of the user in a record, even if the record has other problems."""
    if not isinstance(record, dict):
        return []
    texts: list[object]
    if layout.of_turns:
        texts = user_turns(record.get(layout.columns[0]))
    else:
        names = layout.columns[:2] if layout.format == "instruction" else layout.columns[:1]
        texts = ["\n\n".join(str(record[name]) for name in names if record.get(name))]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _row(messages: list[Message], at: int, number: int, tools: list[Mapping[str, Any]] | None) -> Row:
    prompt, reply = messages[:at], messages[at]
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise RowProblem("prompt_not_user", f"turn {at + 1} answers {prompt[-1]['role'] if prompt else 'nothing'}")
    if not any(message["role"] == "user" for message in prompt):
        raise RowProblem("prompt_not_user", f"no user has spoken before turn {at + 1}")
    if prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise RowProblem("empty_prompt", f"turn {at} has no text")
    extras: Extras = {}
    if "tool_calls" in reply:
        extras["tool_calls"] = reply["tool_calls"]
    for name in THOUGHTS:
        if name in reply:
            extras[name] = reply[name]
    if not reply["content"].strip() and "tool_calls" not in extras:
        raise RowProblem("empty_answer", f"turn {at + 1} has no text")
    return Row(number, tuple(prompt), reply["content"], extras, tools)


def _single_turn(record: Mapping[str, object], layout: Layout) -> list[Message]:
    if layout.format == "instruction":
        instruction, context, output = layout.columns
        prompt = text_of(_field(record, instruction), instruction, "user")
        extra = record.get(context)
        if extra is not None and text_of(extra, context, "user").strip():
            prompt = f"{prompt}\n\n{extra}"
        answer = text_of(_field(record, output), output, "assistant")
    else:
        prompt = text_of(_field(record, layout.columns[0]), layout.columns[0], "user")
        answer = text_of(_field(record, layout.columns[1]), layout.columns[1], "assistant")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _field(record: Mapping[str, object], column: str) -> object:
    if column not in record:
        raise RowProblem("missing_column", f"no {column!r}; found {', '.join(map(str, record)) or 'nothing'}")
    return record[column]


_LAST_MARK = re.compile(r"####(?P<rest>[^\n]*)\s*\Z")
_NUMBER = re.compile(r"-?\$?-?[0-9][0-9.,]*%?")


def final_answer(answer: str, mode: Literal["auto", "gsm8k", "none"]) -> str | None:
    """Return the text after `####` on the last line, the form of GSM8K, or None.

    `auto` accepts numbers only, because `####` also begins a fourth-level heading in Markdown.
    """
    match = None if mode == "none" else _LAST_MARK.search(answer)
    if match is None:
        return None
    found = match["rest"].strip()
    if not found or (mode == "auto" and not _NUMBER.fullmatch(found)):
        return None
    return found
