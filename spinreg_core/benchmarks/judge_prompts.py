"""Prompts for a judge, and the parsing of its verdicts, after MT-Bench (arXiv 2306.05685).

Decides: the names of prompts and their placeholders (FastChat's, so that its judge_prompts.jsonl can be used), and what
counts as a rating or a preference. Leaves out: the wording (`judge_prompts.yaml`, or the user's file), and asking the
judge (`judge`).
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from spinreg_core.benchmarks.judge_client import Messages
from spinreg_core.config import JudgeConfig
from spinreg_core.errors import BadInput
from spinreg_core.input_limits import require_small_file

Preference = Literal["A", "B", "tie"]
Parsing = Literal["strict", "fastchat"]
T = TypeVar("T")
_TURNS = {"question_1", "question_2"}
_REFERENCES = {"ref_answer_1", "ref_answer_2"}
PLACEHOLDERS: dict[str, set[str]] = {
    "single-v1": {"question", "answer"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-v1-multi-turn": {*_TURNS, "answer_1", "answer_2"},
    "single-math-v1-multi-turn": {*_TURNS, *_REFERENCES, "answer_1", "answer_2"},
    "pair-v2": {"question", "answer_a", "answer_b"},
    "pair-v2-multi-turn": {*_TURNS, "answer_a_1", "answer_b_1", "answer_a_2", "answer_b_2"},
}
SINGLE = tuple(name for name in PLACEHOLDERS if name.startswith("single"))
PAIR = tuple(name for name in PLACEHOLDERS if name.startswith("pair"))
_PREFERENCES: dict[str, Preference] = {"A": "A", "B": "B", "C": "tie"}
_PREFERENCE = re.compile(r"\[\[([ABC])\]\]")
_THOUGHT = re.compile(r"<(think|thinking|reasoning)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_QUOTES = ("'", '"', "`", "“", "\u2018", "«")
_RATINGS = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"\[(\d+(?:\.\d*)?)\]"))


@dataclass(frozen=True)
class Prompts:
    """Prompts by name, each (system prompt, template), and the SHA-256 of the file they come from."""

    by_name: dict[str, tuple[str, str]]
    sha256: str

    def messages(self, name: str, **values: str) -> Messages:
        system, template = self.by_name[name]
        said = [{"role": "system", "content": system}] if system else []
        return [*said, {"role": "user", "content": template.format(**values)}]


def load_prompts(judge: JudgeConfig, names: Iterable[str]) -> Prompts:
    """Read the prompts of `judge.prompts`, or spinreg's own.

    The file is YAML, {name: {system_prompt, prompt_template}}, or JSON lines with those fields and `name`, like
    FastChat's judge_prompts.jsonl. Other names in it are ignored.

    Raises BadInput for an unreadable file, and where one of `names` is missing, lacks a placeholder or has an unknown
    one.
    """
    path = Path(judge.prompts or Path(__file__).with_name("judge_prompts.yaml")).expanduser()
    require_small_file("judge.prompts", path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("judge.prompts", f"{path} ({error})", "a readable file in UTF-8") from None
    found = _records(path, text)
    by_name = {}
    for name in names:
        where = f"judge.prompts, {path.name}, {name}"
        if name not in found:
            raise BadInput(where, "is missing", f"the prompts {', '.join(names)}")
        by_name[name] = _checked(where, found[name], PLACEHOLDERS[name])
    return Prompts(by_name, hashlib.sha256(raw).hexdigest())


def _records(path: Path, text: str) -> Mapping[str, object]:
    try:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            return {str(line["name"]): line for line in lines}
        found = yaml.safe_load(text)
    except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())[:200]
        raise BadInput("judge.prompts", f"{path} ({first})", "YAML, or JSON lines each with a name") from None
    if not isinstance(found, dict):
        raise BadInput("judge.prompts", f"{path} with {type(found).__name__}", "a mapping of prompts by name")
    return found


def _checked(where: str, record: Any, wanted: set[str]) -> tuple[str, str]:
    if not isinstance(record, dict) or not isinstance(record.get("prompt_template"), str):
        raise BadInput(where, "has no prompt_template", "a text with placeholders")
    system, template = record.get("system_prompt") or "", record["prompt_template"]
    if not isinstance(system, str):
        raise BadInput(f"{where}.system_prompt", repr(system)[:100], "a text")
    expected = f"the placeholders {', '.join(f'{{{name}}}' for name in sorted(wanted))}; {{{{ and }}}} stand for braces"
    try:
        there = {f"{name}!{conversion}:{spec}" if spec or conversion else name
                 for _, name, spec, conversion in string.Formatter().parse(template) if name is not None}  # fmt: skip
    except ValueError as error:
        raise BadInput(f"{where}.prompt_template", str(error), expected) from None
    if there != wanted:
        odd = [f"no {{{name}}}" for name in sorted(wanted - there)] + [f"{{{name}}}" for name in sorted(there - wanted)]
        raise BadInput(f"{where}.prompt_template", ", ".join(odd), expected)
    return system, template


def parse_rating(text: str, parsing: Parsing) -> float | None:
    """Return the rating in a judge's answer, or None for a malformed one. A rating is from 1 to 10.

    strict: the one `[[7]]` of the answer (`_one_verdict`). fastchat: the first `[[7]]`, else the first `[7]`.
    """
    if parsing == "strict":
        found = _one_verdict(text, _RATINGS[0], float)
    else:
        found = next((float(match[1]) for pattern in _RATINGS if (match := pattern.search(text))), None)
    return found if found is not None and 1 <= found <= 10 else None


def parse_preference(text: str, parsing: Parsing) -> Preference | None:
    """Return a judge's preference, or None for a malformed answer.

    strict: the one `[[A]]`, `[[B]]` or `[[C]]` (a tie) of the answer (`_one_verdict`). fastchat: `[[A]]` anywhere, else
    `[[B]]`, else `[[C]]`.
    """
    if parsing == "strict":
        return _one_verdict(text, _PREFERENCE, _PREFERENCES.__getitem__)
    return next((verdict for mark, verdict in _PREFERENCES.items() if f"[[{mark}]]" in text), None)


def _one_verdict(text: str, pattern: re.Pattern[str], read: Callable[[str], T]) -> T | None:
    """Return the verdict of an answer without its thoughts; None for several different ones, or a quoted one.

    A judge that thinks aloud names verdicts before its own, and an answer under judgement may hold one to be quoted.
    """
    said = _THOUGHT.sub("", text).rpartition("</think>")[2]
    matches = list(pattern.finditer(said))
    found = {read(match[1]) for match in matches}
    quoted = any(
        said[: match.start()].endswith(_QUOTES)
        or said[: match.start()].rpartition("\n")[2].lstrip().startswith(">")
        or said[: match.start()].count("```") % 2
        for match in matches
    )
    return found.pop() if len(found) == 1 and not quoted else None
