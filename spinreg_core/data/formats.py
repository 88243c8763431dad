"""One record of a data set -> the rows it gives, or the reason why it gives none.

Decides: the four layouts, how `auto` picks one, which assistant turns are trained on, what a bad row is, and
what counts as a final answer. Leaves out: where records come from (`sources.py`), tokens (`encode.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from spinreg_core.config import DataConfig
from spinreg_core.errors import BadInput

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Every reason a row can be refused for. docs/data.md explains each.
REASONS = {
    "broken_json": "the line is not valid JSON",
    "broken_utf8": "the text is not valid UTF-8",
    "wrong_type": "a field holds something else than text, or the row is no record",
    "missing_column": "the row lacks a column of its format",
    "missing_role": "a turn has no role",
    "unknown_role": "a turn's role is none of system, user, assistant (or human, gpt, chatgpt)",
    "empty_prompt": "the user's turn before the answer is empty",
    "empty_answer": "the assistant's turn is empty",
    "no_assistant_turn": "the conversation has no assistant turn",
    "prompt_not_user": "what precedes the answer does not end in a user turn",
    "prompt_too_long": "the prompt alone exceeds data.max_prompt_tokens",
    "template": "the model's chat template refuses the conversation",
}

_ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
}  # fmt: skip
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
    """One prompt with its human answer. `source_row` counts records of the source from 1."""

    source_row: int
    messages: tuple[Message, ...]
    answer: str

    @property
    def prompt_hash(self) -> str:
        """SHA-256 (hex) of the canonical prompt messages; `prompt_id` starts with its first 16 digits."""
        return _sha256(self.messages)

    @property
    def opening_hash(self) -> str:
        """SHA-256 (hex) of the messages up to the first user turn: what the split keeps on one side."""
        first_user = next(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return _sha256(self.messages[: first_user + 1])


@dataclass(frozen=True)
class Rejected:
    """A bad row: its number (from 1), a key of REASONS, and what was found there."""

    row: int
    reason: str
    detail: str


class RowProblem(Exception):
    """Why one record gives no row; becomes a Rejected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Layout:
    """A format and the columns it is read from."""

    format: Literal["messages", "conversations", "instruction", "prompt_response"]
    columns: tuple[str, ...]  # (conversation,) or (instruction, input, output) or (prompt, response)


def _sha256(messages: Iterable[Message]) -> str:
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
        messages = _conversation(record, layout.columns[0])
    else:
        messages = _single_turn(record, layout)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowProblem("no_assistant_turn", f"roles: {', '.join(m['role'] for m in messages)}")
    chosen = {"last": answers[-1:], "first": answers[:1], "all": answers}[turns]
    return [_row(messages, at, number) for at in chosen]


def user_texts(record: object, layout: Layout) -> list[str]:
    """What users say in a record, whatever else is wrong with it."""
    if not isinstance(record, dict):
        return []
    if layout.format in ("messages", "conversations"):
        turns = record.get(layout.columns[0])
        if isinstance(turns, str):
            try:
                turns = json.loads(turns)
            except ValueError:
                return []
        said = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [turn.get("content") if turn.get("content") is not None else turn.get("value") for turn in said
                 if _ROLES.get(str(turn.get("role") or turn.get("from")).lower()) == "user"]  # fmt: skip
    else:
        names = layout.columns[:2] if layout.format == "instruction" else layout.columns[:1]
        texts = ["\n\n".join(str(record[name]) for name in names if record.get(name))]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _row(messages: list[Message], at: int, number: int) -> Row:
    prompt, answer = messages[:at], messages[at]["content"]
    if not prompt or prompt[-1]["role"] != "user":
        raise RowProblem("prompt_not_user", f"turn {at + 1} answers {prompt[-1]['role'] if prompt else 'nothing'}")
    if not prompt[-1]["content"].strip():
        raise RowProblem("empty_prompt", f"turn {at} has no text")
    if not answer.strip():
        raise RowProblem("empty_answer", f"turn {at + 1} has no text")
    return Row(number, tuple(prompt), answer)


def _conversation(record: dict[str, Any], column: str) -> list[Message]:
    """Turns with role/content or from/value; a JSON text of such a list is read too (CSV, Parquet)."""
    turns = _field(record, column)
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError:
            raise RowProblem("wrong_type", f"{column} is text, not a list of turns") from None
    if not isinstance(turns, list):
        raise RowProblem("wrong_type", f"{column} is {type(turns).__name__}, not a list of turns")
    if not turns:
        raise RowProblem("no_assistant_turn", f"{column} is empty")
    messages = []
    for i, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowProblem("wrong_type", f"turn {i} is {type(turn).__name__}")
        role = turn.get("role") if turn.get("role") is not None else turn.get("from")
        if role is None or role == "":
            raise RowProblem("missing_role", f"turn {i} has the fields {', '.join(map(str, turn)) or '(none)'}")
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise RowProblem("unknown_role", f"turn {i} has role {role!r}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        messages.append({"role": _ROLES[role.lower()], "content": _text(content, f"turn {i}", role)})
    return messages


def _single_turn(record: dict[str, Any], layout: Layout) -> list[Message]:
    if layout.format == "instruction":
        instruction, context, output = layout.columns
        prompt = _text(_field(record, instruction), instruction, "user")
        extra = record.get(context)
        if extra is not None and _text(extra, context, "user").strip():
            prompt = f"{prompt}\n\n{extra}"
        answer = _text(_field(record, output), output, "assistant")
    else:
        prompt = _text(_field(record, layout.columns[0]), layout.columns[0], "user")
        answer = _text(_field(record, layout.columns[1]), layout.columns[1], "assistant")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _field(record: dict[str, Any], column: str) -> Any:
    if column not in record:
        raise RowProblem("missing_column", f"no {column!r}; found {', '.join(map(str, record)) or 'nothing'}")
    return record[column]


def _text(value: object, where: str, role: str) -> str:
    if value is None:  # how Parquet and CSV write an absent text
        raise RowProblem("empty_answer" if _ROLES[role.lower()] == "assistant" else "empty_prompt", f"{where} is null")
    if not isinstance(value, str):
        raise RowProblem("wrong_type", f"{where} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # files are read with undecodable bytes kept as lone surrogates
        raise RowProblem("broken_utf8", f"{where}, character {error.start + 1}") from None
    return value


def prompt_ids_of(rows: Iterable[Row]) -> list[str]:
    """`prompt_id` per row: 16 hex digits of the prompt's hash, then -2, -3, ... for repetitions, in order."""
    seen: dict[str, int] = {}
    names = []
    for row in rows:
        stem = row.prompt_hash[:16]
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return names


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
