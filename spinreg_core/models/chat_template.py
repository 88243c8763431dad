"""Token ids of conversations, through a model's chat template.

Decides: the ids of a prompt, the beginning and end of an answer, the token that ends a turn, and that text stays text
even if it spells a special token. No other module renders conversations.
Leaves out: length limits (`data`).

Finding the answer. The template renders the prompt with its generation prompt, then the conversation with the answer.
The second text must begin with the first. The rest, up to the template's end of the turn, is the answer as the template
writes it: a template may strip it, or put a blank before it.

Keeping text as text. If no message spells a special token, the rendered text is tokenised in one go, exactly as
`apply_chat_template` does. Otherwise such spellings are masked while the template renders. The template's own special
tokens then get names that occur in no text. A copy of the tokenizer that knows its special tokens only by those names
tokenises the result in one go.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinreg_core.errors import BadInput
from spinreg_core.formatting import first_line
from spinreg_core.models.json_files import read_json_object
from spinreg_core.models.messages import Marks, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Tools = Sequence[Mapping[str, Any]] | None


# Unicode noncharacters: valid in a string, and reserved for uses like this one.
_MASK, _NAME = "\ufdd0", "\ufdd1"
_PROBE_USER, _PROBE_ANSWER = "spinregquestion", "spinreganswer"
_REMEDY = "give the model's folder another chat_template.jinja, or set data.template_arguments"
# For models without a template. Plain headings need no new tokens in the vocabulary.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a Hugging Face folder, with its own chat template or DEFAULT_TEMPLATE.

    Raises BadInput for a folder without a usable fast tokenizer.
    """
    from transformers import AutoTokenizer

    read_json_object(folder / "config.json")
    longest = read_json_object(folder / "tokenizer_config.json").get("model_max_length")
    # A float is accepted because transformers writes 1e30 for "no limit".
    if longest is not None and type(longest) not in (int, float):
        raise BadInput("model", f"has model_max_length {_short(longest)} in {folder / 'tokenizer_config.json'}",
                       "a number of tokens")  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    # The tokenizers library raises plain Exceptions.
    except Exception as error:
        raise BadInput(
            "model", f"has no usable tokenizer in {folder} ({first_line(error)})",
            "a tokenizer.json next to the weights, and a config.json that transformers accepts",
        ) from None  # fmt: skip
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise BadInput("model", f"has a {type(tokenizer).__name__} in {folder}", "a fast tokenizer (tokenizer.json)")
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise BadInput("model", f"has neither a chat template nor an end-of-sequence token in {folder}",
                           "one of them")  # fmt: skip
        adds_bos = tokenizer("x").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + DEFAULT_TEMPLATE
    return tokenizer


def _short(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 60 else text[:60] + "..."


class Renderer:
    """Renderer of conversations for one model.

    `end_of_turn`: the id that ends an answer. `stop_ids`: every id that ends generation, `end_of_turn` first.
    `pad_id`: for padding only, without a meaning. `written_before`: text of the template that begins every answer and
    is not part of the prompt, such as an empty thought, or "". The policy has to sample it.
    """

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int] = (), arguments: Mapping[str, Any] | None = None) -> None:
        """Find the place of an answer in the template of `tokenizer`.

        `eos_ids`: further ids that end generation, from the model's generation_config. `arguments`: arguments of the
        template next to the messages (`data.template_arguments`). Raises BadInput for a template without a place for
        the answer.
        """
        self.tokenizer = tokenizer
        self._arguments = dict(arguments or {})
        added = tokenizer.added_tokens_decoder
        # The text before an answer in templates that ignore add_generation_prompt.
        self._header = ""
        self._controls = {token.content: i for i, token in added.items() if token.special and token.content.strip()}
        before, tail = self._probe()
        ends = {token.content: i for i, token in added.items() if token.content.strip()}
        found = _first_of(ends, tail)
        if found is not None:
            at, name = found
            self.end_of_turn, self._end_text = ends[name], name
        elif tokenizer.eos_token_id is not None:
            at, self.end_of_turn, self._end_text = 0, tokenizer.eos_token_id, tokenizer.eos_token
        else:
            raise BadInput(
                "chat template", f"has no special token after the answer ({tail!r}), and there is no eos token",
                "one of them",
            )  # fmt: skip
        self._tail, self._tail_text = tail, tail[:at]
        self._controls |= {self._end_text: self.end_of_turn}
        prompt_text = self._template([{"role": "user", "content": _PROBE_USER}], generation_prompt=True)
        self._controls |= {name: i for name, i in ends.items() if name in prompt_text}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._controls, key=len, reverse=True))))
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids: list[int] = list(dict.fromkeys([self.end_of_turn, *eos, *eos_ids]))
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else (eos or [self.end_of_turn])[0]
        self.written_before = before if before.strip() else ""
        self._before = tokenizer.decode(self._encode(before), skip_special_tokens=True) if before else ""

    @property
    def written_before_warning(self) -> str:
        """Warning about the consequences of a `written_before` that is not empty."""
        return (
            f"the chat template writes {self.written_before!r} before every answer. Human answers are trained with it, "
            "but the model may begin its own answers otherwise (with a thought, say), which makes the two easy to tell "
            "apart; data.template_arguments may put it into the prompt (enable_thinking: false for Qwen3)"
        )

    @classmethod
    def from_folder(cls, path: Path, arguments: Mapping[str, Any] | None = None) -> Renderer:
        """Return the renderer of a Hugging Face folder; tokenizer files suffice. Raises BadInput."""
        file = path / "generation_config.json"
        eos = read_json_object(file).get("eos_token_id")
        ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(i) is int for i in ends):
            raise BadInput("model", f"has eos_token_id {_short(eos)} in {file}", "a token id, or a list of them")
        return cls(load_tokenizer(path), ends, arguments)

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the ids of a prompt, for sampling and training alike. They end where the answer begins.

        `tools`: descriptions of the conversation's own tools. Raises BadInput, also for tools and calls that the
        template does not write.
        """
        protect = self._spells_control([messages, tools])
        if protect:
            messages, tools = self._masked([messages, tools])
        text = self._template(messages, tools, generation_prompt=True)
        marks = Marks()
        marked, marked_tools = marks.messages(messages), marks.functions(tools or ())
        if marks.texts:
            marks.require_written(self._template(marked, marked_tools, generation_prompt=True))
        _require_texts(text, [message for message in messages if message["role"] in ("system", "user")])
        return self._encode_protected(text) if protect else self._encode(text)

    def answer_ids(self, messages: Sequence[Message], reply: str | Message, tools: Tools = None) -> list[int]:
        """Return the ids of a finished answer to `prompt_ids(messages, tools)`. Only the last one is `end_of_turn`.

        `reply`: the text, or the message with its tool calls and thought. The answer is tokenised in the context of the
        prompt, or alone if the tokenizer would merge its first letters with the prompt's last. Raises BadInput, also
        for calls, a thought or a part of the text that the template does not write.
        """
        prompt_ids = self.prompt_ids(messages, tools)
        said: Message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
        protect = self._spells_control([messages, said, tools])
        if protect:
            messages, said, tools = self._masked([messages, said, tools])
        encode = self._encode_protected if protect else self._encode
        prompt, text = self._answer_text(messages, said, tools)
        marks = Marks()
        (marked,) = marks.messages([said], whole=True)
        if marks.texts:
            marks.require_written(self._answer_text(messages, marked, tools)[1])
        _require_texts(text, [said])
        ids = encode(prompt + text + self._end_text)
        if ids[: len(prompt_ids)] == prompt_ids and len(ids) > len(prompt_ids) + 1:
            ids = ids[len(prompt_ids) :]
        else:
            ids = encode(text + self._end_text)
        if ids.count(self.end_of_turn) != 1 or ids[-1] != self.end_of_turn:
            raise BadInput("chat template", f"has {ids.count(self.end_of_turn)} end-of-turn tokens in an answer",
                           "exactly one, at the end")  # fmt: skip
        return ids

    @cached_property
    def left_out(self) -> set[str]:
        """The parts of a row that the template cuts: `system`, and `thought` for `<think>…</think>` in an answer.

        `prompt_ids` and `answer_ids` refuse such rows. Version 0.1.0 trained on what was left of them.
        """
        user: Message = {"role": "user", "content": _PROBE_USER}
        tries: dict[str, Callable[[], object]] = {
            "system": lambda: self.prompt_ids([{"role": "system", "content": "spinregsystem"}, user]),
            "thought": lambda: self.answer_ids([user], f"<think>\nspinregthought\n</think>\n\n{_PROBE_ANSWER}"),
        }
        found = set()
        for name, attempt in tries.items():
            try:
                attempt()
            except BadInput:
                found.add(name)
        return found

    def decode(self, answer_ids: Sequence[int]) -> str:
        """Return the text of an answer without special tokens and without `written_before`."""
        ids = [i for i in answer_ids if i != self.end_of_turn]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.removeprefix(self._before)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids with every special token spelled out, for people."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of everything that decides the ids of a row: tokenizer, template, end of turn."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        template = self.tokenizer.get_chat_template()
        parts = [spec, template, dict(self.tokenizer.special_tokens_map), self.end_of_turn]
        parts += [self._arguments] if self._arguments else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _probe(self) -> tuple[str, str]:
        """Return the template's text between the generation prompt and an answer, and after the answer."""
        user: list[Message] = [{"role": "user", "content": _PROBE_USER}]
        prompt = self._template(user, generation_prompt=True)
        full = self._template([*user, {"role": "assistant", "content": _PROBE_ANSWER}], generation_prompt=False)
        where = "chat template"
        if _PROBE_USER not in prompt:
            raise BadInput(where, f"does not write the user's text into {prompt!r}", "a template that does")
        if full.count(_PROBE_ANSWER) != 1:
            raise BadInput(where, f"has an answer {full.count(_PROBE_ANSWER)} times in {full!r}", "exactly once")
        if not full.startswith(prompt):
            raise BadInput(
                where, f"has a generation prompt {prompt!r} that does not begin the conversation {full!r}",
                f"conversations that begin with the generation prompt, so that the answer's place is known; {_REMEDY}",
            )  # fmt: skip
        before, tail = full[len(prompt) :].split(_PROBE_ANSWER)
        if before.strip() and prompt == self._template(user, generation_prompt=False):
            # The header belongs to the prompt: the policy should not have to write it.
            self._header, before = before, ""
        return before, tail

    def _template(self, messages: Sequence[Message], tools: Tools = None, *, generation_prompt: bool) -> str:
        own = {"tools": list(tools)} if tools else {}
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **self._arguments | own
            )
        # A template is a program, and can raise anything.
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            raise BadInput(
                "chat template", f"cannot render the roles {roles}: {error}", "a conversation that it accepts"
            ) from None
        return text + self._header if generation_prompt else text

    def _answer_text(self, messages: Sequence[Message], reply: Message, tools: Tools) -> tuple[str, str]:
        """Return the rendered prompt, and the answer as the template writes it after that prompt."""
        prompt = self._template(messages, tools, generation_prompt=True)
        full = self._template([*messages, reply], tools, generation_prompt=False)
        if not full.startswith(prompt) or not full.endswith(self._tail):
            # Some templates write the system text only while the user speaks last.
            _require_texts(full, [message for message in messages if message["role"] == "system"])
            raise BadInput(
                "chat template", f"has no place for the answer in {full[-200:]!r}",
                f"{prompt[-60:]!r}, the answer, {self._tail!r}; {_REMEDY}",
            )  # fmt: skip
        return prompt, full[len(prompt) : len(full) - len(self._tail)] + self._tail_text

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _spells_control(self, said: Any) -> bool:
        return any(self._pattern.search(text) for text in _texts(said))

    def _masked(self, said: Any) -> Any:
        def mask(text: str) -> str:
            if _MASK in text or _NAME in text:
                raise BadInput("row", "holds the noncharacter U+FDD0 or U+FDD1 in a text", "text without it")
            return self._pattern.sub(lambda m: f"{_MASK}{self._controls[m[0]]}{_MASK}", text)

        return _mapped(said, mask)

    def _encode_protected(self, rendered: str) -> list[int]:
        """Return the ids of a text rendered from masked messages: only the template's special tokens are special."""
        spelling = {str(i): name for name, i in self._controls.items()}
        text = self._pattern.sub(lambda m: f"{_NAME}{self._controls[m[0]]}{_NAME}", rendered)
        text = re.sub(f"{_MASK}([0-9]+){_MASK}", lambda m: spelling[m[1]], text)
        return list(self._respelled.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _respelled(self) -> Any:
        """Copy of the tokenizer in which each control token is spelled _NAME id _NAME."""
        from tokenizers import Tokenizer

        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        model, names = spec["model"], {name: f"{_NAME}{i}{_NAME}" for name, i in self._controls.items()}
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(name, name): i for name, i in model["vocab"].items()}
        # The vocabulary of a Unigram model is a list of [piece, score] by id.
        else:
            model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        # A control token must not be merged from pieces, even if the vocabulary would allow it.
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names]
        spec["truncation"] = spec["padding"] = None
        copy = Tokenizer.from_str(json.dumps(spec))
        for name, i in self._controls.items():
            if copy.token_to_id(names[name]) != i:
                raise BadInput(
                    "model", f"has a token {name!r} whose id depends on its spelling", "an ordinary tokenizer.json"
                )
        return copy


def _require_texts(rendered: str, messages: Sequence[Message]) -> None:
    """Raise BadInput if a rendered text lacks the content of a message. A template may change blanks."""
    there = "".join(rendered.split())
    for message in messages:
        if "".join(message["content"].split()) not in there:
            raise BadInput(
                "chat template", f"leaves out a part of the {message['role']}'s text {_short(message['content'])}",
                f"a template that writes all of it, or rows without it; {_REMEDY}",
            )  # fmt: skip


def _texts(said: Any) -> Iterator[str]:
    """Yield every text in messages or descriptions of tools, at any depth."""
    if isinstance(said, str):
        yield said
    elif isinstance(said, dict):
        for key, value in said.items():
            yield key
            yield from _texts(value)
    elif isinstance(said, list | tuple):
        for one in said:
            yield from _texts(one)


def _mapped(said: Any, change: Callable[[str], str]) -> Any:
    """Return messages or descriptions of tools with every text in them changed, at any depth."""
    if isinstance(said, str):
        return change(said)
    if isinstance(said, dict):
        return {change(key): _mapped(value, change) for key, value in said.items()}
    if isinstance(said, list | tuple):
        return [_mapped(one, change) for one in said]
    return said


def _first_of(names: Iterable[str], text: str) -> tuple[int, str] | None:
    """Return position and name of the first of several strings in a text; of several at one position, the longest."""
    found = [(text.find(name), -len(name), name) for name in names if name in text]
    return None if not found else (min(found)[0], min(found)[2])
