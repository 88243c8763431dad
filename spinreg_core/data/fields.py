"""Fields of a record and of its turns that change the meaning of a row, in the formats of other trainers.

Decides: the fields that are used in addition to a layout's columns, and those that make a row bad because spinreg
cannot use them. docs/data.md has the same table. Every other field is listed as unused.
Leaves out: the columns of the layouts (`formats`), roles and calls (`messages`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spinreg_core.data.messages import RowProblem, message_of, parse_json, read_tools, read_turns, text_of, turns_of
from spinreg_core.models.messages import Message

# LLaMA-Factory, axolotl, Orca and ShareGPT exports.
_SYSTEM = ("system", "system_prompt", "system_message")
# LLaMA-Factory's alpaca layout: earlier turns, as pairs of a question and an answer.
_HISTORY = "history"
# OpenAI's older interface has functions.
_TOOLS = ("tools", "functions")
# OpenAI and Mistral (weight), axolotl (training, train), ms-swift (loss, loss_scale), Fireworks (trainable): 0 or false
# for a turn that is not trained on. In torchtune, `masked` says the opposite.
_TRAINED = ("weight", "training", "train", "loss", "loss_scale", "loss_mask", "trainable")
_MASKED = "masked"

# The text of such a row refers to something that the model would not see.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_REFUSED_ALWAYS = dict.fromkeys(_MEDIA, "spinreg trains on text alone") | {
    "documents": "write them into the prompt",
    "chat_template_kwargs": "set data.template_arguments, which apply to all rows",
    "loss_mask": "give each turn a 'weight' of 0 or 1",
}
_REFUSED_WITH_A_PROMPT = dict.fromkeys(
    ("context", "passage", "article", "choices", "options"), "write it into the prompt, or remove the column"
)
_REFUSED_IN_TURNS = dict.fromkeys(_MEDIA, "spinreg trains on text alone") | {
    "train_detail": "spinreg trains on whole answers",
    "training_detail": "spinreg trains on whole answers",
    "prefix": "write the whole answer",
}
# KTO data mark answers that a model should not give.
_JUDGED = ("label", "kto_tag")
USED_IN_TURNS = {
    "role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", "reasoning_content",
    "reasoning", "thinking", _MASKED, *_TRAINED,
}  # fmt: skip


def known_fields(*, of_turns: bool) -> set[str]:
    """Return the fields of a record that are used or refused in addition to the columns of its layout."""
    found = {*_SYSTEM, *_REFUSED_ALWAYS, *_JUDGED}
    return found | ({*_TOOLS, "chosen", "rejected", _HISTORY} if of_turns else {_HISTORY, *_REFUSED_WITH_A_PROMPT})


def require_usable_fields(record: Mapping[str, object], messages: Sequence[Message], *, of_turns: bool) -> None:
    """Raise RowProblem for a field with a value that spinreg cannot use.

    of_turns: the record holds a conversation, not a prompt and an answer.
    """
    refused = _REFUSED_ALWAYS | ({_HISTORY: "write it as turns"} if of_turns else _REFUSED_WITH_A_PROMPT)
    for name, remedy in refused.items():
        if not _is_empty(record.get(name)):
            raise RowProblem("unused_field", f"{name!r} has a value; {remedy}")
    for name in _JUDGED:
        if record.get(name) is False:
            raise RowProblem("unused_field", f"{name!r} is false, which marks the answer as a bad one")
    # LLaMA-Factory's preference layout ends its conversation before the answers that are compared.
    if of_turns and messages[-1]["role"] != "assistant" and not _is_empty(record.get("chosen")):
        raise RowProblem("unused_field", "'chosen' has the answer, which the conversation lacks; add it as a turn")


def read_conversation(turns: object, where: str) -> tuple[list[Message], list[int]]:
    """Return the messages of a conversation, and the indices of the answers to train on. Raises RowProblem."""
    messages: list[Message] = []
    trained = []
    for named, turn in turns_of(turns, where):
        messages.append(message_of(turn, named))
        for name, remedy in _REFUSED_IN_TURNS.items():
            if not _is_empty(turn.get(name)) and turn[name] is not False:
                raise RowProblem("unused_field", f"{named}: {name!r} has a value; {remedy}")
        if messages[-1]["role"] == "assistant" and _is_trained(turn, named):
            trained.append(len(messages) - 1)
    return messages, trained


def _is_trained(turn: Mapping[str, object], where: str) -> bool:
    for name in (*_TRAINED, _MASKED):
        value = turn.get(name)
        if value is not None and value not in (0, 1):
            raise RowProblem("unused_field", f"{where}: {name!r} is {value!r}; spinreg knows only 0 and 1")
    return all(turn.get(name) in (None, 1) for name in _TRAINED) and turn.get(_MASKED) in (None, 0)


def with_system(record: Mapping[str, object], messages: list[Message]) -> list[Message]:
    """Return the messages after the system prompt of the record's own columns, if it has one. Raises RowProblem."""
    given = {name: text_of(record[name], name, "system") for name in _SYSTEM if not _is_empty(record.get(name))}
    texts = [text for text in given.values() if text.strip()]
    if not texts:
        return messages
    first = messages[0]
    if first["role"] == "system":
        texts.append(first["content"])
    if any(text.strip() != texts[0].strip() for text in texts):
        raise RowProblem("two_system_prompts", f"{', '.join(map(repr, given))} and the turns do not agree")
    return messages if first["role"] == "system" else [{"role": "system", "content": texts[0]}, *messages]


def history_of(record: Mapping[str, object]) -> list[Message]:
    """Return the earlier turns of a record: pairs of a question and an answer, or turns. Raises RowProblem."""
    history = parse_json(record.get(_HISTORY))
    if _is_empty(history):
        return []
    if not isinstance(history, list):
        raise RowProblem("wrong_type", f"{_HISTORY} is {type(history).__name__}, not a list of pairs or turns")
    if all(isinstance(one, Mapping) for one in history):
        return read_turns(history, _HISTORY)
    found: list[Message] = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem("wrong_type", f"{_HISTORY}, entry {number} is no pair of a question and an answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            found.append({"role": role, "content": text_of(text, f"{_HISTORY}, entry {number}", role)})
    return found


def tools_of(record: Mapping[str, object]) -> list[Mapping[str, object]] | None:
    """Return the descriptions of a record's tools, or None without any. Raises RowProblem."""
    return next((found for name in _TOOLS if (found := read_tools(record.get(name)))), None)


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [], {}) or value in ("[]", "{}", "null")
