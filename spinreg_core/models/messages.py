"""Messages for chat templates, and marks that show whether a template writes them in full.

Leaves out: rendering (`chat_template`), the messages of data sets (`data`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from spinreg_core.errors import BadInput

# Templates differ in their name for the thought of an assistant.
THOUGHTS: tuple[Literal["reasoning_content"], Literal["reasoning"], Literal["thinking"]] = (
    "reasoning_content", "reasoning", "thinking",
)  # fmt: skip


class Function(TypedDict):
    """A function with the arguments of one call."""

    name: str
    arguments: Mapping[str, Any]


class ToolCall(TypedDict):
    """A call of a tool, in OpenAI's form with parsed arguments."""

    type: Literal["function"]
    function: Function
    id: NotRequired[str]


class Extras(TypedDict, total=False):
    """Fields that only some messages have: calls and thoughts of an assistant, call id and name of a tool."""

    tool_calls: list[ToolCall]
    reasoning_content: str
    reasoning: str
    thinking: str
    tool_call_id: str
    name: str


class Message(Extras):
    """A message for a chat template. The role is `system`, `user`, `assistant` or `tool`."""

    role: str
    content: str


class Marks:
    """Marks in place of texts that a template may leave out without an error, with the texts that they stand for.

    A name alone proves nothing, because it may also occur in the tool list or in the user's text.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def require_written(self, rendered: str) -> None:
        """Raise BadInput if a rendered text lacks one of the marks."""
        missing = next((text for mark, text in self.texts.items() if mark not in rendered), None)
        if missing is not None:
            raise BadInput("chat template", f"does not write {missing.strip()[:60]!r}",
                           "a template that writes tools, calls and thoughts, or rows without them")  # fmt: skip

    def messages(self, messages: Sequence[Message], *, whole: bool = False) -> list[Message]:
        """Mark calls with their arguments and the contents of tool messages.

        With `whole`, also mark the content and the thought of messages that have calls or thoughts.
        """
        found: list[Message] = []
        for message in messages:
            # Copied as plain mappings: the names of the fields are computed.
            changed: Any = {**message}
            if "tool_calls" in message:
                changed["tool_calls"] = self.functions(message["tool_calls"])
            thoughts = [name for name in THOUGHTS if name in message]
            if whole:
                changed |= {name: self._mark(message[name]) for name in thoughts}
            marks_content = bool(thoughts or "tool_calls" in message) if whole else message["role"] == "tool"
            if marks_content and message["content"].strip():
                changed["content"] = self._mark(message["content"])
            found.append(changed)
        return found

    def functions(self, records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Mark the names and arguments of the functions in calls or descriptions of tools."""
        found: list[Mapping[str, Any]] = []
        for record in records:
            function = {**(record.get("function") or record)}
            function["name"] = self._mark(function["name"])
            if isinstance(function.get("arguments"), dict):
                function["arguments"] = {key: self._mark(value) for key, value in function["arguments"].items()}
            found.append({**record, "function": function} if record.get("function") else function)
        return found

    def _mark(self, text: object) -> str:
        mark = f"spinregmark{len(self.texts)}x"
        self.texts[mark] = str(text)
        return mark
