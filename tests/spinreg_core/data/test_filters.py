"""Rows left out on purpose: each for the first reason that applies, all counted and listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import DataConfig
from spinreg_core.data.filters import by_reason_and_pattern, load_training, select
from spinreg_core.data.formats import Row
from spinreg_core.data.load import load_heldout
from spinreg_core.errors import BadInput
from tests.support.files import write_jsonl

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
         "eleven", "twelve", "thirteen", "fourteen", "fifteen"]  # fmt: skip


def row(number: int, prompt: str, answer: str) -> Row:
    return Row(number, ({"role": "user", "content": prompt},), answer)


def chosen(rows: list[Row], known: dict[str, list[str]] | None = None, **data: Any) -> tuple[list[int], dict[int, str]]:
    kept, left_out = select(rows, DataConfig(**data), known or {})
    assert len(kept) + len(left_out) == len(rows)
    return [r.source_row for r in kept], {one.row: f"{one.reason}: {one.detail}" for one in left_out}


def test_select_by_default_keeps_every_row() -> None:
    rows = [row(1, "a", "b"), row(2, "x", "")]
    assert chosen(rows) == ([1, 2], {})


def test_select_leaves_rows_out_by_length_and_pattern() -> None:
    texts = [("p", "short"), ("p", "just so.."), ("p", "much too long"), ("As an AI, p", "as you say"),
             ("p", "As an AI I am")]  # fmt: skip
    rows = [row(i + 1, *text) for i, text in enumerate(texts)]
    kept, out = chosen(
        rows, min_answer_characters=6, max_answer_characters=10, drop_patterns=[r"(?i)^as an ai\b", "zzz"]
    )
    assert kept == [2]
    assert out == {1: "answer_too_short: 5 characters", 3: "answer_too_long: 13 characters",
                   4: "pattern: (?i)^as an ai\\b", 5: "answer_too_long: 13 characters"}  # fmt: skip
    _, left = select(rows, DataConfig(drop_patterns=["AI", "so"]), {})
    assert by_reason_and_pattern(left) == {"pattern so": 1, "pattern AI": 2}


@pytest.mark.parametrize("length", [5, 8, 13])
def test_select_needs_exactly_the_configured_words_in_a_row(length: int) -> None:
    known = {"bench": ["Zero, " + " ".join(WORDS) + "?"]}
    inside = "so what of " + ", ".join(WORDS[2 : 2 + length]).upper() + "! then"
    almost = "so what of " + " ".join(WORDS[2 : 1 + length]) + " and " + " ".join(WORDS[1 + length :][: length - 1])
    rows = [row(1, inside, "x"), row(2, almost, "x"), row(3, "x", inside), row(4, "unrelated", "x")]
    kept, out = chosen(rows, known, contamination_words=length)
    assert kept == [2, 4]
    assert set(out) == {1, 3}
    assert out[1].startswith('contaminated: bench: "three four five')


def test_select_matches_short_prompts_whole_and_ignores_very_short() -> None:
    known = {"bench": ["Who wrote the old book?", "What is it?"]}
    rows = [row(1, "Tell me: who wrote the old book", "x"), row(2, "Who wrote the new book? What is it?", "x")]
    assert chosen(rows, known)[0] == [2]


def test_select_also_searches_thoughts_and_calls() -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": {"q": " ".join(WORDS)}}}
    plain = row(1, "Look it up.", "Yes.")
    thinking = Row(2, plain.messages, "Yes.", {"reasoning_content": " ".join(WORDS)})
    calling = Row(3, plain.messages, "", {"tool_calls": [call]})
    earlier = Row(4, (*plain.messages, calling.reply, {"role": "tool", "content": "found"}), "Yes.")
    rows = [plain, thinking, calling, earlier]
    assert chosen(rows, {"bench": [" ".join(WORDS)]})[0] == [1]
    assert chosen(rows, drop_patterns=[WORDS[1]])[0] == [1]
    assert chosen(rows, min_answer_characters=3)[0] == [1, 2, 3, 4], "a call is no short answer"


def test_load_training_leaves_out_contaminated_rows(tmp_path: Path) -> None:
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"prompt": " ".join(WORDS), "answer": "b"}])
    rows = [{"prompt": f"Question {i}", "answer": "yes"} for i in range(5)]
    train = write_jsonl(tmp_path / "train.jsonl", [*rows, {"prompt": f"Now: {' '.join(WORDS)}", "answer": "no"}])
    found = load_training(train, DataConfig(evaluation_sets=[bench]))
    assert len(found.loaded.rows) == 5
    assert [(one.row, one.reason) for one in found.left_out] == [(6, "contaminated")]
    assert found.counts == {"contaminated": 1}
    plain = load_training(train, DataConfig())
    assert len(plain.loaded.rows) == 6
    assert (plain.left_out, plain.counts) == ([], {})
    assert plain.loaded.content_hash() != found.loaded.content_hash(), "so that the stage prepare makes another object"
    with pytest.raises(BadInput, match=r"has no row that the filters keep \(6 answer_too_short\)"):
        load_training(train, DataConfig(min_answer_characters=99))
    with pytest.raises(BadInput, match="nowhere"):
        load_training(train, DataConfig(evaluation_sets=[str(tmp_path / "nowhere.jsonl")]))


def test_data_config_with_an_invalid_pattern_raises() -> None:
    with pytest.raises(ValueError, match=r"regular expressions; '\(' is not one"):
        DataConfig(drop_patterns=["("])


def test_load_training_with_max_records_reads_only_the_beginning(tmp_path: Path) -> None:
    """`max_records` counts records, good and bad, and says nothing about the other data sets."""
    lines = [json.dumps({"prompt": f"question {i}", "response": "answer"}) for i in range(6)]
    lines[1] = "{broken"
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    config = DataConfig(max_records=3, heldout_dataset=str(tmp_path / "x.jsonl"))
    loaded = load_training(str(tmp_path / "x.jsonl"), config).loaded
    assert (loaded.records, [r.source_row for r in loaded.rows]) == (3, [1, 3])
    heldout = load_heldout(str(tmp_path / "x.jsonl"), config)
    assert heldout is not None
    assert heldout.records == 6
    with pytest.raises(ValueError, match=r"max_records needs a whole split, but split is 'train\[:5\]'"):
        DataConfig(max_records=3, split="train[:5]")
