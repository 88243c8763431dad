"""One record of a data set -> the rows it gives, or the reason why it gives none.

Decides: the four layouts, how `auto` picks one, which assistant turns are trained on, what a bad row is, and
what counts as a final answer. Leaves out: what a turn may hold (`messages.py`), where records come from (`sources.py`),
tokens (`encode.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from spinreg_core.config import DataConfig
from spinreg_core.data.messages import RowProblem, read_tools, read_turns, text_of, user_turns
from spinreg_core.errors import BadInput
from spinreg_core.models.chat_template import THOUGHTS, Message

# Every reason a row can be refused for. docs/data.md explains each.
REASONS = {
    "broken_json": "the line is not valid JSON",
    "broken_utf8": "the text is not valid UTF-8",
    "wrong_type": "a field holds something else than text, or the row is no record",
    "missing_column": "the row lacks a column of its format",
    "missing_role": "a turn has no role",
    "unknown_role": "a turn's role is none of system, user, assistant, tool (or other names of these)",
    "empty_prompt": "the user's turn before the answer is empty",
    "empty_answer": "the assistant's turn is empty, and calls no tool",
    "no_assistant_turn": "the conversation has no assistant turn",
    "prompt_not_user": "what precedes the answer does not end in a user's turn or a tool's, or no user has spoken",
    "prompt_too_long": "the prompt alone exceeds data.max_prompt_tokens",
    "template": "the model's chat template refuses the conversation, or leaves out its tools or the answer's thought",
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
    """One prompt with its human answer. `source_row` counts records of the source from 1.

    `answer` is its text; `extras` what else it has: "tool_calls", a thought. `tools`: the record's own descriptions.
    """

    source_row: int
    messages: tuple[Message, ...]
    answer: str
    extras: Message = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None

    @property
    def prompt_hash(self) -> str:
        """SHA-256 (hex) of the canonical prompt messages; `prompt_id` starts with its first 16 digits."""
        return _sha256(self.messages, self.tools)

    @property
    def reply(self) -> Message:
        return {"role": "assistant", "content": self.answer} | self.extras

    @property
    def content(self) -> list[Any]:
        """Prompt and answer, for hashes: rows of text alone have but these two."""
        return [self.messages, self.answer, *([[self.extras, self.tools]] if self.extras or self.tools else [])]

    @property
    def opening_hash(self) -> str:
        """SHA-256 (hex) of the messages up to the first user turn: what the split keeps on one side."""
        first_user = next(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return _sha256(self.messages[: first_user + 1], None)


@dataclass(frozen=True)
class Rejected:
    """A bad row: its number (from 1), a key of REASONS, and what was found there."""

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Layout:
    """A format and the columns it is read from."""

    format: Literal["messages", "conversations", "instruction", "prompt_response"]
    columns: tuple[str, ...]  # (conversation,) or (instruction, input, output) or (prompt, response)


def _sha256(messages: Iterable[Message], tools: list[dict[str, Any]] | None) -> str:
    said: list[Any] = [
        [m["role"], m["content"], *([more] if (more := {k: m[k] for k in m if k not in ("role", "content")}) else [])]
        for m in messages
    ]
    said += [{"tools": tools}] if tools else []
    return hashlib.sha256(json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def choose_layout(columns: set[str], config: DataConfig, where: str, *, prompts_only: bool = False) -> Layout:
    """The layout of a data set with these columns; `prompts_only`: it may lack the column of the answers.

    Raises BadInput naming the columns found.
    """
    listed = ", ".join(sorted(columns)) or "(none)"
    if config.prompt_column is not None and config.response_column is not None:
        missing = [name for name in (config.prompt_column, config.response_column) if name not in columns]
        if missing:
            raise BadInput(where, f"columns {listed}", f"the named column {' and '.join(missing)}")
        return Layout("prompt_response", (config.prompt_column, config.response_column))
    candidates = [
        Layout("messages", ("messages",)),
        *(Layout("conversations", (name,)) for name in _CONVERSATION_COLUMNS),
        Layout("instruction", ("instruction", "input", "output")),
        *(Layout("prompt_response", pair) for pair in _PAIR_COLUMNS),
    ]
    for layout in candidates:
        needed = {name for name in layout.columns if name != "input" or layout.format != "instruction"}
        if prompts_only:
            needed = set(layout.columns[:1])
        if config.format in ("auto", layout.format) and needed <= columns:
            return layout
    known = "; ".join(f"{name} ({what})" for name, what in _FORMAT_COLUMNS.items())
    expected = f"one of these layouts: {known}"
    if config.format != "auto":
        expected = f"format {config.format}: {_FORMAT_COLUMNS[config.format]}"
    raise BadInput(where, f"columns {listed}", expected)


def read_rows(record: object, number: int, layout: Layout, turns: Literal["last", "first", "all"]) -> list[Row]:
    """The rows of one record, in order of its turns. Raises RowProblem."""
    if not isinstance(record, dict):
        raise RowProblem("wrong_type", f"{type(record).__name__} instead of a record")
    if layout.format in ("messages", "conversations"):
        messages = read_turns(_field(record, layout.columns[0]), layout.columns[0])
    else:
        messages = _single_turn(record, layout)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowProblem("no_assistant_turn", f"roles: {', '.join(m['role'] for m in messages)}")
    tools = read_tools(record.get("tools")) if layout.format in ("messages", "conversations") else None
    chosen = {"last": answers[-1:], "first": answers[:1], "all": answers}[turns]
    return [_row(messages, at, number, tools) for at in chosen]


def user_texts(record: object, layout: Layout) -> list[str]:
    """What users say in a record, whatever else is wrong with it."""
    if not isinstance(record, dict):
        return []
    texts: list[object]
    if layout.format in ("messages", "conversations"):
        texts = user_turns(record.get(layout.columns[0]))
    else:
        names = layout.columns[:2] if layout.format == "instruction" else layout.columns[:1]
        texts = ["\n\n".join(str(record[name]) for name in names if record.get(name))]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _row(messages: list[Message], at: int, number: int, tools: list[dict[str, Any]] | None) -> Row:
    prompt, reply = messages[:at], messages[at]
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise RowProblem("prompt_not_user", f"turn {at + 1} answers {prompt[-1]['role'] if prompt else 'nothing'}")
    if not any(message["role"] == "user" for message in prompt):
        raise RowProblem("prompt_not_user", f"no user has spoken before turn {at + 1}")
    if prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise RowProblem("empty_prompt", f"turn {at} has no text")
    extras = {name: reply[name] for name in ("tool_calls", *THOUGHTS) if name in reply}
    if not reply["content"].strip() and "tool_calls" not in extras:
        raise RowProblem("empty_answer", f"turn {at + 1} has no text")
    return Row(number, tuple(prompt), reply["content"], extras, tools)


def _single_turn(record: dict[str, Any], layout: Layout) -> list[Message]:
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


def _field(record: dict[str, Any], column: str) -> Any:
    if column not in record:
        raise RowProblem("missing_column", f"no {column!r}; found {', '.join(map(str, record)) or 'nothing'}")
    return record[column]


_LAST_MARK = re.compile(r"####(?P<rest>[^\n]*)\s*\Z")
_NUMBER = re.compile(r"-?\$?-?[0-9][0-9.,]*%?")


def final_answer(answer: str, mode: Literal["auto", "gsm8k", "none"]) -> str | None:
    """What follows `####` on the last line (GSM8K), or None.

    `auto` takes numbers only: `####` also begins a fourth-level heading in Markdown.
    """
    match = None if mode == "none" else _LAST_MARK.search(answer)
    if match is None:
        return None
    found = match["rest"].strip()
    if not found or (mode == "auto" and not _NUMBER.fullmatch(found)):
        return None
    return found
