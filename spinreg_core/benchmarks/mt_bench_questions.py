"""Questions of MT-Bench and their reference answers, from a user's files or from the hub.

Decides: the required fields of a question, the temperature of each category, and which categories are graded against a
reference (all as in FastChat's llm_judge). Leaves out: answering (`mt_bench_answers`) and grading (`mt_bench`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spinreg_core.config import BenchmarksConfig
from spinreg_core.errors import BadInput
from spinreg_core.input_limits import require_small_file

HUB = "HuggingFaceH4/mt_bench_prompts"
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
REFERENCED = ("math", "reasoning", "coding")


@dataclass(frozen=True)
class Question:
    """A question of two turns. Only categories in REFERENCED have a `reference`: answers to both turns, or None."""

    question_id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None


def load_questions(benchmarks: BenchmarksConfig) -> list[Question]:
    """Read the questions in the order of the file. Raises BadInput, naming file and line."""
    assert benchmarks.mt_bench is not None
    references = _references(benchmarks.mt_bench_references)
    found: dict[str, Question] = {}
    for where, record in _from_hub() if benchmarks.mt_bench == "hub" else _lines("mt_bench", benchmarks.mt_bench):
        question_id, category, turns = (record.get(name) for name in ("question_id", "category", "turns"))
        if not isinstance(question_id, int | str) or str(question_id) in found:
            raise BadInput(f"{where}, question_id", repr(question_id), "a number or name that no other question has")
        if not isinstance(category, str) or category not in TEMPERATURES:
            raise BadInput(f"{where}, category", repr(category), f"one of {', '.join(TEMPERATURES)}")
        pair = _two_texts(turns)
        if pair is None:
            raise BadInput(f"{where}, turns", repr(turns)[:100], "a list of two texts")
        # Not the field `reference` of FastChat's question.jsonl: it holds hints that its graders never see.
        own = references.get(str(question_id)) or _two_texts(record.get("hub_reference"))
        reference = own if category in REFERENCED else None
        found[str(question_id)] = Question(str(question_id), category, pair, reference)
    if not found:
        raise BadInput("benchmarks.mt_bench", f"no question in {benchmarks.mt_bench}", "one question per line")
    unknown = references.keys() - found.keys()
    if unknown:
        raise BadInput("benchmarks.mt_bench_references", f"an answer to {min(unknown)!r}, which is no question",
                       "only answers to the questions of benchmarks.mt_bench")  # fmt: skip
    return list(found.values())


def content_hash(questions: list[Question]) -> str:
    """Return the SHA-256 (hex) over ids, categories and texts of the questions."""
    asked = [{k: v for k, v in asdict(q).items() if k != "reference"} for q in questions]
    return _hash(asked)


def references_hash(questions: list[Question]) -> str:
    return _hash([[q.question_id, q.reference] for q in questions if q.reference])


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _two_texts(value: Any) -> tuple[str, str] | None:
    usable = (
        isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) and text.strip() for text in value)
    )
    return (value[0], value[1]) if usable else None


def _references(path: str | None) -> dict[str, tuple[str, str]]:
    found = {}
    for where, record in [] if path is None else _lines("mt_bench_references", path):
        question_id, choices = record.get("question_id"), record.get("choices")
        turns = (
            choices[0].get("turns") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        )
        if not isinstance(question_id, int | str):
            raise BadInput(f"{where}, question_id", repr(question_id), "a number or name")
        pair = _two_texts(turns)
        if pair is None:
            raise BadInput(f"{where}, choices", repr(choices)[:100], '[{"turns": [answer, answer]}]')
        found[str(question_id)] = pair
    return found


def _lines(field: str, path: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield the place and the fields of every line. Raises BadInput."""
    file = Path(path).expanduser()
    name = file.name
    require_small_file(f"benchmarks.{field}", file)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"benchmarks.{field}", f"{path} ({error})", "a readable file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"benchmarks.{field}, {name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(where, f"{line[:60]!r} ({error})", "a JSON object") from None
        if not isinstance(record, dict):
            raise BadInput(where, type(record).__name__, "a JSON object")
        yield where, record


def _from_hub() -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield the place and the fields of every question on the hub, by FastChat's names. Raises BadInput."""
    from datasets import load_dataset

    try:
        rows = load_dataset(HUB, split="train")
    except Exception as error:  # `datasets` and the hub's client raise many classes of errors
        raise BadInput("benchmarks.mt_bench", f"is hub, but {HUB} cannot be loaded ({error})"[:500],
                       "check the connection to the hub, or give a file of questions") from None  # fmt: skip
    for number, row in enumerate(rows, 1):
        where = f"benchmarks.mt_bench, {HUB}, row {number}"
        yield where, {"question_id": row["prompt_id"], "category": row["category"], "turns": row["prompt"],
                      "hub_reference": row["reference"]}  # fmt: skip
