"""Checked data sets: counts, duplicates, and the limit on bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spinreg_core.config import DataConfig
from spinreg_core.data.load import by_reason, load_heldout, load_rows, require_usable
from spinreg_core.errors import BadInput
from tests.support.files import write_jsonl


def pair(prompt: str, answer: str) -> dict[str, str]:
    return {"prompt": prompt, "response": answer}


def test_load_rows_lists_bad_rows_with_numbers_and_reasons(tmp_path: Path) -> None:
    rows = [pair("a", "1"), "{broken", pair("b", ""), {"prompt": "c"}, pair("d", "4"), [1]]
    loaded = load_rows(write_jsonl(tmp_path / "x.jsonl", rows), DataConfig())
    assert loaded.records == 6
    assert [row.source_row for row in loaded.rows] == [1, 5]
    assert [(bad.row, bad.reason) for bad in loaded.rejected] == [
        (2, "broken_json"), (3, "empty_answer"), (4, "missing_column"), (6, "wrong_type"),
    ]  # fmt: skip
    with pytest.raises(BadInput) as error:
        require_usable(loaded, loaded.rejected, 0.5)
    for part in ("66.7% bad rows (4 of 6", "1 broken_json", "row 3: empty_answer", "data.max_bad_share"):
        assert part in str(error.value)
    require_usable(loaded, loaded.rejected, 0.67)


def test_require_usable_counts_records_and_not_turns(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 5
    rows = [{"messages": good}, {"messages": good[:1]}]
    loaded = load_rows(write_jsonl(tmp_path / "x.jsonl", rows), DataConfig(turns="all"))
    assert len(loaded.rows) == 5
    require_usable(loaded, loaded.rejected, 0.5)
    with pytest.raises(BadInput, match=r"50\.0% bad rows"):
        require_usable(loaded, loaded.rejected, 0.49)


def test_require_usable_without_a_good_row_raises(tmp_path: Path) -> None:
    loaded = load_rows(write_jsonl(tmp_path / "x.jsonl", [pair("a", "")]), DataConfig())
    with pytest.raises(BadInput, match=r"100\.0% bad rows"):
        require_usable(loaded, loaded.rejected, 1.0)


def test_load_rows_without_records_raises(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no rows"):
        load_rows(write_jsonl(tmp_path / "x.jsonl", []), DataConfig())
    with pytest.raises(BadInput, match=r"none of them is a record \(row 1: broken_json"):
        load_rows(write_jsonl(tmp_path / "y.jsonl", ["{", "["]), DataConfig())


def test_load_rows_leaves_out_exact_duplicates(tmp_path: Path) -> None:
    rows = [pair("a", "1"), pair("b", "1"), pair("a", "1"), pair("a", "2"), pair("c", "1")]
    loaded = load_rows(write_jsonl(tmp_path / "x.jsonl", rows), DataConfig())
    assert [row.source_row for row in loaded.rows] == [1, 2, 4, 5]
    assert loaded.duplicates.exact == 1
    assert loaded.duplicates.prompts == 1
    assert loaded.duplicates.examples == ['"a" (rows 1, 4)']


def test_content_hash_depends_on_content_alone(tmp_path: Path) -> None:
    rows = [pair("a", "1"), pair("b", "2")]
    first = load_rows(write_jsonl(tmp_path / "x.jsonl", rows), DataConfig()).content_hash()
    (tmp_path / "y.json").write_text(json.dumps(rows, indent=3))
    assert load_rows(str(tmp_path / "y.json"), DataConfig()).content_hash() == first
    for other in ([pair("a", "1"), pair("b", "3")], [*rows, "{"], rows[::-1]):
        assert load_rows(write_jsonl(tmp_path / "z.jsonl", other), DataConfig()).content_hash() != first


def test_load_heldout_prefers_the_configured_data_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [pair("a", "1")])
    assert load_heldout(path, DataConfig()) is None
    found = load_heldout("builtin:demo", DataConfig(heldout_dataset=path, split="train[:5]"))
    assert found is not None
    assert found.rows[0].answer == "1"
    demo = load_heldout("builtin:demo", DataConfig())
    assert demo is not None
    assert len(demo.rows) >= 60
    assert not demo.rejected


def test_by_reason_counts_most_frequent_first(tmp_path: Path) -> None:
    loaded = load_rows(
        write_jsonl(tmp_path / "x.jsonl", ["{", pair("", "x"), pair("a", ""), "{", pair("b", "1")]), DataConfig()
    )
    assert next(iter(by_reason(loaded.rejected).items())) == ("broken_json", 2)


def test_load_rows_of_hostile_lines_loses_one_row_each(tmp_path: Path) -> None:
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": deep}]}
    lines = [
        pair("a", "1"), "[" * 200_000, {"\ud800y": 1},
        {"messages": [{"role": "user", "content": "x"}, call]}, pair("b", "1"),
    ]  # fmt: skip
    loaded = load_rows(write_jsonl(tmp_path / "x.jsonl", lines), DataConfig(format="prompt_response"))
    assert [row.source_row for row in loaded.rows] == [1, 5]
    assert [(bad.row, bad.reason) for bad in loaded.rejected] == [
        (2, "broken_json"), (3, "missing_column"), (4, "missing_column"),
    ]  # fmt: skip
    json.dumps([bad.detail for bad in loaded.rejected], ensure_ascii=False).encode()
    loaded = load_rows(
        write_jsonl(tmp_path / "y.jsonl", [lines[3], {"messages": [{"role": "user", "content": "x"}]}]), DataConfig()
    )
    assert [bad.reason for bad in loaded.rejected] == ["wrong_type", "no_assistant_turn"]
    with pytest.raises(BadInput, match=r"has the columns \\ud800y") as error:
        load_rows(write_jsonl(tmp_path / "z.jsonl", [lines[2]]), DataConfig())
    str(error.value).encode()
